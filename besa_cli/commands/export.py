"""`besa export`: write the newest stage in a format that other programs load."""

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from besa_cli import exporters
from besa_cli.commands.shared import forecast_view, option_groups, options, panels
from besa_cli.console import Console, human_bytes
from besa_cli.errors import BesaError, UsageError

if TYPE_CHECKING:
    from besa_cli.jobs.export import ExportJob
    from besa_cli.system.disk import Json

_FORMATS = "; ".join(f"{name}: {summary}" for name, summary in exporters.EXPORTERS.items())

FormatOption = Annotated[str, panels.EXPORT("--format", f"{_FORMATS}.", metavar="NAME")]
StoredOption = Annotated[
    options.StoredDtype | None, panels.EXPORT("--dtype", "hf: type of the stored weights.", "as in the stage")
]
ShardOption = Annotated[
    str | None, panels.EXPORT("--shard-size", "hf: maximum size of a file, e.g. 2GB.", "5GB", metavar="SIZE")
]
TypeOption = Annotated[options.GgufType | None, panels.EXPORT("--type", "gguf: type of the stored matrices.", "BF16")]
CompressOption = Annotated[
    options.Compression | None,
    panels.EXPORT("--compress", "sparse: compress every file of weights, for downloads.", "uncompressed"),
]
PushOption = Annotated[
    str | None,
    panels.HUB(
        "--push-to", "Upload the export to this repository on the Hugging Face hub, after asking.", metavar="ORG/NAME"
    ),
]
PrivateOption = Annotated[bool, panels.HUB("--private/--public", "Visibility of a repository that --push-to creates.")]
YesOption = Annotated[bool, panels.HUB("--yes", "Upload without asking.")]


@option_groups.expand
def export(
    *,
    format: FormatOption = "hf",
    dtype: StoredOption = None,
    shard_size: ShardOption = None,
    type: TypeOption = None,
    compress: CompressOption = None,
    push_to: PushOption = None,
    private: PrivateOption = True,
    yes: YesOption = False,
    into: option_groups.RunGroup,
) -> None:
    """Write the newest stage in a format that other programs load, with a model card.

    Examples:

        besa export --format sparse --compress zstd
        besa export --format gguf --type Q8_0 --run qwen
        besa export --push-to my-name/my-model --dry-run
    """
    console = Console(json=into.as_json)
    from besa_cli.checkpoint.runs import Run
    from besa_cli.jobs import push
    from besa_cli.jobs.export import ExportJob
    from besa_cli.system import lock

    size = options.size_of(shard_size, "--shard-size")
    chosen = option_groups.given(dtype=dtype, shard_size=size, type=type, compress=compress)
    exporter = exporters.load(format, chosen)
    options.require_run(into.run)
    if push_to is not None:
        push.check(push_to)
        if not (yes or into.dry_run or sys.stdin.isatty()):
            raise UsageError(
                "--push-to asks before it uploads, but there is no terminal to ask on", "give --yes as well"
            )
    with lock.hold_existing(into.run) if into.dry_run else lock.hold(into.run, f"besa export --run {into.run}"):
        job = ExportJob(Run(into.run), exporter, restart=into.restart)
        if into.dry_run:
            forecast_view.show_job(job, console)
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
        _push(job, push_to, console, private=private, ask=not yes)


def _push(job: "ExportJob", repository: str, console: Console, *, private: bool, ask: bool) -> None:
    """Upload the finished export, after asking."""
    from besa_cli.jobs import push

    _refuse_foreign_files(job)
    if ask:
        size = sum(file.stat().st_size for file in job.directory.rglob("*") if file.is_file())
        if not typer.confirm(f"Push {human_bytes(size)} to {repository}?", err=True):
            console.note(f"not pushed; the export is in {job.directory}")
            return
    console.note(f"pushed to {push.push(job.directory, repository, private=private)}")


def _refuse_foreign_files(job: "ExportJob") -> None:
    """Refuse to upload files that are not part of the export."""
    from besa_cli.checkpoint import ownership

    foreign = ownership.strangers(job.directory)
    if foreign:
        raise BesaError(
            f"not pushed: {job.directory} holds {foreign[0]}, which is not part of the export",
            "move it away and run the same command again",
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
