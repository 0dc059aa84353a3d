"""GGUF files: dequantized once into a clean checkpoint by transformers' own reader."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from besa_cli.disk import read_json, save_tensors, write_json
from besa_cli.errors import BesaError
from besa_cli.models import cache, gguf_header

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_NO_LIMIT = 10**9
_ELSEWISE = "try the same model in the safetensors format"


def directory(path: Path, *, notify: Callable[[str], None]) -> Path:
    """The checkpoint made from a GGUF file, converted when the file is used for the first time.

    Raises
    ------
    BesaError
        The file is not GGUF, is cut off, or holds an architecture that transformers cannot read from GGUF.
    """
    header = gguf_header.read(path)
    _refuse_unreadable(path, header.architecture)

    def make(target: Path) -> None:
        notify(f"converting {path} to a Hugging Face checkpoint (once)")
        convert(path, target)

    return cache.made_once(f"models/gguf2-{cache.digest(path)[:16]}", make, notify=notify)


def _refuse_unreadable(path: Path, architecture: str) -> None:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    if architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        known = ", ".join(sorted(set(GGUF_SUPPORTED_ARCHITECTURES)))
        raise BesaError(f"{path} holds a '{architecture}' model, which cannot be read from GGUF", f"supported: {known}")


def convert(source: Path, target: Path, *, max_length: int | None = None) -> None:
    """Write the model and tokenizer of a GGUF file into the directory `target` as a plain checkpoint.

    Quantized weights become bf16; a file of plain floats keeps its type.

    Parameters
    ----------
    source, target : Path
        The GGUF file; an existing directory.
    max_length : int, optional
        What the tokenizer states as the longest input; the model's own maximum if not given.
    """
    import torch

    header = gguf_header.read(source)
    dtype = getattr(torch, _dtype(set(header.types.values())))
    try:
        with _quiet():
            model, missing = _load(source, dtype)
            if "tokenizer.ggml.tokens" in header.fields:
                _save_tokenizer(source, target, max_length or getattr(model.config, "max_position_embeddings", None))
    except (ValueError, KeyError, IndexError, NotImplementedError, RuntimeError) as error:
        raise BesaError(f"{source} cannot be converted: {str(error).strip()[:200]}", _ELSEWISE) from error
    if missing:
        raise BesaError(f"{source} lacks {min(missing)}", _ELSEWISE)
    _save_model(model, target, dtype, source)


def _load(source: Path, dtype: "torch.dtype") -> "tuple[PreTrainedModel, set[str]]":
    """The model with dense weights, and the names of the weights that the file does not have."""
    import transformers

    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=dtype,
        local_files_only=True,
        output_loading_info=True,
    )
    model, report = loaded
    return model, set(report["missing_keys"]) - set(model.all_tied_weights_keys)


def _dtype(kinds: set[str]) -> str:
    if kinds == {"F32"}:
        return "float32"
    return "float16" if kinds <= {"F16", "F32"} else "bfloat16"


def _save_model(model: "PreTrainedModel", target: Path, dtype: "torch.dtype", source: Path) -> None:
    """Write weights and config by hand: transformers holds a model from GGUF for quantized and refuses to save it."""
    import torch

    tied = set(model.all_tied_weights_keys)
    weights = {
        name: value.to(dtype).contiguous() for name, value in sorted(model.state_dict().items()) if name not in tied
    }
    for name, value in weights.items():
        if not bool(torch.isfinite(value).all()):
            raise BesaError(f"{name} in {source} holds values that {dtype} cannot", "fetch the file again")
    save_tensors(target / "model.safetensors", weights)
    config = _short_floats(model.config.to_diff_dict()) | {"architectures": [type(model).__name__]}
    for key in ("_name_or_path", "_model_name_or_path", "quantization_config"):
        config.pop(key, None)
    write_json(target / "config.json", dict(sorted(config.items())) | {"dtype": str(dtype).removeprefix("torch.")})
    if model.generation_config is not None:
        model.generation_config.save_pretrained(target)


def _save_tokenizer(source: Path, target: Path, limit: int | None) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    tokenizer.save_pretrained(target)
    path = target / "tokenizer_config.json"
    config = read_json(path)
    for key in ("is_local", "local_files_only", "name_or_path"):
        config.pop(key, None)
    if limit is not None and config.get("model_max_length", 0) > _NO_LIMIT:
        config["model_max_length"] = limit
    write_json(path, config)


def _short_floats(value: Any) -> Any:
    """Give numbers that were float32 in the GGUF header their short form again (1e-05 for 9.999999747378752e-06)."""
    import numpy as np

    if isinstance(value, dict):
        return {key: _short_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short_floats(item) for item in value]
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the loaders' bars and advice off the terminal."""
    from transformers.utils import logging as notes

    level = notes.get_verbosity()
    bars = notes.is_progress_bar_enabled()
    notes.set_verbosity(logging.ERROR)
    notes.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        notes.set_verbosity(level)
        if bars:
            notes.enable_progress_bar()  # type: ignore[no-untyped-call]
