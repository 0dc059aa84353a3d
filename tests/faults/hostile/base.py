"""The material that cases begin from: a tiny model, texts, a finished run with results and an export, and a GGUF file.

| in a case's directory | what it is |
|---|---|
| `m` | a LLaMA of two blocks in several shards, with a tokenizer of words |
| `rows.jsonl`, `text.txt` | token rows and a text for it |
| `done` | a finished run: Wanda, a perplexity, a simulation, a sparse export |
| `mine` | something of the user's |

`m.gguf` is made beside them, see `gguf`, and goes only into the cases that want it.
"""

import json
import math
import shutil
from pathlib import Path

import torch
from faults.hostile.forks import forked, typed
from faults.hostile.frame import Case, Line, Seen, Whole, line, run
from faults.hostile.liar import HUB
from support import llamas, tiny_models

DRAWN = ("--data", "rows.jsonl", "--samples", "2", "--seqlen", "16")
FLOAT = ("--dtype", "float32")
PRUNE = ("prune", "--model", "m", "--method", "wanda", *DRAWN, *FLOAT, "--run", "r")
PRUNE_TEXT = tuple("text.txt" if word == "rows.jsonl" else word for word in PRUNE)
SAMPLE = ("eval", "sample", "w5 w6", "--model", "m", "--tokens", "6", *FLOAT, "--json")
AGAIN = (*PRUNE[:-1], "done")
PPL = ("eval", "ppl", "text.txt", "--seqlen", "16", *FLOAT, "--json")
EXPORT = ("export", "--format", "sparse", "--run", "done")
IMPORT = ("import", "done/export/sparse", "--run", "r")
GGUF = "m.gguf"
_MADE = (AGAIN, (*PPL, "--run", "done"), ("simulate", "--run", "done"), EXPORT)


class Bench:
    """A place to try cases in, one after the other.

    Parameters
    ----------
    place : Path
        An empty directory; the material lies below it, and each case in the same directory beside that.
    """

    def __init__(self, place: Path) -> None:
        self.base, self._place = place / "base", place / "case"
        self._place.mkdir(parents=True)
        self._make()
        figures = json.loads(self._typed((*PPL, "--run", "done")).out)["results"][0]
        sample = self._typed(SAMPLE).out
        self._whole = Whole(
            perplexity=figures["dense"]["perplexity"],
            pruned=figures["perplexity"],
            gguf=self._of_gguf(),
            sample=sample,
        )
        self._place.rename(self.base)

    def run(self, case: Case) -> str:
        """What is wrong with the answer to a case, or nothing."""
        shutil.copytree(self.base, self._place)
        try:
            return run(case, self._place, self._whole, typing=typed)
        finally:
            HUB.forget()
            for made in (self._place, self._place.parent / "cache", self._place.parent / "hf"):
                shutil.rmtree(made, ignore_errors=True)

    def _make(self) -> None:
        model = self._place / "m"
        tiny_models.add_tokenizer(tiny_models.checkpoint(model, dtype=torch.bfloat16, shard_size="20KB"))
        tiny_models.rows_file(self._place / "rows.jsonl", tiny_models.tokens(2, 16))
        (self._place / "text.txt").write_text(" ".join(f"w{3 + number * 7 % 120}" for number in range(200)))
        (self._place / "mine").mkdir()
        (self._place / "mine" / "notes.txt").write_text("two years of work\n")
        for words in _MADE:
            self._typed(words)
        made = llamas.stage(self._place.parent / "gguf")
        self._typed(("export", "--format", "gguf", "--run", str(made.path)))
        shutil.copy(next(made.path.rglob("*.gguf")), self._place.parent / GGUF)

    def _of_gguf(self) -> float:
        path = Path(shutil.move(put_gguf(self._place), self._place.parent / "other.gguf"))
        found = self._typed((*PPL, "--model", str(path))).out
        return float(json.loads(found)["results"][0]["perplexity"])

    def _typed(self, words: tuple[str, ...]) -> Seen:
        seen = typed(line(*words), self._place)
        if seen.code:
            raise SystemExit(f"besa {' '.join(words)}: {seen.err}")
        return seen


def put_gguf(place: Path) -> Path:
    """Copy the GGUF file into a case's directory."""
    return Path(shutil.copy(place.parent / GGUF, place / GGUF))


def stock(place: Path, model: str = "m", text: str = "text.txt") -> float | None:
    """Perplexity of a text's windows of 16 tokens by stock transformers; None where it does not load or compute it."""

    def measure() -> int:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(place / model, trust_remote_code=False)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            place / model, dtype=torch.float32, trust_remote_code=False
        ).eval()
        ids = torch.tensor(tokenizer((place / text).read_text())["input_ids"])
        windows = ids[: len(ids) // 16 * 16].view(-1, 16)
        with torch.no_grad():
            found = loaded(windows).logits[:, :-1].log_softmax(-1).gather(2, windows[:, 1:, None])
        print(f"perplexity {(-found.double().mean()).exp().item()}")  # noqa: T201
        return 0

    seen = forked(measure, place, Line(words=()))
    found = seen.out.rpartition("perplexity ")[2]
    return float(found) if seen.code == 0 and math.isfinite(float(found)) else None
