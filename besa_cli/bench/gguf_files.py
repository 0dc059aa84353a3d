"""Bytes of a GGUF file that llama.cpp reads to generate a token."""

from pathlib import Path

from besa_cli.models.gguf import file_header

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_EXPERTS = "_exps."


def weights_read(path: Path) -> int | None:
    """Return the bytes of all tensors but an embedding that is not the head, too; None for mixtures of experts.

    Raises
    ------
    BesaError
        The file is damaged.
    """
    tensors = file_header.read(path).tensors
    if any(_EXPERTS in name for name in tensors):
        return None
    left_out = {_EMBEDDING} if _HEAD in tensors else set()
    return sum(tensor.size for name, tensor in tensors.items() if name not in left_out)
