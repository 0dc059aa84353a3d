"""How small is every export? The sizes that the exports of some runs state, for the table of docs/export.md.

    besa export --format hf|sparse|gguf|compressed-tensors [--dtype|--compress|--type ...] --run RUN      # each
    python -m benchmarks.exports.export_sizes RUN...

Adds a JSON line an export to export_sizes.jsonl; `results.py` makes the table. But for zstd's, sizes follow from the
number of zeros alone, whichever weights they are: only lines of zstd have `methods`, whose versions make them old.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import recorded
from benchmarks.shared.besa_runs import RESULTS, append_line, commit, read_lines
from besa_cli.checkpoint import inspection
from besa_cli.checkpoint.manifests import EXPORT, MANIFEST
from besa_cli.checkpoint.runs import Run

LINES = RESULTS / "export_sizes.jsonl"
_NAMED = ("dtype", "compress", "type")  # options of an export that change its size

Line = Mapping[str, Any]


def measured(directory: Path, methods: list[str]) -> dict[str, Any]:
    """The line of one export."""
    manifest = json.loads((directory / EXPORT).read_text())
    given = {name: manifest["options"][name] for name in _NAMED if manifest["options"].get(name)}
    sizes = {name: manifest["sizes"][name] for name in ("linears", "linears_dense", "weights", "weights_dense")}
    made = recorded.methods(*methods) if "compress" in given else {}
    quantized = manifest["source"]["stage"] == "quantized"
    return {"format": manifest["options"]["format"], **given, "quantized": quantized, **sizes, "methods": made}


def table() -> str:
    """In Markdown, MB and the ratio to dense bf16: the newest line of every export."""
    newest = {_title(line): line for line in read_lines(LINES)}
    rows = ["| export | linears | | all weights | |", "|---|---|---|---|---|"]
    for title, line in newest.items():
        cells = []
        for part in ("linears", "weights"):
            cells += [f"{line[part] / 1e6:.1f}", f"{line[part] / line[f'{part}_dense']:.3f}"]
        rows.append(f"| {recorded.marked(title, line)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _title(line: Line) -> str:
    given = {name: line[name] for name in _NAMED if name in line}
    words = f"`{' '.join([line['format'], *(f'--{name} {value}' for name, value in given.items())])}`"
    return f"4 bits: {words}" if line["quantized"] else words


def main() -> None:
    """Read what the exports say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    for path in parser.parse_args().runs:
        run = Run(path)
        stage = run.newest()
        if stage is None:
            parser.error(f"{path} has no stage")
        method = str(json.loads((stage / MANIFEST).read_text())["options"]["method"])
        for directory in inspection.exports(run):
            line = {**measured(directory, [method]), "commit": commit()}
            append_line(LINES, line)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
