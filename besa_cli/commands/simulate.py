"""`besa simulate`: what a sparse accelerator would make of the pruned model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from besa_cli.commands import options
from besa_cli.commands import subject as subjects
from besa_cli.console import Cell, Console
from besa_cli.sim import DATAFLOWS

if TYPE_CHECKING:
    from besa_cli.simulation import BlockCost, Request

_DATAFLOWS = "; ".join(f"{name}: {summary}" for name, summary in DATAFLOWS.items())

FuncOption = Annotated[
    str,
    typer.Option(
        "--func",
        metavar="NAME",
        help="q, k, v, o, gate, up, down (qkv, gate_up where fused), attn, mlp, model, a linear's own name; "
        "dense: dense cycles alone; sparsity: least, largest and mean sparsity.",
    ),
]
DataflowOption = Annotated[
    list[str] | None,
    typer.Option("--dataflow", metavar="NAME", help=f"Repeatable. {_DATAFLOWS}.", show_default="vitcod"),
]


def simulate(
    func: FuncOption = "model",
    dataflow: DataflowOption = None,
    accelerator: Annotated[
        str, typer.Option("--accelerator", metavar="NAME|FILE", help="besa, vitcod or a TOML file like theirs.")
    ] = "besa",
    threshold: Annotated[
        float, typer.Option("--threshold", metavar="SHARE", help="A column that keeps more of its rows is denser.")
    ] = 0.5,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Inputs that go through together.")] = 1,
    word_bits: Annotated[
        int | None,
        typer.Option("--word-bits", metavar="N", help="Bits of a stored weight.", show_default="the accelerator's"),
    ] = None,
    model: options.OtherModelOption = None,
    run: subjects.RunOption = None,
    config: options.ConfigOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Cycles of the newest stage (or of --model) on a sparse accelerator, from its real masks."""
    console = Console(json=as_json)
    from besa_cli import sim, simulation
    from besa_cli.sim import accelerator as accelerators
    from besa_cli.sim.cost import Settings

    flows = tuple(dict.fromkeys(dataflow or ["vitcod"]))
    for name in flows:
        sim.dataflow(name)
    request = simulation.Request(
        func=func,
        dataflows=flows,
        accelerator=accelerators.load(accelerator),
        settings=Settings(threshold=threshold, batch=batch, weight_bits=word_bits),
    )
    subject = subjects.find(model, run, console, baseline=False)
    found = _simulated(subject.directory, request, console)
    _show(found, request, console)


def _simulated(directory: Path, request: "Request", console: Console) -> "list[BlockCost]":
    from besa_cli import inspection, simulation

    wanted = simulation.chosen(request.func, directory)
    total = inspection.number_of_blocks(directory)
    found = []
    with console.blocks("simulating", total) as progress:
        for number, block in enumerate(simulation.blocks(directory, request, wanted), start=1):
            progress.step(number, total, "block")
            found.append(block)
    return found


def _show(found: "list[BlockCost]", request: "Request", console: Console) -> None:
    from besa_cli import simulation

    rows: list[list[Cell]] = []
    for name in request.dataflows:
        summaries = simulation.summaries(found, name)
        columns = list(summaries)
        each = list(summaries.values())
        if not rows:
            rows.append(["", "sparsity %", *(f"{100 * one.sparsity:.2f}" for one in each)])
        rows.append([name, "dense cycles", *(f"{one.dense_cycles:.2f}" for one in each)])
        rows.append([name, "cycles", *(f"{one.cycles:.2f}" for one in each)])
        rows.append([name, "speed-up", *(f"{one.speedup:.2f}" for one in each)])
    console.table("", ["dataflow", "mean over blocks", *columns], rows)
