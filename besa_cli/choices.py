"""Literal types of options with fixed choices, shared by the command line and the methods."""

from typing import Literal

Importance = Literal["wanda", "magnitude", "sparsegpt"]
Target = Literal["block", "stream"]
Loss = Literal["token", "channel", "frobenius"]
Optimizer = Literal["adamw", "prodigy"]
Preset = Literal["authors"]
