"""Contenders of a measurement: ways to run a model, each in a process of its own that answers over a pipe."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, Self

from besa_cli.errors import BesaError
from besa_cli.system.disk import JsonObject

Program = Literal["transformers", "llama_cpp", "reading"]

WORKER = "besa_cli.bench.worker"


class TokenLoad(NamedTuple):
    """Tokens of a prompt, tokens that are generated after it, and sequences at a time."""

    prompt: int
    new: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to run a model.

    Attributes
    ----------
    name : str
        Title in tables.
    program : str
        What computes; ``reading`` reads memory and computes nothing.
    path : str
        Directory or GGUF file.
    packed : bool
        Keep the weights of a sparse export packed.
    dtype : str
        Dtype of computation of transformers.
    longest : int
        Most tokens of a sequence.
    """

    name: str
    program: Program
    path: str = ""
    packed: bool = False
    dtype: str = "bfloat16"
    longest: int = 0


@dataclass(frozen=True, kw_only=True)
class RunTiming:
    """One run of a workload.

    Attributes
    ----------
    prefill : float
        Seconds until the first new token of every sequence.
    decode : float
        Seconds from there to the last.
    resident : int
        Resident bytes of the process afterwards.
    """

    prefill: float
    decode: float
    resident: int


class Runner(Protocol):
    """A contender that is loaded and can be asked for runs."""

    contender: Contender
    weights_read: int | None

    def run(self, workload: TokenLoad) -> RunTiming | None:
        """Run a workload once; None if the contender cannot."""

    def close(self) -> None:
        """End the process, if there is one."""


class Process:
    """A contender in a process of its own, from loading to `close`.

    Attributes
    ----------
    contender : Contender
    weights_read : int, optional
        Bytes of weights that are read to generate a token; None if that depends on the token.

    Raises
    ------
    BesaError
        It cannot be loaded, or its process ended.
    """

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        # -P: no module of the current directory runs in place of one of the program
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER, json.dumps(asdict(contender))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        ready = self._answer()
        self.weights_read: int | None = ready["weights_read"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, workload: TokenLoad) -> RunTiming | None:
        """Run a workload once; None if the contender cannot.

        Raises
        ------
        BesaError
            It failed, or its process ended.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(workload._asdict()) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return None if answer.get("unsupported") else RunTiming(**answer)

    def close(self) -> None:
        """End the process and wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _answer(self) -> JsonObject:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise BesaError(
                f"the process of {self.contender.name} ended with code {self._process.returncode}",
                "it may have run out of memory: measure fewer ways at a time, or a smaller model",
            )
        answer: JsonObject = json.loads(line)
        if "error" in answer:
            self.close()
            raise BesaError(f"{self.contender.name}: {answer['error']}", str(answer["hint"]))
        return answer


class LlamaBench:
    """A GGUF file in llama.cpp's own `llama-bench`, a process for every run.

    Parameters
    ----------
    contender : Contender
    program : str
        Path of `llama-bench`.
    threads : int
    weights_read : int, optional
    """

    def __init__(self, contender: Contender, program: str, threads: int, weights_read: int | None) -> None:
        self.contender, self.weights_read = contender, weights_read
        self._program, self._threads = program, threads

    def run(self, workload: TokenLoad) -> RunTiming | None:
        """Run a workload once; None for several sequences, which `llama-bench` does not generate together.

        Raises
        ------
        BesaError
            It failed, or printed something else than expected.
        """
        if workload.batch > 1:
            return None
        sizes = ["-p", str(workload.prompt), "-n", str(workload.new - 1), "-r", "1", "-t", str(self._threads)]
        command = [self._program, "-m", self.contender.path, *sizes, "-o", "json"]
        output, resident = _output_and_memory(command)
        try:
            tests = {(each["n_prompt"], each["n_gen"]): each["avg_ns"] / 1e9 for each in json.loads(output)}
            prefill, decode = tests[workload.prompt, 0], tests[0, workload.new - 1]
        except (ValueError, KeyError, TypeError) as error:
            raise BesaError(
                f"{self._program} printed other results than expected: {output[:200]!r}",
                "take it off the PATH, or install another version of llama.cpp",
            ) from error
        return RunTiming(prefill=prefill, decode=decode, resident=resident)

    def close(self) -> None:
        """Do nothing: no process is left."""


def _output_and_memory(command: Sequence[str]) -> tuple[str, int]:
    """Run a program; return what it prints and its peak resident bytes.

    Raises
    ------
    BesaError
        It failed.
    """
    import psutil

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        peak, watched = 0, psutil.Process(process.pid)
        while True:
            try:
                output, errors = process.communicate(timeout=0.05)
                break
            except subprocess.TimeoutExpired:
                try:
                    peak = max(peak, int(watched.memory_info().rss))
                except psutil.NoSuchProcess:
                    continue
    if process.returncode:
        last = " ".join(errors.split())[-300:]
        raise BesaError(f"{Path(command[0]).name} failed with code {process.returncode}: {last}", "")
    return output, peak
