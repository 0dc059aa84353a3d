"""Process of one contender: loads it, then answers a JSON line for every workload on stdin.

Standard output carries answers alone; whatever libraries print goes to stderr.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor

from besa_cli.bench.contenders import Contender, RunTiming, TokenLoad
from besa_cli.errors import BesaError, reason_of
from besa_cli.system import compute

_READ = 512 << 20  # bytes that are read to measure the memory: many times the largest cache
_PASSES = 3


class Loaded(Protocol):
    """A contender in this process."""

    weights_read: int | None

    def run(self, workload: TokenLoad) -> tuple[float, float] | None:
        """Return the seconds of prefill and decode; None if it cannot run the workload."""


class _Transformers:
    """A checkpoint in transformers, by `generate`."""

    def __init__(self, contender: Contender) -> None:
        from besa_cli.inference import loading

        dtype = compute.DTYPES[contender.dtype]
        self._model: Any = loading.load(Path(contender.path), dtype, packed=contender.packed)
        self._vocabulary = int(self._model.config.get_text_config().vocab_size)
        self.weights_read = loading.weights_read(self._model)

    def run(self, workload: TokenLoad) -> tuple[float, float] | None:
        from transformers import GenerationConfig

        config: Any = GenerationConfig
        clock = _clock()
        self._model.generation_config = config(
            max_new_tokens=workload.new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        tokens = _tokens(self._vocabulary, workload)
        with torch.no_grad():
            self._model.generate(tokens, attention_mask=torch.ones_like(tokens), streamer=clock)
        return clock.times[1] - clock.times[0], clock.times[-1] - clock.times[1]


def _clock() -> Any:
    """Return a streamer that notes when the prompt and every new token came."""
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        """Streamer that keeps times alone."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    return Clock()


class _LlamaCpp:
    """A GGUF file in llama.cpp, by the package `llama_cpp`."""

    def __init__(self, contender: Contender) -> None:
        import llama_cpp

        from besa_cli.bench.gguf_files import weights_read

        threads = torch.get_num_threads()
        self._model: Any = llama_cpp.Llama(
            contender.path,
            n_ctx=contender.longest,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.weights_read = weights_read(Path(contender.path))

    def run(self, workload: TokenLoad) -> tuple[float, float] | None:
        if workload.batch > 1:
            return None
        tokens = _tokens(self._model.n_vocab(), workload)[0].tolist()
        self._model.reset()
        start = time.perf_counter()
        self._model.eval(tokens)
        following = self._model.sample(temp=0.0)
        first = time.perf_counter()
        for _ in range(workload.new - 1):
            self._model.eval([following])
            following = self._model.sample(temp=0.0)
        return first - start, time.perf_counter() - first


class _Reading:
    """Memory that the threads read: the seconds of one pass stand for prefill."""

    def __init__(self) -> None:
        from besa_cli.runtime import matrix

        self._memory = matrix.huge_pages(_READ).fill_(1).view(torch.int64)
        self.weights_read: int | None = _READ

    def run(self, workload: TokenLoad) -> tuple[float, float] | None:
        seconds = []
        for _ in range(_PASSES):
            start = time.perf_counter()
            self._memory.sum()
            seconds.append(time.perf_counter() - start)
        return min(seconds), 0.0


def _tokens(vocabulary: int, workload: TokenLoad) -> Tensor:
    """Return random prompts, of shape (batch, prompt), the same for every contender with the same vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (workload.batch, workload.prompt), generator=generator)


def _load(contender: Contender) -> Loaded:
    if contender.program == "transformers":
        return _Transformers(contender)
    return _LlamaCpp(contender) if contender.program == "llama_cpp" else _Reading()


def serve(contender: Contender, questions: TextIO, answers: TextIO) -> None:
    """Load a contender, and answer every line of `questions` with a line."""

    def answer(record: dict[str, Any]) -> None:
        answers.write(json.dumps(record) + "\n")
        answers.flush()

    def guarded(work: Callable[[], dict[str, Any]]) -> None:
        try:
            answer(work())
        except BesaError as error:
            answer({"error": error.message, "hint": error.hint})
        except Exception as error:  # noqa: BLE001 - shown by the process that asked
            answer({"error": f"{type(error).__name__}: {reason_of(error)}", "hint": ""})

    loaded: list[Loaded] = []

    def load() -> dict[str, Any]:
        loaded.append(_load(contender))
        compute.give_back_memory()
        return {"weights_read": loaded[0].weights_read}

    def run(workload: TokenLoad) -> dict[str, Any]:
        seconds = loaded[0].run(workload)
        if seconds is None:
            return {"unsupported": True}
        compute.give_back_memory()
        return vars(RunTiming(prefill=seconds[0], decode=seconds[1], resident=compute.resident()))

    guarded(load)
    for line in questions if loaded else ():
        workload = TokenLoad(**json.loads(line))
        guarded(lambda workload=workload: run(workload))  # type: ignore[misc]


def main() -> None:
    """Serve the contender of the command line over stdin and stdout."""
    compute.map_large_tensors()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(Contender(**json.loads(sys.argv[1])), sys.stdin, answers)


if __name__ == "__main__":
    main()
