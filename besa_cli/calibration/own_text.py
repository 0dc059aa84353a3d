"""Samples that the model writes itself: drawn at temperature 1, from its first token or as turns of its chat template.

The rows are written side by side by stock transformers. Every token is drawn with a number of its own row's generator,
so that a row does not depend on the others, and a killed run resumes with the rows that it has not written.
"""

import hashlib
import json
import math
import random
import re
from array import array
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from besa_cli.calibration import sampling
from besa_cli.calibration.drawing import Drawn, SampleTokenizer
from besa_cli.checkpoint import manifests, sealed, weights
from besa_cli.decoder import architecture
from besa_cli.decoder.conduct import overflow
from besa_cli.errors import BesaError, UsageError
from besa_cli.models import Model
from besa_cli.models.tokenizer import tokenizer_digest
from besa_cli.system import compute, memory
from besa_cli.system.notes import Notify
from besa_cli.text import chat, corpora, documents, tokenizing


class ScriptTokenizer(SampleTokenizer, chat.Template, Protocol):
    """Protocol of the tokenizers whose models write samples; those of transformers satisfy it."""

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text."""

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the special tokens."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, object]:
        """Added tokens by their ids."""


_ROWS = 32  # most rows written side by side
_CACHE = 1 << 30  # bytes of keys and values of these rows
_ROWS_FILE = re.compile(r"\.?[0-9a-f]{16}-\d+-\d+\.safetensors(\.\d+\.partial)?")
_USER, _ASSISTANT = "WhatTheUserSays", "WhatTheAssistantSays"  # stand for the turns, to find what is between them


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Device and dtype of the writing, as on the command line, and the bytes that the process may take."""

    device: str = "auto"
    dtype: str = "auto"
    max_memory: int | None = None


@dataclass(frozen=True, kw_only=True)
class Script:
    """Tokens that are given to the model; it writes those in between.

    Attributes
    ----------
    opening : sequence of int
        Begin the first text of a row; empty for a random token.
    again : sequence of int
        Begin every other text of the row.
    reply : sequence of int
        Stand between the turn of the user and that of the assistant; empty without a chat template.
    closing : sequence of int
        Stand after the turn of the assistant; empty: the token that ended the text.
    ends : collection of int
        Tokens that end a turn or a text.
    """

    opening: Sequence[int] = ()
    again: Sequence[int] = ()
    reply: Sequence[int] = ()
    closing: Sequence[int] = ()
    ends: Collection[int] = ()


def script_of(tokenizer: ScriptTokenizer, ends: Collection[int]) -> Script:
    """Return the tokens around the turns in the model's chat template; without one, its first token.

    Parameters
    ----------
    tokenizer : ScriptTokenizer
    ends : collection of int
        End-of-text tokens of the model; those of the tokenizer and the template are added.
    """
    own = [token for token in (tokenizer.eos_token_id,) if token is not None]
    parts = _around_turns(tokenizer) if tokenizer.chat_template else None
    if parts is not None:
        opening, reply, closing = parts
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        last = [tokens[0] for tokens in (reply, closing) if tokens and tokens[0] in special]
        return Script(
            opening=opening, again=opening, reply=reply, closing=closing, ends=frozenset([*ends, *own, *last])
        )
    first: int | None = tokenizer.bos_token_id
    if first is None:
        return Script(opening=own, ends=frozenset([*ends, *own]))
    return Script(opening=[first], again=[] if first in own else [first], ends=frozenset([*ends, *own]))


def _around_turns(tokenizer: ScriptTokenizer) -> tuple[list[int], list[int], list[int]] | None:
    """Return the tokens before, between and after the turns of user and assistant; None if they cannot be found."""
    turns = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}]
    text = chat.render(tokenizer, turns, None, "an exchange of two turns")
    before, user, rest = text.partition(_USER)
    between, assistant, after = rest.partition(_ASSISTANT)
    if not user or not assistant or _USER in rest or _ASSISTANT in after:
        return None
    encode = tokenizing.Encoder(tokenizer, special=False)
    encoded = [list(encode(part)) if part else [] for part in (before, between, after)]
    return (encoded[0], encoded[1], encoded[2]) if encoded[0] and encoded[1] else None


