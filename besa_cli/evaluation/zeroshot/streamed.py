"""Log-likelihoods for lm-eval from the block stream: each block is loaded once for all requests, not once for each."""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, resolve_max_length
from torch import Tensor

from besa_cli.decoder import architecture
from besa_cli.decoder.conduct import require_logits
from besa_cli.decoder.decoder import Decoder
from besa_cli.errors import BesaError
from besa_cli.evaluation.zeroshot import memory
from besa_cli.evaluation.zeroshot.watching import Progress, unwatched
from besa_cli.stream import propagation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Scored = tuple[float, bool]
_Request = tuple[tuple[str, str] | None, list[int], list[int]]  # text, tokens of the context, of the continuation
_Input = tuple[int, ...]  # the tokens that a model is given: all of a request's but the last
_Asked = dict[_Input, list[tuple[int, list[int]]]]  # numbers and continuations of the requests with this input
_Shape = tuple[int, int]  # rows, tokens

_TOKENS, _HEAD_TOKENS, _STEP = 4096, 512, 16  # for batches of no given size: tokens, those with logits, a length's unit


class StreamedLM(TemplateLM):  # type: ignore[misc]
    """A checkpoint as lm-eval sees a model, of which one block is in memory at a time.

    Requests are tokenized, cut, sorted, padded and scored as the harness's own class for transformers models does it,
    and with a batch size in the same batches: the model then computes the very same numbers. All inputs of a pass go
    through a block before the next one is loaded; those whose hidden states there is no room for wait for another pass.

    Parameters
    ----------
    directory : Path
        The checkpoint.
    tokenizer : PreTrainedTokenizerBase
    device, dtype : torch.device, torch.dtype
    batch_size : int, optional
        Inputs in a batch; by default as many as have about 4,096 tokens together, which rounds a little differently.
    room : int, optional
        Bytes for hidden states; by default a third of the memory that is available when requests come.
    progress : callable
        Given the number of blocks to load, a context that is told each.
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
        progress: Progress = unwatched,
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
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        begin = self.tokenizer.bos_token_id
        return int(begin) if begin is not None else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids; a string that begins with the BOS already gets no other."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **chosen)
        return ids

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Refused: each new token would load every block again.

        Raises
        ------
        BesaError
        """
        raise BesaError(
            f"{requests[0].task_name} lets the model write text, which needs the whole model in memory",
            "give --in-memory, or leave the task out",
        )

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Scored]:
        """(log-likelihood of the continuation, whether it is the most likely one token by token) of each request."""
        scored: list[Scored] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each whole text, in windows of which every token is predicted once."""
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
        asked: _Asked = defaultdict(list)
        for number, (_text, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise BesaError(
                    f"a continuation has {len(continuation)} tokens, {self._directory} takes {self.max_length}",
                    "leave the task out",
                )
            asked[tuple((context + continuation)[:-1])].append((number, continuation))
        too_long = sum(len(each) > self.max_length for each in asked)
        if too_long:
            logger.warning("%d questions exceed the model's maximum length (%d)", too_long, self.max_length)
        found: dict[int, Scored] = {}
        decoder = Decoder(self._directory, self._device, self._dtype)
        for note in decoder.notes:
            logger.warning("%s", note)
        passes = self._passes(self._batches(asked))
        with self._progress(len(passes) * len(decoder)) as advance:
            for turn, batches in enumerate(passes):
                inputs = [_Inputs(decoder, shape, group, self._rows) for shape, group in batches.items()]
                for index in range(len(decoder)):
                    start = time.perf_counter()
                    decoder.load(index)
                    for each in inputs:
                        each.advance(index)
                    decoder.drop(index)
                    advance(turn * len(decoder) + index, time.perf_counter() - start)
                for each in inputs:
                    found.update(each.scores(asked))
        return [found[number] for number in range(len(requests))]

    def _batches(self, inputs: Iterable[_Input]) -> Iterator[tuple[_Shape, list[_Input]]]:
        """The inputs in batches, longest first, each with its padded shape."""
        ordered = sorted(inputs, key=lambda each: (-len(each), each))
        start = 0
        while start < len(ordered):
            length = len(ordered[start])
            if self._rows is None:  # few different shapes: the model's arguments for each are kept
                length = -(-length // _STEP) * _STEP
            length = min(length, self.max_length)
            batch = ordered[start : start + (self._rows or max(1, _TOKENS // length))]
            start += len(batch)
            yield (len(batch), length), batch

    def _passes(self, batches: Iterable[tuple[_Shape, list[_Input]]]) -> list[dict[_Shape, list[_Input]]]:
        """Batches of equal shape together, in portions whose hidden states there is room for."""
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


class _Inputs:
    """Inputs of one pass in batches of one shape, with their hidden states."""

    def __init__(self, decoder: Decoder, shape: _Shape, inputs: Sequence[_Input], rows: int | None) -> None:
        self._decoder, self._inputs = decoder, inputs
        self._batch, length = shape
        self._head_batch = self._batch if rows else max(1, _HEAD_TOKENS // length)
        cut = [each[-length:] for each in inputs]  # too long for the model: from the left
        self._lengths = [len(each) for each in cut]
        self._tokens = torch.tensor([[*each, *[0] * (length - len(each))] for each in cut])
        self._hidden = propagation.embed(decoder, self._tokens, self._batch)

    def advance(self, index: int) -> None:
        """Pass them through the loaded block `index`."""
        propagation.advance(self._decoder, index, self._hidden, self._tokens, self._batch)

    def scores(self, asked: _Asked) -> dict[int, Scored]:
        """The score of every request with one of these inputs, by the request's number."""
        found: dict[int, Scored] = {}
        for part in self._head_parts():
            logits = self._decoder.finish(self._hidden[part], self._tokens[part])
            require_logits(logits, str(self._decoder.weights.directory))
            likely = torch.log_softmax(logits, dim=-1)  # in the model's dtype, as the harness does
            for row, number in enumerate(range(part.start, part.stop)):
                for request, continuation in asked[self._inputs[number]]:
                    stop = self._lengths[number]
                    found[request] = _score(likely[row, stop - len(continuation) : stop], continuation)
        return found

    def _head_parts(self) -> Iterator[slice]:
        """The inputs of each batch in parts for the head, which no other batch shares, however many there are."""
        for whole in propagation.batches(len(self._inputs), self._batch):
            for part in propagation.batches(whole.stop - whole.start, self._head_batch):
                yield slice(whole.start + part.start, whole.start + part.stop)


def _score(likely: Tensor, continuation: Sequence[int]) -> Scored:
    """Summed log-probability of the continuation, and whether each of its tokens is the most likely one.

    Parameters
    ----------
    likely : Tensor of shape (tokens of the continuation, vocabulary)
        Log-probabilities.
    """
    targets = torch.tensor(continuation, device=likely.device)
    chosen = likely.gather(1, targets[:, None])[:, 0]
    return float(chosen.sum()), bool((likely.argmax(dim=-1) == targets).all())
