"""Ranks of one job: the main rank makes the stage, the workers compute their share of the samples."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from besa_cli.checkpoint import manifests, weights
from besa_cli.checkpoint.manifests import Compute
from besa_cli.errors import UsageError
from besa_cli.jobs.request import StageRequest
from besa_cli.jobs.worker import StageWorker
from besa_cli.models import Model
from besa_cli.stream.activations import ActivationStore
from besa_cli.system.disk import JsonObject
from besa_cli.system.ranks import Ranks


def require_even_steps(request: StageRequest, world: Ranks) -> None:
    """Refuse learning steps that cannot be shared out evenly.

    Raises
    ------
    UsageError
        The samples in a step, more than one, are no multiple of the ranks.
    """
    batch = request.memory_use.batch
    if batch > 1 and batch % world.size:
        raise UsageError(
            f"--batch-size {batch} cannot be shared out evenly over {world.size} ranks",
            f"give a multiple of {world.size}, or 1: then only the passes that do not learn are shared out",
        )


def threads(settings: Compute, world: Ranks) -> int:
    """Return the threads of one rank; those in the manifest's ``compute`` are of all ranks together."""
    return max(int(settings["threads"]) // world.size, 1)


def require_samples(samples: int, world: Ranks) -> None:
    """Refuse more ranks than there are samples.

    Raises
    ------
    UsageError
        Some ranks would have nothing to do.
    """
    if samples < world.size:
        raise UsageError(
            f"{samples} calibration samples are too few for {world.size} ranks", f"start {samples} ranks or fewer"
        )


def run_main(
    request: StageRequest,
    digest: str,
    tokens: Tensor,
    settings: Compute,
    files: Path | None,
    world: Ranks,
    *,
    prefetch: bool,
    kept_experts: Sequence[Sequence[int]] | None = None,
    budgets: Sequence[int] | None = None,
    channels: Tensor | None = None,
) -> None:
    """Send the worker ranks what `run_worker` needs; called by the main rank.

    Parameters
    ----------
    request : StageRequest
    digest : str
        The model's.
    tokens : Tensor of shape (samples, seqlen)
    settings : dict
        ``compute`` of the job's manifest.
    files : Path, optional
        Where the hidden states lie in files.
    prefetch : bool
        Read blocks before they are wanted.
    kept_experts : sequence of sequence of int, optional
        Experts of each block that stay; None if no experts are removed.
    budgets : sequence of int, optional
        Weights that each block prunes; by default the same share of all.
    channels : Tensor of shape (blocks, hidden), optional
        Sensitivity of the channels.
    """
    world.broadcast_json(
        {
            "settings": settings,
            "files": None if files is None else str(files.resolve()),
            "prefetch": prefetch,
            "experts": kept_experts,
            "budgets": budgets,
        }
    )
    world.require_equal(_facts(request, digest))
    world.broadcast_tensors({"tokens": tokens} if channels is None else {"tokens": tokens, "channels": channels})


def stop_workers(world: Ranks) -> None:
    """Tell the worker ranks that there is nothing to do; called by the main rank."""
    world.broadcast_json(None)


def run_worker(model: Model, request: StageRequest, world: Ranks) -> None:
    """Do the work of a worker rank, which writes nothing.

    Raises
    ------
    BesaError
        This rank has another model, other options or other libraries than the first.
    """
    source = weights.Weights(model.directory)
    digest = weights.check_source(source)
    told = world.broadcast_json(None)
    if told is None:
        return
    world.require_equal(_facts(request, digest))
    received = world.broadcast_tensors({})
    tokens = received["tokens"]
    files = None if told["files"] is None else Path(told["files"])
    if files is not None:
        files.mkdir(parents=True, exist_ok=True)  # on a machine of its own
    torch.set_num_threads(threads(told["settings"], world))
    work = StageWorker(model.directory, request, told["settings"], tokens, world)
    work.decoder.weights.refuse_change(source)
    if told["experts"] is not None:
        work.decoder.keep_experts(told["experts"])
    if told["budgets"] is not None:
        work.share_out(told["budgets"])
    for _ in work.reports(
        None,
        ActivationStore(files),
        lambda done, total, phase: None,
        batch=told["settings"]["batch"],
        prefetch=told["prefetch"],
        channels=received.get("channels"),
    ):
        pass


def _facts(request: StageRequest, digest: str) -> JsonObject:
    """Return what must be equal on all ranks."""
    return {**request.to_manifest(), "model digest": digest, **manifests.versions()}
