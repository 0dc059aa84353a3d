"""`besa simulate`: cycles of the pruned model on a sparse accelerator."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from besa_cli.commands.shared import options, panels
from besa_cli.commands.shared import subject as subjects
from besa_cli.commands.shared.simulation_tables import show
from besa_cli.console import Console
from besa_cli.errors import UsageError
from besa_cli.sim import DATAFLOWS

if TYPE_CHECKING:
    from besa_cli.commands.shared.subject import Subject
    from besa_cli.simulation.run import BlockCost, SimulationRequest

_DATAFLOWS = "; ".join(f"{name}: {summary}" for name, summary in DATAFLOWS.items())

FuncOption = Annotated[
    str,
    panels.SIMULATION(
        "--func",
        "q, k, v, o, gate, up, down (qkv, gate_up where fused), attn, mlp, model, or the name of a linear; "
        "dense: cycles of the dense model; sparsity: smallest, mean and largest sparsity.",
        metavar="NAME",
    ),
]
DataflowOption = Annotated[
    list[str] | None, panels.SIMULATION("--dataflow", f"{_DATAFLOWS}. Repeatable.", "vitcod", metavar="NAME")
]
AcceleratorOption = Annotated[
    str,
    panels.SIMULATION(
        "--accelerator",
        "besa (64 x 64 elements, as in the paper's table), vitcod (64 x 8), or a TOML file in their format.",
        metavar="NAME|FILE",
        callback=os.path.expanduser,
    ),
]
ThresholdOption = Annotated[
    float,
    panels.SIMULATION("--threshold", "A column that keeps more than this share is a denser column.", metavar="SHARE"),
]
SearchOption = Annotated[
    bool, panels.SIMULATION("--search/--no-search", "Adjust vitcod's threshold as the released program does.")
]
BatchOption = Annotated[int, panels.SIMULATION("--batch", "Inputs processed together.", metavar="N")]
BitsOption = Annotated[
    int | None, panels.SIMULATION("--word-bits", "Bits of a stored weight.", "the accelerator's: 8", metavar="N")
]
BlocksOption = Annotated[
    bool | None,
    panels.OUTPUT("--by-block/--mean", "A line for each block, or only the means.", "by block for a single linear"),
]
CsvOption = Annotated[bool, panels.OUTPUT("--csv", "Print CSV: a line for each block, linear and dataflow.")]
PlotOption = Annotated[
    Path | None,
    panels.OUTPUT(
        "--plot",
        "Draw cycles, speed-up and columns into a .png, .svg or .pdf file.",
        metavar="FILE",
        callback=options.expand_home,
    ),
]


def simulate(
    model: options.OtherModelOption = None,
    func: FuncOption = "model",
    dataflow: DataflowOption = None,
    accelerator: AcceleratorOption = "besa",
    threshold: ThresholdOption = 0.5,
    search: SearchOption = False,
    batch: BatchOption = 1,
    word_bits: BitsOption = None,
    run: subjects.RunOption = None,
    config: options.ConfigOption = None,
    by_block: BlocksOption = None,
    plot: PlotOption = None,
    as_csv: CsvOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Simulate the newest stage (or --model) on a sparse accelerator. Cycles follow from the real masks.

    Examples:

        besa simulate
        besa simulate --func q --dataflow vitcod --dataflow roofline
        besa simulate --accelerator vitcod --plot cycles.svg
    """
    if as_csv and as_json:
        raise UsageError("--csv and --json exclude each other", "give one of them")
    console = Console(json=as_json)
    from besa_cli import sim
    from besa_cli.sim import accelerator as accelerators
    from besa_cli.sim.cost import SimulationSettings
    from besa_cli.simulation import plots
    from besa_cli.simulation.run import SimulationRequest

    flows = tuple(dict.fromkeys(dataflow or ["vitcod"]))
    for name in flows:
        sim.dataflow(name)
    request = SimulationRequest(
        func=func,
        dataflows=flows,
        accelerator=accelerators.load(accelerator),
        settings=SimulationSettings(threshold=threshold, search=search, batch=batch, weight_bits=word_bits),
    )
    if plot is not None:
        plots.require(plot)
    subject = subjects.find(model, run, console, baseline=False)
    costs = _simulate(subject.directory, request, console)
    record = _store(subject, costs, request, console)
    if as_csv:
        _print_csv(costs, console)
    else:
        show(costs, request, console, by_block=by_block)
    if plot is not None:
        plots.draw(costs, request, plot, title=subject.name)
        console.note(f"drawn: {plot}")
    console.emit_json({"model": subject.name, "directory": str(subject.directory), **record})


def _simulate(directory: Path, request: "SimulationRequest", console: Console) -> "list[BlockCost]":
    from besa_cli.checkpoint import inspection
    from besa_cli.simulation.run import blocks, chosen

    linears = chosen(request.func, directory)
    total = inspection.number_of_blocks(directory)
    costs = []
    with console.blocks("simulating", total) as progress:
        for number, block in enumerate(blocks(directory, request, linears), start=1):
            progress.step(number, total, "block")
            costs.append(block)
    return costs


def _store(
    subject: "Subject", costs: "list[BlockCost]", request: "SimulationRequest", console: Console
) -> dict[str, Any]:
    """Return the record; write it into the run directory if the subject is a stage of a run."""
    from besa_cli.checkpoint.runs import Run
    from besa_cli.simulation import record

    result = record.record(costs, request)
    if subject.results is not None:
        model = {"name": subject.name, "directory": str(subject.directory)}
        record.save(result, Run(subject.results.parent), model, subjects.digest(subject))
    return result


def _print_csv(costs: "list[BlockCost]", console: Console) -> None:
    from besa_cli.evaluation import comparison
    from besa_cli.simulation import record

    console.text(comparison.comma_separated(*record.rows(costs)))
