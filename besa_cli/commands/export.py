"""`besa export`: the newest stage → a directory that other programs load."""

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from besa_cli import exporters
from besa_cli.commands.shared import forecast_view, options
from besa_cli.console import Console, human_bytes
from besa_cli.errors import BesaError, UsageError

if TYPE_CHECKING:
    from besa_cli.jobs.export import ExportJob
    from besa_cli.system.disk import Json

_FORMATS = "; ".join(f"{name}: {summary}" for name, summary in exporters.EXPORTERS.items())

FormatOption = Annotated[str, typer.Option("--format", metavar="NAME", help=f"{_FORMATS}.")]
StoredOption = Annotated[
    options.StoredDtype | None,
    typer.Option("--dtype", help="hf: what weights are stored in.", show_default="as in the stage"),
]
ShardOption = Annotated[
    str | None,
    typer.Option("--shard-size", metavar="SIZE", help="hf: bytes a file may have, e.g. 2GB.", show_default="5GB"),
]
TypeOption = Annotated[
    options.GgufType | None,
    typer.Option("--type", help="gguf: what matrices are stored in.", show_default="BF16"),
]
CompressOption = Annotated[
    options.Compression | None,
    typer.Option(
        "--compress", help="sparse: compress every file of weights, for downloads.", show_default="as they are"
    ),
]
PushOption = Annotated[
    str | None,
    typer.Option("--push-to", metavar="ORG/NAME", help="Then upload it to this repository on the Hugging Face hub."),
]
PrivateOption = Annotated[
    bool, typer.Option("--private/--public", help="What a repository is that --push-to has to make.")
]
YesOption = Annotated[bool, typer.Option("--yes", help="Push without asking.")]


def export(
    format: FormatOption = "hf",
    dtype: StoredOption = None,
    shard_size: ShardOption = None,
    type: TypeOption = None,
    compress: CompressOption = None,
    push_to: PushOption = None,
    private: PrivateOption = True,
    yes: YesOption = False,
    run: options.RunOption = options.DEFAULT_RUN,
    restart: options.RestartOption = False,
    dry_run: options.DryRunOption = False,
    config: options.ConfigOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Write the newest stage in a form that other programs load, with a model card."""
    console = Console(json=as_json)
    from besa_cli.checkpoint.runs import Run
    from besa_cli.jobs import push
    from besa_cli.jobs.export import ExportJob
    from besa_cli.system import lock

    size = options.size_of(shard_size, "--shard-size")
    own = {"dtype": dtype, "shard_size": size, "type": type, "compress": compress}
    exporter = exporters.load(format, {name: value for name, value in own.items() if value is not None})
    options.require_run(run)
    if push_to is not None:
        push.check(push_to)
        if not (yes or dry_run or sys.stdin.isatty()):
            raise UsageError(
                "--push-to asks before it pushes, and there is no terminal to ask on", "give --yes with it"
            )
    with lock.hold_existing(run) if dry_run else lock.hold(run, f"besa export --run {run}"):
        job = ExportJob(Run(run), exporter, restart=restart)
        if dry_run:
            forecast_view.job(job, console)
            return
        if job.done:
            console.note(f"{job.directory} is finished already, with the same options")
        with console.blocks(f"export {format}", job.number_of_pieces) as progress:
            began = time.monotonic()
            for index, _ in enumerate(job.pieces()):
                progress.advance(index, time.monotonic() - began)
                began = time.monotonic()
        _show(job, console)
    if push_to is not None:
        _refuse_strangers(job)
        if not yes:
            size = sum(file.stat().st_size for file in job.directory.rglob("*") if file.is_file())
            if not typer.confirm(f"Push {human_bytes(size)} to {push_to}?", err=True):
                console.note(f"not pushed; the export is in {job.directory}")
                return
        console.note(f"pushed to {push.push(job.directory, push_to, private=private)}")


def _refuse_strangers(job: "ExportJob") -> None:
    """Nothing goes out that is not of the export."""
    from besa_cli.checkpoint import ownership

    strangers = ownership.strangers(job.directory)
    if strangers:
        raise BesaError(
            f"not pushed: {job.directory} holds {strangers[0]}, which is not of the export",
            "move it away, and run the same command again",
        )


def _show(job: "ExportJob", console: Console) -> None:
    manifest = job.finish()
    sizes: Json = manifest["sizes"]
    rows = [
        (name, human_bytes(sizes[key]), human_bytes(sizes[f"{key}_dense"]), f"{sizes[key] / sizes[f'{key}_dense']:.3f}")
        for name, key in (("linears", "linears"), ("whole model", "weights"))
    ]
    console.line(f"{job.directory}: {manifest['options']['format']} export of {job.source.directory}")
    console.table("", ("", "stored", "dense bf16", "ratio"), rows)
    if sizes["rounded_to_zero"]:
        console.line(f"{sizes['rounded_to_zero']:,} weights that were not pruned are zero after rounding")
    console.emit_json({"directory": str(job.directory), **manifest})
