"""The values that options with a fixed choice take: what the command line offers is what the methods know."""

from typing import Literal

Importance = Literal["wanda", "magnitude", "sparsegpt"]
Target = Literal["block", "stream"]
Loss = Literal["token", "channel", "frobenius"]
Optimizer = Literal["adamw", "prodigy"]
Preset = Literal["authors"]
