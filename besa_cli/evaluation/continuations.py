"""What a model says next: the prompt, checked before anything is loaded, and its greedy continuation."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from besa_cli.decoder import architecture
from besa_cli.decoder.conduct import overflow
from besa_cli.errors import UsageError, reading
from besa_cli.evaluation.measurement import require_known

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

_LONGEST = 32_768  # tokens of a prompt and its continuation, where the model sets no limit of its own


def prompted(directory: Path, tokenizer: "PreTrainedTokenizerBase", prompt: str, tokens: int) -> "BatchEncoding":
    """A prompt as the model is given it, with room for `tokens` more.

    Raises
    ------
    UsageError
        The prompt is not UTF-8 or has no tokens, or the model does not take so many.
    BesaError
        The tokenizer gives ids that the model does not know.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"PROMPT is not UTF-8 from its character {error.start + 1} on", "give text in the encoding UTF-8"
        ) from error
    config = architecture.config_of(directory)
    with reading(f"PROMPT with the tokenizer in {directory}", "give other words, or fetch the tokenizer again"):
        inputs: BatchEncoding = tokenizer(prompt, return_tensors="pt", verbose=False)
    ids = inputs["input_ids"]
    if not ids.numel():
        raise UsageError("PROMPT is empty: there is nothing to go on from", "give a few words")
    require_known(ids, config.get_text_config().vocab_size)
    longest = architecture.maximum_length(config) or _LONGEST
    if ids.shape[1] + tokens > longest:
        raise UsageError(
            f"PROMPT has {ids.shape[1]} tokens, with --tokens {tokens} more than the {longest} that {directory} takes",
            f"give --tokens {longest - ids.shape[1]} or less" if ids.shape[1] < longest else "give a shorter prompt",
        )
    return inputs


def continuation(
    directory: Path,
    tokenizer: "PreTrainedTokenizerBase",
    inputs: "BatchEncoding",
    tokens: int,
    dtype: torch.dtype,
    on_token: Callable[[int], None] = lambda done: None,
) -> str:
    """What the model most likely says next: greedy, `tokens` tokens at most, without the prompt.

    Whatever the checkpoint's ``generation_config.json`` asks for (beams, penalties, sampling), only the tokens that end
    a text are taken from it.

    Parameters
    ----------
    inputs : BatchEncoding
        As from `prompted`.
    on_token : function of the tokens chosen so far

    Raises
    ------
    BesaError
        The model gives NaN.
    """
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = architecture.whole(directory, dtype)
    prompt = inputs["input_ids"].shape[1]

    def watch(ids: Tensor, scores: Tensor) -> Tensor:
        if bool(scores.isnan().any()):
            raise overflow(f"{directory} gives the next token scores that are NaN", dtype)
        on_token(ids.shape[1] - prompt)
        return scores

    config: Any = GenerationConfig
    model.generation_config = config(  # what is not said here would be taken from the model's own
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    with torch.no_grad():
        output = model.generate(**inputs, logits_processor=[watch], trust_remote_code=False)
    return str(tokenizer.decode(output[0, prompt:], skip_special_tokens=True))
