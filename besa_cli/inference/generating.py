"""Generation of text by transformers' own `generate`, streamed and timed."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer
from typing_extensions import override

from besa_cli.decoder.conduct import overflow

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Choice of the tokens.

    Attributes
    ----------
    tokens : int
        Maximum number of tokens to generate.
    temperature : float
        Divisor of the scores before a token is drawn; 0: the most likely token, always.
    seed : int
        Seed of the draws.
    """

    tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Continuation of one prompt.

    Attributes
    ----------
    text : str
        Text without special tokens.
    transcript : str
        Prompt and text, without special tokens.
    prompt_tokens, tokens : int
        Number of tokens of the prompt, and of the continuation with its end token.
    prompt_seconds : float
        Seconds until the first token of the continuation.
    seconds : float
        Seconds from the first token of the continuation to its last.
    ended : bool
        True if the model ended the text; False if the maximum number of tokens did.
    """

    text: str
    transcript: str
    prompt_tokens: int
    tokens: int
    prompt_seconds: float
    seconds: float
    ended: bool


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens of one or several continuations, and the rates at which they were computed.

    Attributes
    ----------
    prompt_tokens, tokens : int
        Number of tokens of the prompts and of the continuations.
    prompt_rate : float, optional
        Tokens of the prompts per second; None if the clock shows no time.
    rate : float, optional
        Tokens after the first of each continuation, which belongs to the prompt, per second; None if there are none.
    """

    prompt_tokens: int
    tokens: int
    prompt_rate: float | None
    rate: float | None


def speed(continuations: Sequence[Generated]) -> Speed:
    """Sum tokens and seconds of continuations."""
    prompts, tokens = sum(each.prompt_tokens for each in continuations), sum(each.tokens for each in continuations)
    prompt_seconds, seconds = (
        math.fsum(each.prompt_seconds for each in continuations),
        math.fsum(each.seconds for each in continuations),
    )
    later = tokens - len(continuations)
    return Speed(
        prompt_tokens=prompts,
        tokens=tokens,
        prompt_rate=prompts / prompt_seconds if prompt_seconds > 0 else None,
        rate=later / seconds if later and seconds > 0 else None,
    )


class _TimedStream(TextStreamer):
    """Stream of a continuation's words to a function, and the times at which its tokens came."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        on_text: Callable[[str], None],
        on_token: Callable[[int], None],
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text, self._on_token = on_text, on_token
        self.times: list[float] = []

    @override
    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())  # of the prompt first
        super().put(value)  # type: ignore[no-untyped-call]
        if len(self.times) > 1:
            self._on_token(len(self.times) - 1)

    @override
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    inputs: "BatchEncoding",
    sampling: Sampling,
    *,
    on_text: Callable[[str], None] = lambda text: None,
    on_token: Callable[[int], None] = lambda done: None,
) -> Generated:
    """Continue a prompt until the model ends the text, or for `sampling.tokens` tokens.

    Of the checkpoint's ``generation_config.json`` only the end-of-text tokens are used; beams, penalties and sampling
    are ignored.

    Parameters
    ----------
    inputs : BatchEncoding
        One prompt, from `besa_cli.inference.prompts`.
    on_text : function of a piece of the text
        Called with whole words as soon as they are certain.
    on_token : function of the number of tokens generated so far

    Raises
    ------
    BesaError
        The model's scores are NaN.
    """

    def refuse_nan(ids: Tensor, scores: Tensor) -> Tensor:
        if bool(scores.isnan().any()):
            raise overflow(f"{model.name_or_path} gives NaN scores for the next token", model.dtype)
        return scores

    ends = end_tokens(model, tokenizer)
    model.generation_config = _configuration(sampling, ends, tokenizer)
    stream = _TimedStream(tokenizer, on_text, on_token)
    torch.manual_seed(sampling.seed)
    run: Any = model.generate
    with torch.no_grad():
        output = run(**inputs.to(model.device), streamer=stream, logits_processor=[refuse_nan], trust_remote_code=False)
    length = int(inputs["input_ids"].shape[1])
    new = output[0, length:].tolist()
    return Generated(
        text=str(tokenizer.decode(new, skip_special_tokens=True)),
        transcript=str(tokenizer.decode(output[0], skip_special_tokens=True)),
        prompt_tokens=length,
        tokens=len(new),
        prompt_seconds=stream.times[1] - stream.times[0],
        seconds=stream.times[-1] - stream.times[1],
        ended=new[-1] in ends,
    )


def end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the tokens that end a text: those of the checkpoint's generation settings and of its tokenizer."""
    named: Any = (model.generation_config or model.config).eos_token_id
    ids = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return sorted({token for token in ids if isinstance(token, int)})


def _configuration(sampling: Sampling, ends: list[int], tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Return all settings of `generate`; settings not given here would come from the model's own configuration."""
    config: Any = GenerationConfig
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    return config(
        max_new_tokens=sampling.tokens,
        num_beams=1,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.eos_token_id,
        **(drawn if sampling.temperature else {"do_sample": False}),
    )
