"""Methods: one file each, offering `Options` (a frozen dataclass), `quantize(block, grid, options) -> Decision`,
`memory_use(options) -> MemoryUse`, what it holds in memory, and `OBSERVES`, whether it looks at calibration samples.

A new method is a file in this folder and a line in `QUANTIZERS`.
"""

QUANTIZERS: dict[str, str] = {
    "rtn": "round to nearest",
    "gptq": "column by column, the surviving weights make up for the error",
    "clip": "learned clipping: how far each group's grid reaches, so that the block keeps its output",
}

# As `besa_cli.pruners.VERSIONS`.
VERSIONS: dict[str, int] = {"gptq": 2, "clip": 2}
