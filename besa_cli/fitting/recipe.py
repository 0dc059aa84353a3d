"""Commands that make and measure a candidate."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from besa_cli.fitting.space import Candidate

_QUANTIZER = "gptq"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Options of every command of a search.

    Attributes
    ----------
    model : str
    digest : str
        Content digest of the model.
    directory : Path
        Directory of the search; every candidate has a run directory in it.
    method : str
        That of `besa prune`.
    best : bool
        Also let the whole model learn its sparsities, and tune it.
    group_size : str
        Columns that share a scale.
    text : str
        What `besa eval ppl` measures.
    windows : int, optional
        How many windows of it; all by default.
    context : int
        Tokens of a window.
    samples : sequence of str
        Options that choose the calibration samples.
    seed : int
    data_dir : str, optional
    compute : sequence of str
        Options of the computation.
    memory : sequence of str
        The limit of memory, if any.
    """

    model: str
    digest: str
    directory: Path
    method: str
    best: bool
    group_size: str
    text: str
    windows: int | None
    context: int
    samples: Sequence[str]
    seed: int
    data_dir: str | None
    compute: Sequence[str]
    memory: Sequence[str] = ()

    @property
    def facts(self) -> dict[str, str | int | None]:
        """All that the quality of a candidate depends on, for the record of the search."""
        return {
            "model": self.model,
            "digest": self.digest,
            "method": self.method,
            "preset": "best" if self.best else "quick",
            "group_size": self.group_size,
            "eval_text": self.text,
            "eval_limit": self.windows,
            "eval_seqlen": self.context,
            "samples": " ".join(self.samples),
            "seed": self.seed,
            "compute": " ".join(self.compute),
        }

    @property
    def dense_run(self) -> Path:
        """Run directory of the dense model, which holds the calibration set."""
        return self.run(Candidate(0.0))

    def run(self, candidate: Candidate) -> Path:
        """Return the run directory of a candidate."""
        return self.directory / candidate.name

    def calibrate(self) -> list[str]:
        """Return the command that draws the calibration samples."""
        words = ["calibrate", "--model", self.model, "--run", str(self.dense_run), *self.samples, *self._data_dir]
        return [*words, "--seed", str(self.seed)]

    def make(self, candidate: Candidate) -> list[list[str]]:
        """Return the commands that make a candidate, in their order; none for the dense model."""
        commands, source = [], self.model
        if candidate.sparsity:
            run = self.run(Candidate(candidate.sparsity))
            prune = ["prune", "--model", self.model, "--method", self.method, "--sparsity", f"{candidate.sparsity:g}"]
            commands.append([*prune, *(("--preset", "best") if self.best else ()), *self._stage(run)])
            source = str(run / "pruned")
            if self.best:
                commands.append(["tune", *self._stage(run)])
                source = str(run / "tuned")
        if candidate.bits is not None:
            grid = ["--bits", str(candidate.bits), "--group-size", self.group_size, "--method", _QUANTIZER]
            commands.append(["quantize", "--model", source, *grid, *self._stage(self.run(candidate))])
        return commands

    def evaluate(self, candidate: Candidate) -> list[str]:
        """Return the command that measures a candidate."""
        own = () if self.make(candidate) else ("--model", self.model)
        words = ["eval", "ppl", self.text, *own, "--run", str(self.run(candidate)), *self._data_dir, *self.compute]
        limit = [] if self.windows is None else ["--limit", str(self.windows)]
        return [*words, *limit, "--seqlen", str(self.context), "--json"]

    @property
    def _data_dir(self) -> list[str]:
        return [] if self.data_dir is None else ["--data-dir", self.data_dir]

    def _stage(self, run: Path) -> list[str]:
        calibration = str(self.dense_run / "calibration")
        return ["--calibration", calibration, "--run", str(run), "--seed", str(self.seed), *self.compute, *self.memory]
