"""A model's ``config.json``, read and checked for plausible values before a model is built from it."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from besa_cli.errors import BesaError, reading
from besa_cli.models import headers
from besa_cli.system import disk
from besa_cli.system.disk import Json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FILE = "config.json"

SUITED = "besa prunes causal language models of transformers (LLaMA, Qwen, Gemma, Mixtral, Mamba, GPT-2, ...)"
_REMEDY = "restore the file, or fetch the model again"
_LARGEST = 256 << 20  # bytes of a config.json
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_POSITIVE = ("rope_theta", "rotary_emb_base")
_MOST_BLOCKS, _MOST_LABELS = 10_000, 30_000
_FEW_BLOCKS = 256  # counts up to this are not compared with the weights: such a model is built quickly
_LARGEST_SIZE = 1 << 40
_ATTENTIONS = ("eager", "sdpa", None)  # implementations of attention that need no other package


def read(directory: Path) -> "PretrainedConfig":
    """Read the configuration of a checkpoint directory, without running any code from the directory.

    Raises
    ------
    BesaError
        The file cannot be read, needs custom code, or holds an invalid value.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    place = directory / FILE
    fields = disk.parse_json(disk.read_text(place, _LARGEST), place)
    _refuse_values(place, fields)
    for section in (fields, fields.get("text_config")):
        if isinstance(section, dict):
            _refuse_sizes(place, {name: section[name] for name in _SIZES if name in section})
    kind, code = fields.get("model_type"), fields.get("auto_map")
    if code and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise custom_code_error(place, code)
    if kind is not None and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise BesaError(f"{place} has a model_type that transformers does not know: {str(kind)[:80]}", SUITED)
    _refuse_blocks(directory, fields)
    with reading(place, _REMEDY):
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        text = config.get_text_config()
        sections = [
            config,
            *(section for name in config.sub_configs if (section := getattr(config, name, None)) is not None),
        ]
    if any(not isinstance(section, PretrainedConfig) for section in (text, *sections)):
        raise BesaError(f"{place} describes a part of the model by a value that is not an object", _REMEDY)
    named = (text.attribute_map.get(size, size) for size in _SIZES)  # the architecture's own names
    _refuse_sizes(place, {name: vars(text).get(name) for name in named})
    for section in sections:
        if getattr(section, "_attn_implementation", None) not in _ATTENTIONS:
            section._attn_implementation = None  # the library's default: other implementations may be fetched and run
    return config


def check_generation(directory: Path) -> None:
    """Refuse a ``generation_config.json`` that cannot be read or holds an invalid token id.

    Raises
    ------
    BesaError
        The file is unreadable or holds an invalid token id.
    """
    from transformers import GenerationConfig

    place = directory / "generation_config.json"
    if not place.exists():
        return
    fields = disk.read_json(place)
    for name, value in fields.items():
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if name.endswith("_token_id") and not all(token is None or type(token) is int for token in ids):
            raise BesaError(f"{place} has {name} {str(value)[:40]}, which is not a token id", _REMEDY)
    with reading(place, _REMEDY):
        GenerationConfig.from_pretrained(directory, local_files_only=True)


def custom_code_error(place: Path, code: object) -> BesaError:
    """Return the error for a file that asks for Python code of the model (``auto_map``)."""
    names = list(code.values()) if isinstance(code, Mapping) else [code]
    named = ", ".join(str(name) for name in names)[:200]
    return BesaError(
        f"{place} needs Python code from the model (auto_map: {named})",
        "besa runs no code from a model: name a model of a type that is built into transformers",
    )


def _values(value: object) -> Iterator[tuple[str, int | float | str, bool]]:
    """Yield the key, value and list membership of every number and string in a JSON value."""
    pending: list[tuple[str, object, bool]] = [("", value, False)]
    while pending:
        name, value, listed = pending.pop()
        if isinstance(value, dict):
            pending += [(key, item, False) for key, item in value.items()]
        elif isinstance(value, list):
            pending += [(name, item, True) for item in value]
        elif isinstance(value, int | float | str):
            yield name, value, listed


def _refuse_values(place: Path, fields: Json) -> None:
    """Refuse invalid numbers, counts that would only fill the memory, and strings with terminal control characters."""
    for name, value, listed in _values(fields):
        if isinstance(value, str):
            refused = _CONTROL.search(value) is not None
        elif name in _POSITIVE and value <= 0:
            refused = True
        elif isinstance(value, float):
            refused = math.isnan(value) or (math.isinf(value) and not listed)  # infinity in a list can be an open bound
        elif "layers" in name:
            refused = value > _MOST_BLOCKS
        else:
            refused = abs(value) >= 1 << 63 or (name == "num_labels" and value > _MOST_LABELS)
        if refused:
            raise BesaError(f"{place} has an invalid {name[:80]}: {value!r:.40}", _REMEDY)


def _refuse_blocks(directory: Path, fields: Json) -> None:
    """Refuse more blocks than the checkpoint has tensors, before building them."""
    counts = (value for name, value, _ in _values(fields) if name.endswith("layers") and isinstance(value, int))
    blocks = max(counts, default=0)
    if blocks <= _FEW_BLOCKS:
        return
    single, index = directory / headers.SINGLE, directory / headers.INDEX
    tensors = headers.entries(single) if single.exists() else headers.weight_map(index) if index.exists() else None
    if tensors is not None and blocks > len(tensors):
        raise BesaError(
            f"{directory / FILE} says {blocks} blocks, but the weights have only {len(tensors)} tensors", _REMEDY
        )


def _refuse_sizes(place: Path, sizes: Mapping[str, object]) -> None:
    for name, value in sizes.items():
        if isinstance(value, int) and not 1 <= value <= _LARGEST_SIZE:
            raise BesaError(f"{place} has an invalid {name}: {str(value)[:40]}", _REMEDY)
