"""Greedy continuation of a prompt, which is checked before the model is loaded."""

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

_LONGEST = 32_768  # maximum tokens of prompt and continuation for models without a limit of their own


def encode_prompt(directory: Path, tokenizer: "PreTrainedTokenizerBase", prompt: str, tokens: int) -> "BatchEncoding":
    """Tokenize a prompt, checking that `tokens` more tokens fit into the model's context.

    Raises
    ------
    UsageError
        The prompt is not valid UTF-8, has no tokens, or is too long.
    BesaError
        The tokenizer yields ids beyond the model's vocabulary.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"PROMPT is not valid UTF-8 from character {error.start + 1} on", "give text encoded in UTF-8"
        ) from error
    config = architecture.config_of(directory)
    with reading(f"PROMPT with the tokenizer in {directory}", "give other words, or fetch the tokenizer again"):
        inputs: BatchEncoding = tokenizer(prompt, return_tensors="pt", verbose=False)
    ids = inputs["input_ids"]
    if not ids.numel():
        raise UsageError("PROMPT is empty: there is nothing to continue", "give a few words")
    require_known(ids, config.get_text_config().vocab_size)
    longest = architecture.maximum_length(config) or _LONGEST
    if ids.shape[1] + tokens > longest:
        raise UsageError(
            f"PROMPT has {ids.shape[1]} tokens, with --tokens {tokens} more than the {longest} "
            f"that {directory} supports",
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
    """Return the model's greedy continuation, of at most `tokens` tokens, without the prompt.

    Of the checkpoint's ``generation_config.json`` only the end-of-text tokens are used; beams, penalties and sampling
    are ignored.

    Parameters
    ----------
    inputs : BatchEncoding
        Prompt, from `encode_prompt`.
    on_token : function of the number of tokens generated so far

    Raises
    ------
    BesaError
        The model's scores are NaN.
    """
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = architecture.load_stock(directory, dtype)
    prompt = inputs["input_ids"].shape[1]

    def watch(ids: Tensor, scores: Tensor) -> Tensor:
        if bool(scores.isnan().any()):
            raise overflow(f"{directory} gives NaN scores for the next token", dtype)
        on_token(ids.shape[1] - prompt)
        return scores

    config: Any = GenerationConfig
    model.generation_config = config(  # settings not given here would come from the model's own configuration
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    with torch.no_grad():
        output = model.generate(**inputs, logits_processor=[watch], trust_remote_code=False)
    return str(tokenizer.decode(output[0, prompt:], skip_special_tokens=True))
