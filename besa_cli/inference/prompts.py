"""Prompts as token ids: plain text or a conversation, checked before the model is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from besa_cli.decoder import architecture
from besa_cli.errors import BesaError, UsageError, reading

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Message = dict[str, str]  # role (user or assistant) and content, as chat templates take them

_LONGEST = 32_768  # maximum tokens of prompt and continuation for models without a limit of their own
_OTHER_WORDS = "give other words, or fetch the tokenizer again"


def encode_text(directory: Path, tokenizer: "PreTrainedTokenizerBase", prompt: str) -> "BatchEncoding":
    """Tokenize a text as it is.

    Raises
    ------
    UsageError
        The prompt is not valid UTF-8, or has no tokens.
    BesaError
        The tokenizer yields ids beyond the model's vocabulary.
    """
    _require_utf8(prompt)
    with reading(f"PROMPT with the tokenizer in {directory}", _OTHER_WORDS):
        inputs: BatchEncoding = tokenizer(prompt, return_tensors="pt", verbose=False)
    return _checked(directory, inputs)


def encode_chat(directory: Path, tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> "BatchEncoding":
    """Tokenize a conversation by the model's chat template, up to where the model's answer begins.

    Raises
    ------
    UsageError
        A message is not valid UTF-8, or the last one is empty.
    BesaError
        The template refuses the conversation, or the tokenizer yields ids beyond the model's vocabulary.
    """
    for message in messages:
        _require_utf8(message["content"])
    if not messages[-1]["content"].strip():
        raise _empty()
    with reading(f"PROMPT with the chat template in {directory}", "give --raw, which leaves the template out"):
        encode: Any = tokenizer.apply_chat_template  # its result depends on the arguments
        inputs: BatchEncoding = encode(
            list(messages),
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            tokenizer_kwargs={"verbose": False},
        )
    return _checked(directory, inputs)


def room(directory: Path, inputs: "BatchEncoding") -> int:
    """Return the number of tokens that the model can add to a prompt; negative if the prompt itself is too long."""
    return _longest(directory) - int(inputs["input_ids"].shape[1])


def require_room(directory: Path, inputs: "BatchEncoding", tokens: int, option: str) -> None:
    """Check that `tokens` more tokens, asked for by `option`, fit into the model's context.

    Raises
    ------
    UsageError
        They do not.
    """
    length, left = inputs["input_ids"].shape[1], room(directory, inputs)
    if tokens > left:
        raise UsageError(
            f"PROMPT has {length} tokens, with {option} {tokens} more than the {_longest(directory)} "
            f"that {directory} supports",
            f"give {option} {left} or less" if left > 0 else "give a shorter prompt",
        )


def require_known(ids: "Tensor", vocabulary: int) -> None:
    """Check that all token ids are below `vocabulary`, the size of the model's vocabulary.

    Raises
    ------
    BesaError
        A token id is too large.
    """
    if ids.numel() and int(ids.max()) >= vocabulary:
        raise BesaError(
            f"the tokenizer yields token id {int(ids.max())}, outside the model's vocabulary of {vocabulary}",
            "the tokenizer in the model's directory belongs to another model",
        )


def _longest(directory: Path) -> int:
    return architecture.maximum_length(architecture.config_of(directory)) or _LONGEST


def _require_utf8(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"PROMPT is not valid UTF-8 from character {error.start + 1} on", "give text encoded in UTF-8"
        ) from error


def _empty() -> UsageError:
    return UsageError("PROMPT is empty: there is nothing to continue", "give a few words")


def _checked(directory: Path, inputs: "BatchEncoding") -> "BatchEncoding":
    """Return the inputs after checking that there are tokens and that the model knows them."""
    ids = inputs["input_ids"]
    if not ids.numel():
        raise _empty()
    require_known(ids, architecture.config_of(directory).get_text_config().vocab_size)
    return inputs
