"""Streamed model for lm-eval: log-likelihoods computed block by block, with each block loaded once for all requests."""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, resolve_max_length
from torch import Tensor

from besa_cli.decoder import architecture
from besa_cli.decoder.conduct import require_logits
from besa_cli.decoder.decoder import Decoder
from besa_cli.errors import BesaError
from besa_cli.evaluation.zeroshot.watching import Progress, no_progress
from besa_cli.stream import propagation
from besa_cli.system import memory

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Scored = tuple[float, bool]
_Request = tuple[tuple[str, str] | None, list[int], list[int]]  # text, tokens of the context and of the continuation
_Input = tuple[int, ...]  # input tokens of a request: context and continuation without the last token
_Requests = dict[_Input, list[tuple[int, list[int]]]]  # numbers and continuations of the requests with the same input
_Shape = tuple[int, int]  # rows, tokens

# Without a batch size: tokens of a batch, tokens that pass the head together, and the unit to which lengths are rounded
_TOKENS, _HEAD_TOKENS, _STEP = 4096, 512, 16


class StreamedLM(TemplateLM):  # type: ignore[misc]
    """Model class for lm-eval that holds one block of a checkpoint in memory at a time.

    Requests are tokenized, truncated, sorted, padded and scored as in lm-eval's own class for transformers models. With
    a batch size the batches are the same, too, and so are the numbers. All inputs of a pass go through a block before
    the next one is loaded; inputs whose hidden states do not fit into memory are left for another pass.

    Parameters
    ----------
    directory : Path
        Directory of the checkpoint.
    tokenizer : PreTrainedTokenizerBase
    device, dtype : torch.device, torch.dtype
    batch_size : int, optional
        Inputs in a batch; by default a batch has about 4,096 tokens, which gives slightly different rounding.
    room : int, optional
        Bytes for hidden states; by default a third of the free memory when requests arrive.
    progress : Progress
        Progress display, with one step per loaded block.
    """

    def __init__(
        self,
        directory: Path,
        tokenizer: "PreTrainedTokenizerBase",
        device: torch.device,
        dtype: torch.dtype,
        *,
        batch_size: int | None = None,
        room: int | None = None,
        progress: Progress = no_progress,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._directory, self._device, self._dtype = directory, device, dtype
        self._rows, self._room, self._progress = batch_size, room, progress
        config = architecture.config_of(directory)
        self.max_length: int = resolve_max_length(config, tokenizer)
        self._token_bytes = int(config.get_text_config().hidden_size) * dtype.itemsize

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Token used as an empty context: BOS, or the end-of-text token if there is no BOS."""
        bos = self.tokenizer.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Tokenize a string; no BOS is added to a string that already begins with it."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def generate_until(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Reject tasks that generate text, because every new token would load all blocks again.

        Raises
        ------
        BesaError
            Always.
        """
        raise BesaError(
            f"{requests[0].task_name} generates text, which requires the whole model in memory",
            "give --in-memory, or leave the task out",
        )

    def loglikelihood(self, requests: "Sequence[Instance]", disable_tqdm: bool = True) -> list[Scored]:
        """Return (log-likelihood of the continuation, True if greedy decoding gives it) for each request."""
        scored: list[Scored] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def loglikelihood_rolling(self, requests: "Sequence[Instance]", disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each whole text, split into windows so that each token is predicted once."""
        owners: list[int] = []
        windows: list[_Request] = []
        for number, request in enumerate(requests):
            pieces = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for piece in pieces:
                owners.append(number)
                windows.append((None, *utils.make_disjoint_window(piece)))
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[_Request], **_: object) -> list[Scored]:
        by_input: _Requests = defaultdict(list)
        for number, (_text, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise BesaError(
                    f"a continuation has {len(continuation)} tokens, {self._directory} supports {self.max_length}",
                    "leave the task out",
                )
            by_input[tuple((context + continuation)[:-1])].append((number, continuation))
        too_long = sum(len(tokens) > self.max_length for tokens in by_input)
        if too_long:
            logger.warning("%d questions exceed the model's maximum length (%d)", too_long, self.max_length)
        scores: dict[int, Scored] = {}
        decoder = Decoder(self._directory, self._device, self._dtype)
        for note in decoder.notes:
            logger.warning("%s", note)
        passes = self._passes(self._batches(by_input))
        with self._progress(len(passes) * len(decoder)) as advance:
            for turn, batches in enumerate(passes):
                groups = [_InputGroup(decoder, shape, inputs, self._rows) for shape, inputs in batches.items()]
                for index in range(len(decoder)):
                    start = time.perf_counter()
                    decoder.load(index)
                    for group in groups:
                        group.advance(index)
                    decoder.drop(index)
                    advance(turn * len(decoder) + index, time.perf_counter() - start)
                for group in groups:
                    scores.update(group.scores(by_input))
        return [scores[number] for number in range(len(requests))]

    def _batches(self, inputs: Iterable[_Input]) -> Iterator[tuple[_Shape, list[_Input]]]:
        """Yield batches of the inputs, longest first, with the padded shape of each."""
        ordered = sorted(inputs, key=lambda tokens: (-len(tokens), tokens))
        start = 0
        while start < len(ordered):
            length = len(ordered[start])
            if self._rows is None:  # limit the number of shapes, because the model's arguments are cached for each
                length = -(-length // _STEP) * _STEP
            length = min(length, self.max_length)
            batch = ordered[start : start + (self._rows or max(1, _TOKENS // length))]
            start += len(batch)
            yield (len(batch), length), batch

    def _passes(self, batches: Iterable[tuple[_Shape, list[_Input]]]) -> list[dict[_Shape, list[_Input]]]:
        """Assign batches to passes whose hidden states fit into memory, grouping batches of equal shape."""
        room = self._room if self._room is not None else memory.available(self._device) // 3
        passes: list[dict[_Shape, list[_Input]]] = []
        left = 0
        for shape, batch in batches:
            needed = math.prod(shape) * self._token_bytes
            if not passes or needed > left:
                passes.append(defaultdict(list))
                left = room
            passes[-1][shape] += batch
            left -= needed
        return passes


class _InputGroup:
    """Inputs of one pass whose batches have the same shape, with their hidden states."""

    def __init__(self, decoder: Decoder, shape: _Shape, inputs: Sequence[_Input], rows: int | None) -> None:
        self._decoder, self._inputs = decoder, inputs
        self._batch, length = shape
        self._head_batch = self._batch if rows else max(1, _HEAD_TOKENS // length)
        truncated = [tokens[-length:] for tokens in inputs]  # on the left, if too long for the model
        self._lengths = [len(tokens) for tokens in truncated]
        self._tokens = torch.tensor([[*tokens, *[0] * (length - len(tokens))] for tokens in truncated])
        self._hidden = propagation.embed(decoder, self._tokens, self._batch)

    def advance(self, index: int) -> None:
        """Propagate the hidden states through the loaded block `index`."""
        propagation.advance(self._decoder, index, self._hidden, self._tokens, self._batch)

    def scores(self, requests: _Requests) -> dict[int, Scored]:
        """Return the score of every request with one of these inputs, by the request's number."""
        scores: dict[int, Scored] = {}
        for part in self._head_parts():
            logits = self._decoder.finish(self._hidden[part], self._tokens[part])
            require_logits(logits, str(self._decoder.weights.directory))
            log_probabilities = torch.log_softmax(logits, dim=-1)  # in the model's dtype, as in lm-eval
            for row, number in enumerate(range(part.start, part.stop)):
                for request, continuation in requests[self._inputs[number]]:
                    stop = self._lengths[number]
                    scores[request] = _score(log_probabilities[row, stop - len(continuation) : stop], continuation)
        return scores

    def _head_parts(self) -> Iterator[slice]:
        """Yield the parts of each batch that go through the head together; no part spans two batches."""
        for batch in propagation.batches(len(self._inputs), self._batch):
            for part in propagation.batches(batch.stop - batch.start, self._head_batch):
                yield slice(batch.start + part.start, batch.start + part.stop)


def _score(log_probabilities: Tensor, continuation: Sequence[int]) -> Scored:
    """Return the summed log-probability of the continuation, and True if each of its tokens is the most likely one.

    Parameters
    ----------
    log_probabilities : Tensor of shape (tokens of the continuation, vocabulary)
    """
    targets = torch.tensor(continuation, device=log_probabilities.device)
    chosen = log_probabilities.gather(1, targets[:, None])[:, 0]
    return float(chosen.sum()), bool((log_probabilities.argmax(dim=-1) == targets).all())
