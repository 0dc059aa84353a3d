"""Methods: one file each, offering `Options` (a frozen dataclass) and `quantize(block, grid, options) -> Pruned`.

A new method is a file in this folder and a line in `QUANTIZERS`.
"""

QUANTIZERS: dict[str, str] = {
    "rtn": "round to nearest",
    "gptq": "column by column, the surviving weights make up for the error",
}
