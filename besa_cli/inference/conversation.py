"""Conversations with a model: the turns so far, and the answer to the next one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from besa_cli.inference import generating, loading, prompts
from besa_cli.inference.generating import Generated, Sampling

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase


class Conversation:
    """A conversation by the model's chat template or, without one, a text that both sides continue.

    Parameters
    ----------
    directory : Path
        Directory of the model.
    tokenizer : PreTrainedTokenizerBase
    sampling : Sampling
        Choice of the tokens of every answer.
    fixed : bool
        Refuse a turn after which the model has less room than `sampling.tokens`; else its answer is shorter.
    raw : bool
        Leave the chat template out.
    """

    def __init__(
        self,
        directory: Path,
        tokenizer: "PreTrainedTokenizerBase",
        sampling: Sampling,
        *,
        fixed: bool = True,
        raw: bool = False,
    ) -> None:
        self._directory, self._tokenizer, self._sampling, self._fixed = directory, tokenizer, sampling, fixed
        self._raw = raw or tokenizer.chat_template is None
        self._messages: list[prompts.Message] = []
        self._text = ""  # of all turns and answers, in place of messages
        self._model: PreTrainedModel | None = None

    def load(self, dtype: torch.dtype, device: torch.device) -> None:
        """Load the model; the files of a sparse export are compared with their digests.

        Raises
        ------
        BesaError
            The model is not supported, or a file is damaged.
        """
        self._model = loading.load(self._directory, dtype, device)

    def encode(self, turn: str) -> "tuple[BatchEncoding, int]":
        """Return the tokens of the conversation with one more turn, and the most tokens of its answer.

        Raises
        ------
        BesaError
            The turn is empty or not valid UTF-8, or the conversation is too long for the model.
        """
        if self._raw:
            inputs = prompts.encode_text(self._directory, self._tokenizer, self._text + turn)
        else:
            messages = [*self._messages, {"role": "user", "content": turn}]
            inputs = prompts.encode_chat(self._directory, self._tokenizer, messages)
        left, tokens = prompts.room(self._directory, inputs), self._sampling.tokens
        if not self._fixed:
            tokens = max(min(tokens, left), 1)
        prompts.require_room(self._directory, inputs, tokens, "--max-tokens")
        return inputs, tokens

    def answer(self, turn: str, on_text: Callable[[str], None] = lambda text: None) -> Generated:
        """Return the model's answer to a turn, and keep both for the next one; `load` comes first.

        Parameters
        ----------
        turn : str
        on_text : function of a piece of the answer
            Called with whole words as soon as they are certain.

        Raises
        ------
        BesaError
            `encode` refuses the turn, or the model's scores are NaN.
        """
        assert self._model is not None
        inputs, tokens = self.encode(turn)
        sampling = replace(self._sampling, tokens=tokens)
        answer = generating.generate(self._model, self._tokenizer, inputs, sampling, on_text=on_text)
        self._messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer.text}]
        self._text = f"{answer.transcript}\n"
        return answer