class WrittenRow:
    """State of one row: its random numbers, and the tokens of the script that come next."""

    def __init__(self, script: Script, seed: int, number: int) -> None:
        self._script, self._random = script, random.Random(f"{seed} {number}")
        self._given: deque[int] = deque()
        self._user = bool(script.reply)  # whose turn it is

    def opening(self, vocabulary: int) -> list[int]:
        """Return the first tokens."""
        return list(self._script.opening) or [self._random.randrange(vocabulary)]

    def number(self) -> float:
        """Return the number from 0 to below 1 that draws the next token; any where that token is given."""
        return 0.0 if self._given else self._random.random()

    def token(self, drawn: int) -> int:
        """Return the next token: the one drawn, or one of the script in its place."""
        if not self._given:
            if drawn not in self._script.ends:
                return drawn
            if self._user:
                self._given.extend(self._script.reply)
            else:
                self._given.extend([*(self._script.closing or [drawn]), *self._script.again])
            self._user = bool(self._script.reply) and not self._user
        return self._given.popleft()


def draw_tokens(scores: Tensor, numbers: Sequence[float]) -> list[int]:
    """Draw a token for every row by the inverse of its distribution at temperature 1.

    Parameters
    ----------
    scores : Tensor of shape (rows, vocabulary)
        Logits.
    numbers : sequence of float
        A number from 0 to below 1 for each row.
    """
    reached = scores.double().softmax(dim=-1).cumsum(dim=-1)
    wanted = torch.tensor(numbers, dtype=torch.float64, device=scores.device)[:, None] * reached[:, -1:]
    drawn = torch.searchsorted(reached, wanted, right=True)[:, 0]
    return [int(token) for token in drawn.clamp(max=scores.shape[1] - 1).tolist()]


