"""Conversion of GGUF files: dequantized once into a plain checkpoint that computes the same as llama.cpp does."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from besa_cli.errors import BesaError
from besa_cli.models import cache
from besa_cli.models.gguf import configuration, file_header, tensors, vocabulary
from besa_cli.system.disk import save_tensors, write_json
from besa_cli.system.notes import Notify

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

_METHOD = 2  # version of the conversion; another version gives other checkpoints, which are cached apart


def directory(path: Path, *, notify: Notify) -> Path:
    """Return the checkpoint made from a GGUF file, converted on first use.

    Raises
    ------
    BesaError
        The file is not GGUF, is cut off, or holds anything that would change the model or the tokenizer.
    """
    header = file_header.read(path)
    plan = _Plan(header)

    def make(target: Path) -> None:
        unnamed = vocabulary.has_unnamed_splitting(header)
        note = "; without tokenizer.ggml.pre, words are split as for GPT-2" if unnamed else ""
        notify(f"converting {path} to a Hugging Face checkpoint (once){note}")
        plan.write(target, None)

    return cache.get_or_make(f"models/gguf{_METHOD}-{cache.digest(path)[:16]}", make, notify=notify)


def convert(source: Path, target: Path, *, max_length: int | None = None) -> None:
    """Write the model and tokenizer of a GGUF file into the directory `target` as a plain checkpoint.

    Quantized weights become bf16; a file of plain floats keeps its type.

    Parameters
    ----------
    source, target : Path
        The GGUF file, and an existing directory.
    max_length : int, optional
        Longest input that the tokenizer states, in tokens; the model's own maximum if not given.

    Raises
    ------
    BesaError
        See `directory`.
    """
    _Plan(file_header.read(source)).write(target, max_length)


class _Plan:
    """Planned conversion of a file, from its header alone; checks that need no weights happen here."""

    def __init__(self, header: file_header.Header) -> None:
        _require_model(header)
        self._header = header
        self._used: set[str] = set()
        self._config = configuration.config_of(header, self._values)
        self._weights = tensors.weights(header, self._config, self._used)

    def _values(self, name: str) -> list[float]:
        self._used.add(name)
        values: list[float] = tensors.values(self._header, name).tolist()
        return values

    def write(self, target: Path, longest: int | None) -> None:
        """Write tokenizer, weights and configuration into a directory."""
        if vocabulary.is_present(self._header):
            longest = longest or getattr(self._config, "max_position_embeddings", None)
            vocabulary.save(self._header, target, vocab_size=self._config.vocab_size, longest=longest)
        dtype = _dtype({tensor.kind for tensor in self._header.tensors.values()})
        save_tensors(target / "model.safetensors", dict(self._read_weights(dtype)))
        _save_config(self._config, target, dtype)

    def _read_weights(self, dtype: str) -> "Iterator[tuple[str, torch.Tensor]]":
        import torch

        for key, weight in self._weights.items():
            if weight.stored is None:
                yield key, torch.zeros(weight.shape, dtype=getattr(torch, dtype))
                continue
            value = torch.from_numpy(tensors.restore(self._header, weight.stored, self._config).copy())
            value = value.reshape(weight.shape).to(getattr(torch, dtype))
            if not bool(torch.isfinite(value).all()):
                raise BesaError(f"{key} in {self._header.path} holds values beyond {dtype}", "fetch the file again")
            yield key, value


def _require_model(header: file_header.Header) -> None:
    """Refuse a split part of a model, and files that are not a whole model, such as adapters.

    Raises
    ------
    BesaError
        The file is not a whole model.
    """
    parts = header.fields.get("split.count", 1)
    if parts not in (0, 1):
        raise BesaError(
            f"{header.path} is one of {parts!r:.20} files (split.count)", "join them with `llama-gguf-split --merge`"
        )
    count = header.fields.get("split.tensors.count", len(header.tensors))
    if count != len(header.tensors):
        file_header.refuse(header, "split.tensors.count", f"is {count!r:.20}, but the file has {len(header.tensors)}")
    kind = header.fields.get("general.type", "model")
    if kind != "model":
        file_header.refuse(header, "general.type", f"is {kind!r:.40}, not 'model'")


def _dtype(kinds: set[str]) -> str:
    if kinds == {"F32"}:
        return "float32"
    return "float16" if kinds <= {"F16", "F32"} else "bfloat16"


def _save_config(config: "PretrainedConfig", target: Path, dtype: str) -> None:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS

    fields = {name: _short_floats(value) for name, value in config.to_diff_dict().items()}
    fields |= {"architectures": [DECODERS[config.model_type]], "dtype": dtype}
    write_json(target / "config.json", dict(sorted(fields.items())))
    transformers.GenerationConfig.from_model_config(config).save_pretrained(target)


def _short_floats(value: object) -> object:
    """Round-trip float32 values of the GGUF header to their short decimal form (1e-05 for 9.999999747378752e-06)."""
    import numpy as np

    if isinstance(value, dict):
        return {key: _short_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short_floats(item) for item in value]
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value
