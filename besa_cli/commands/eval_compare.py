"""`besa eval compare`: results of several runs in one table."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from besa_cli.commands.shared import options, panels
from besa_cli.console import Console, human_divergence, human_perplexity, human_share

if TYPE_CHECKING:
    from besa_cli.evaluation.comparison import Column, Comparison

Format = Literal["table", "markdown", "csv", "json"]


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", callback=options.expand_utf8, help="Run directories that hold results."),
    ],
    form: Annotated[Format, panels.OUTPUT("--format", "table, markdown, csv or json.", metavar="NAME")] = "table",
) -> None:
    """Show the results of several runs in one table: a row per method, a column per data set, the dense model once.

    Examples:

        besa eval compare besa-run qwen
        besa eval compare run-50 run-60 run-70 --format markdown
        besa eval compare run-50 run-60 run-70 --format csv
    """
    from besa_cli.evaluation import comparison

    console = Console(json=form == "json")
    compared = comparison.compare(runs)
    for note in compared.notes:
        console.note(note)
    header = ["method", *compared.columns]
    if form == "csv":
        exact = [
            [row.title, *(_exact(row.figures.get(column)) for column in compared.columns.values())]
            for row in compared.rows
        ]
        console.text(comparison.comma_separated(header, exact))
        return
    rows = [
        [row.title, *(_short(column, row.figures.get(column)) for column in compared.columns.values())]
        for row in compared.rows
    ]
    if form == "markdown":
        console.text(comparison.markdown(header, rows))
    else:
        console.table("", header, rows)
    console.emit_json(_record(compared))


def _exact(value: float | None) -> str:
    return "" if value is None else repr(value)


def _short(column: "Column", value: float | None) -> str:
    if value is None:
        return "-"
    shown = {"perplexity": human_perplexity, "kl": human_divergence}.get(column.metric, human_share)
    return shown(value)


def _record(compared: "Comparison") -> dict[str, object]:
    """Return the comparison as one JSON object, figures by the titles of their columns."""
    return {
        "columns": [
            {
                "title": title,
                "name": column.name,
                "metric": column.metric,
                **dict(column.hidden),
            }
            for title, column in compared.columns.items()
        ],
        "rows": [
            {
                "method": row.title,
                "run": None if row.run is None else str(row.run),
                "figures": {
                    title: row.figures[column] for title, column in compared.columns.items() if column in row.figures
                },
            }
            for row in compared.rows
        ],
        "notes": compared.notes,
    }
