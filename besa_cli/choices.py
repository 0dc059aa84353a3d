"""Literal types of options with fixed choices, shared by the command line and the methods."""

from collections.abc import Mapping
from typing import Any, Literal

Importance = Literal["wanda", "magnitude", "sparsegpt"]
Target = Literal["block", "stream"]
Loss = Literal["token", "sensitivity", "channel", "frobenius"]
Optimizer = Literal["adamw", "prodigy"]
Preset = Literal["authors", "best"]
Budget = Literal["uniform", "model"]
Update = Literal["none", "solve", "tune"]

OptionValue = str | int | float | bool | None | list[str] | tuple[int, int]  # value of an option, as manifests keep it
GivenOptions = Mapping[str, Any]  # options of a method or a format that were given, by field; its class checks them

DAMPING = 0.01  # default of --damping: share of the mean diagonal of XᵀX that is added to it
CLIP_RATE = 0.03  # default of --clip-lr, and of quantize's --lr: AdamW's rate of the clipping strengths
ROUTERS = ("router", "gate")  # names of linears that choose experts; never pruned