@dataclass(frozen=True, kw_only=True, eq=False)
class Writer:
    """The model as the writer of calibration samples.

    Attributes
    ----------
    model : Model
    tokenizer : ScriptTokenizer
        Its tokenizer.
    seqlen : int
        Tokens of a row.
    seed : int
    machine : Machine
    notify : callable
        Called with one-line notes on the progress.
    directory : Path, optional
        Directory for the rows written so far; by default they are not kept.
    """

    model: Model
    tokenizer: ScriptTokenizer
    seqlen: int
    seed: int
    notify: Notify
    machine: Machine = field(default_factory=Machine)
    directory: Path | None = None

    def write(self, samples: int, held_out: int) -> Drawn:
        """Let the model write samples, and rows that are held out.

        Raises
        ------
        UsageError
            The samples are too short for the opening of the chat template.
        BesaError
            The model does not fit in memory, or its scores are NaN.
        """
        rows = list(self._batches(samples + held_out))
        compute.give_back_memory()  # of the model, which is no longer needed
        tokens = torch.cat(rows)
        source: manifests.SourceRecord = {
            "asked": corpora.SELF,
            "source": "model",
            "file": self._name,
            "sha256": hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest(),
            "rows": len(tokens),
            "device": self._device.type,
            "dtype": compute.name_of(self._dtype),
        }
        if self.model.revision is not None:
            source["revision"] = self.model.revision
        if self.tokenizer.chat_template:
            source["chat_template"] = chat.digest(self.tokenizer)
        written = [array("q", row) for row in tokens.tolist()]
        windows = sampling.Windows(tokens=written[:samples], documents=samples, held_out=written[samples:])
        return windows, {"sources": [source], "sampling": "written"}

    @property
    def _name(self) -> str:
        """Name of the model; of a path, the last part alone: the rest would reveal the user's directories."""
        is_path = self.model.kind in ("local", "gguf")
        return documents.printable(Path(self.model.name).name) if is_path else self.model.name

    @cached_property
    def _device(self) -> torch.device:
        return compute.device(self.machine.device)

    @cached_property
    def _dtype(self) -> torch.dtype:
        return compute.dtype(self.machine.dtype, self._device)

    @cached_property
    def _config(self) -> Any:
        return architecture.config_of(self.model.directory).get_text_config()

    def clear(self) -> None:
        """Remove the rows written so far: they are in a calibration set now."""
        if self.directory is None or not self.directory.is_dir():
            return
        for file in self.directory.iterdir():
            if _ROWS_FILE.fullmatch(file.name):
                file.unlink(missing_ok=True)
        with suppress(OSError):  # the directory holds something else
            self.directory.rmdir()

    def _batches(self, rows: int) -> Iterator[Tensor]:
        """Yield the token ids of all rows, some at a time."""
        together = max(1, min(_ROWS, _CACHE // max(1, self._row_bytes())))
        loaded, key = None, self._key(together)
        for first in range(0, rows, together):
            numbers = range(first, min(first + together, rows))
            kept = None if self.directory is None else self.directory / f"{key}-{first:06d}-{len(numbers)}.safetensors"
            stored = {} if kept is None else sealed.read(kept, f"delete {kept}: the model writes it again")
            if not stored:
                loaded = loaded or self._load(together)
                stored = {"tokens": self._write_rows(*loaded, numbers)}
                if kept is not None:
                    sealed.write(kept, stored)
                self.notify(f"{self.model.name} has written {numbers.stop} of {rows} samples")
            yield stored["tokens"]

    def _key(self, together: int) -> str:
        """Return a name for all that determines the rows."""
        files = sorted(self.model.directory.glob("*.safetensors"))
        facts = {
            "model": [self.model.name, self.model.revision],
            "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
            "tokenizer": [tokenizer_digest(self.model.directory), chat.digest(self.tokenizer)],
            "samples": [self.seed, self.seqlen, together],
            "machine": [self._device.type, compute.name_of(self._dtype)],
            "versions": [version("torch"), version("transformers")],
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def _row_bytes(self) -> int:
        """Estimate the bytes of the keys and values of one row."""
        config = self._config
        heads = getattr(config, "num_attention_heads", None) or 1
        shared = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or math.ceil(getattr(config, "hidden_size", 1) / heads)
        layers = getattr(config, "num_hidden_layers", None) or 1
        return int(2 * layers * shared * size * self.seqlen * self._dtype.itemsize)

    def _load(self, together: int) -> tuple[Any, Script]:
        """Load the whole model, after checking that it fits in memory, and return it with its script."""
        from transformers.utils import logging

        source = weights.Weights(self.model.directory)
        count = sum(math.prod(shape) for shape in source.shapes(list(source.names)).values())
        scores = together * int(self._config.vocab_size) * 24  # logits in fp32, distribution in fp64, both twice
        needed = count * self._dtype.itemsize + 2 * together * self._row_bytes() + scores  # old and new keys and values
        free = memory.available(self._device)
        if self.machine.max_memory is not None:
            free = min(free, self.machine.max_memory - compute.resident())
        if needed > free:
            raise BesaError(
                f"--data {corpora.SELF} needs {needed / 1e9:.1f} GB of memory for the whole model, "
                f"{max(0, free) / 1e9:.1f} GB are free",
                "give text with --data, or use a machine with more memory",
            )
        self.notify(
            f"{self.model.name} writes its calibration samples ({self._device.type}, {compute.name_of(self._dtype)})"
        )
        logging.disable_progress_bar()
        stock: Any = architecture.load_stock(self.model.directory, self._dtype)
        ends = stock.generation_config.eos_token_id
        given = ends if isinstance(ends, list) else [] if ends is None else [ends]
        return stock.to(self._device).eval(), script_of(self.tokenizer, given)

    def _write_rows(self, stock: Any, script: Script, numbers: range) -> Tensor:
        """Return the token ids of some rows, of shape (rows, seqlen)."""
        from transformers import GenerationConfig

        rows = [WrittenRow(script, self.seed, number) for number in numbers]
        begin = torch.tensor([row.opening(self._config.vocab_size) for row in rows], device=self._device)
        if begin.shape[1] >= self.seqlen:
            raise UsageError(
                f"--seqlen {self.seqlen} is too short for --data {corpora.SELF}: the opening of the chat template has "
                f"{begin.shape[1]} tokens",
                f"give {2 * begin.shape[1]} or more",
            )

        def choose(ids: Tensor, scores: Tensor) -> Tensor:
            if bool(scores.isnan().any()):
                raise overflow(f"{self.model.name} gives NaN scores for the next token", self._dtype)
            drawn = draw_tokens(scores, [row.number() for row in rows])
            tokens = [row.token(token) for row, token in zip(rows, drawn, strict=True)]
            chosen = torch.full_like(scores, -math.inf)
            return chosen.scatter_(1, torch.tensor(tokens, device=scores.device)[:, None], 0.0)

        config: Any = GenerationConfig
        settings = config(max_new_tokens=self.seqlen - begin.shape[1], do_sample=False, num_beams=1, pad_token_id=0)
        stock.generation_config = settings
        with torch.no_grad():
            written = stock.generate(
                input_ids=begin,
                attention_mask=torch.ones_like(begin),
                logits_processor=[choose],
                trust_remote_code=False,
            )
        return torch.as_tensor(written, dtype=torch.int64).cpu()
