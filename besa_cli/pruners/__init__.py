"""Methods: one file (or folder) each, offering `Options` (a frozen dataclass), `prune(block, options) -> Decision` and
`memory_use(options) -> MemoryUse`, what it holds in memory.

A new method is a file in this folder and a line in `PRUNERS`.
"""

PRUNERS: dict[str, str] = {
    "besa": "learned sparsity of every row or linear, so that each block keeps its output (ICLR 2024)",
    "wanda": "|weight| times the norm of its input, compared within each row",
    "sparsegpt": "column by column, the surviving weights make up for the error",
    "magnitude": "|weight|, compared within each row",
}

# Of methods whose results have changed since their first version. Raise it with every change that makes a method decide
# otherwise by more than rounding does: figures of an older version are then marked as old (benchmarks/recorded.py).
VERSIONS: dict[str, int] = {"besa": 3}
