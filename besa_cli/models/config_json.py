"""A model's ``config.json``, read and found plausible before anything is built from it."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from besa_cli.errors import BesaError, reading
from besa_cli.models import headers
from besa_cli.system import disk

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FILE = "config.json"

SUITED = "besa prunes dense decoders of transformers whose blocks hold nn.Linear modules (LLaMA, Qwen, Gemma, OPT, ...)"
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
_FEW_BLOCKS = 256  # up to here nothing is compared: it is soon built
_LARGEST_SIZE = 1 << 40
_COMPUTED = ("eager", "sdpa", None)  # ways to compute attention that need no other package


def read(directory: Path) -> "PretrainedConfig":
    """The configuration of a checkpoint directory; no code that the directory brings along runs.

    Raises
    ------
    BesaError
        The file cannot be read, needs code of its own, or holds a value that no model can have.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    place = directory / FILE
    told = disk.parse_json(disk.read_text(place, _LARGEST), place)
    _refuse_values(place, told)
    for part in (told, told.get("text_config")):
        if isinstance(part, dict):
            _refuse_sizes(place, {name: part[name] for name in _SIZES if name in part})
    kind, code = told.get("model_type"), told.get("auto_map")
    if code and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise code_refused(place, code)
    if kind is not None and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise BesaError(f"{place} describes no model that transformers knows: model_type {str(kind)[:80]}", SUITED)
    _refuse_blocks(directory, told)
    with reading(place, _REMEDY):
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        text = config.get_text_config()
        parts = [config, *(part for name in config.sub_configs if (part := getattr(config, name, None)) is not None)]
    if any(not isinstance(part, PretrainedConfig) for part in (text, *parts)):
        raise BesaError(f"{place} describes a part of the model by something that is not an object", _REMEDY)
    named = (text.attribute_map.get(size, size) for size in _SIZES)  # as the architecture calls them
    _refuse_sizes(place, {name: vars(text).get(name) for name in named})
    for part in parts:
        if getattr(part, "_attn_implementation", None) not in _COMPUTED:
            part._attn_implementation = None  # the library's own choice: others may be fetched and run
    return config


def check_generation(directory: Path) -> None:
    """Refuse a ``generation_config.json`` that cannot be read, or that names tokens by something that is no number.

    Raises
    ------
    BesaError
        There is one.
    """
    from transformers import GenerationConfig

    place = directory / "generation_config.json"
    if not place.exists():
        return
    told = disk.read_json(place)
    for name, value in told.items():
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if name.endswith("_token_id") and not all(each is None or type(each) is int for each in ids):
            raise BesaError(f"{place} says {name}: {str(value)[:40]}, which is not a token id", _REMEDY)
    with reading(place, _REMEDY):
        GenerationConfig.from_pretrained(directory, local_files_only=True)


def code_refused(place: Path, code: object) -> BesaError:
    """The error for a file that says which Python code of the model is to be run."""
    names = list(code.values()) if isinstance(code, Mapping) else [code]
    named = ", ".join(str(name) for name in names)[:200]
    return BesaError(
        f"{place} asks for Python code of the model (auto_map: {named})",
        "besa runs no code of a model: name a model of a type that transformers knows itself",
    )


def _values(value: Any) -> Iterator[tuple[str, Any, bool]]:
    """Every number and text in a JSON value, with the name that it goes by, and whether it stands in a list."""
    left: list[tuple[str, Any, bool]] = [("", value, False)]
    while left:
        name, value, listed = left.pop()
        if isinstance(value, dict):
            left += [(key, each, False) for key, each in value.items()]
        elif isinstance(value, list):
            left += [(name, each, True) for each in value]
        elif isinstance(value, int | float | str):
            yield name, value, listed


def _refuse_values(place: Path, told: Mapping[str, Any]) -> None:
    """Refuse numbers that are none, counts that would only fill the memory, and text that acts on a terminal."""
    for name, value, listed in _values(told):
        if isinstance(value, str):
            refused = _CONTROL.search(value) is not None
        elif name in _POSITIVE and value <= 0:
            refused = True
        elif isinstance(value, float):
            refused = math.isnan(value) or (math.isinf(value) and not listed)  # a limit may be open to one side
        elif "layers" in name:
            refused = value > _MOST_BLOCKS
        else:
            refused = abs(value) >= 1 << 63 or (name == "num_labels" and value > _MOST_LABELS)
        if refused:
            raise BesaError(f"{place} says {name[:80]}: {value!r:.40}, which no model can have", _REMEDY)


def _refuse_blocks(directory: Path, told: Mapping[str, Any]) -> None:
    """Refuse more blocks than the checkpoint has tensors, before they are built."""
    counts = (value for name, value, _ in _values(told) if name.endswith("layers") and isinstance(value, int))
    blocks = max(counts, default=0)
    if blocks <= _FEW_BLOCKS:
        return
    single, index = directory / headers.SINGLE, directory / headers.INDEX
    found = headers.entries(single) if single.exists() else headers.weight_map(index) if index.exists() else None
    if found is not None and blocks > len(found):
        raise BesaError(
            f"{directory / FILE} says {blocks} blocks, where the weights have {len(found)} tensors in all", _REMEDY
        )


def _refuse_sizes(place: Path, sizes: Mapping[str, Any]) -> None:
    for name, value in sizes.items():
        if isinstance(value, int) and not 1 <= value <= _LARGEST_SIZE:
            raise BesaError(f"{place} says {name}: {str(value)[:40]}, which no model can have", _REMEDY)
