"""Requests of `besa prune`."""

from typing_extensions import Unpack

from besa_cli import pruners
from besa_cli.choices import Budget, GivenOptions, OptionValue, Update
from besa_cli.errors import UsageError, require_counts, require_factors
from besa_cli.jobs.request import GlobalOptions, Placement, StageRequest
from besa_cli.stream.global_rates import RATE
from besa_cli.stream.method import MethodOptions
from besa_cli.stream.repair import RepairOptions


def request(
    *,
    method: str = "besa",
    sparsity: float = 0.5,
    nm: tuple[int, int] | None = None,
    experts: float | None = None,
    budget: Budget = "uniform",
    global_epochs: int | None = None,
    global_lr: float | None = None,
    update: Update = "none",
    update_epochs: int | None = None,
    update_lr: float | None = None,
    options: GivenOptions | None = None,
    **placement: Unpack[Placement],
) -> StageRequest:
    """Check what is asked of `besa prune`, and resolve its method.

    Parameters
    ----------
    method : str
        A key of `besa_cli.pruners.PRUNERS`.
    sparsity : float
        Share of the linears' weights to prune, in [0, 1).
    nm : (n, m), optional
        Prune n of every m columns instead.
    experts : float, optional
        Share of each block's experts to remove, in (0, 1); the sparsity is that of the experts that stay.
    budget : {"uniform", "model"}
        How the pruned weights are shared between blocks.
    global_epochs : int, optional
        Passes over the samples in which the whole model learns the sparsities of its rows, after the blocks; 0 by
        default, 1 with the preset ``best``.
    global_lr : float, optional
        Learning rate of these passes, 0.03 by default.
    update : {"none", "solve", "tune"}
        Change of the kept weights of each window, so that it keeps its output.
    update_epochs, update_lr : int and float, optional
        Passes over the samples with ``tune``, and its learning rate.
    options : mapping, optional
        The method's own options that were given.
    **placement
        Where and how it is computed: see `Placement`.

    Raises
    ------
    UsageError
        The method is unknown, lacks an option, or a value is invalid.
    """
    _require_shares(sparsity, nm, experts, budget)
    given = dict(options or {})
    if method == "besa" and given.get("preset") == "best":
        _require_no_grid(given)
        del given["preset"]
        global_epochs = 1 if global_epochs is None else global_epochs
    pruner = pruners.load(method, {**given, **({"nm": nm} if nm else {})})
    _require_learnable(sparsity, pruner.options, given.get("preset"))
    whole_model = _whole_model(pruner, nm, global_epochs or 0, global_lr)
    repair = _repair(pruner, update, update_epochs, update_lr)
    own: dict[str, OptionValue] = {"nm": f"{nm[0]}:{nm[1]}"} if nm else {"sparsity": sparsity}
    if experts is not None:
        own |= {"experts": experts}
    if budget != "uniform":  # in manifests the default is absent, as it ever was
        own |= {"budget": budget}
    if whole_model:
        own |= {"global_epochs": whole_model.epochs, "global_lr": whole_model.rate}
    if repair:
        own |= {"update": repair.update}
        if repair.update == "tune":
            own |= {"update_epochs": repair.epochs, "update_lr": repair.rate}
    return StageRequest(
        command="prune",
        method=pruner,
        target_sparsity=None if nm else sparsity,
        budget=budget,
        command_options=own,
        whole_model=whole_model,
        repair=repair,
        removed_experts=experts,
        **placement,
    )


def _require_shares(sparsity: float, nm: tuple[int, int] | None, experts: float | None, budget: Budget) -> None:
    """Refuse shares that are out of range, or contradict one another."""
    if not 0 <= sparsity < 1:
        raise UsageError(f"--sparsity {sparsity} is not in [0, 1)", "0.5 prunes half of the weights")
    if nm and not 0 < nm[0] < nm[1]:
        raise UsageError(
            f"--nm '{nm[0]}:{nm[1]}' is not an N:M pattern with 0 < N < M", "2:4 prunes 2 of every 4 columns"
        )
    if nm and budget != "uniform":
        raise UsageError(
            f"--budget {budget} cannot be combined with --nm {nm[0]}:{nm[1]}, which gives every block the same share",
            "leave one of the two out",
        )
    if experts is not None and not 0 < experts < 1:
        raise UsageError(
            f"--experts {experts} is not between 0 and 1", "0.25 removes a quarter of each block's experts"
        )


def _whole_model(
    pruner: pruners.Pruner, nm: tuple[int, int] | None, epochs: int, rate: float | None
) -> GlobalOptions | None:
    """Return how the whole model learns its rates; None if it does not."""
    if not epochs:
        if rate is not None:
            raise UsageError("--global-lr has no effect without --global-epochs", "give --global-epochs 1 with it")
        return None
    if nm:
        raise UsageError(
            f"--global-epochs {epochs} and --nm {nm[0]}:{nm[1]} exclude each other: the pattern fixes every row",
            "give --sparsity instead of --nm",
        )
    if pruner.grid:
        raise UsageError(
            f"--global-epochs {epochs} and --bits {pruner.grid.bits} exclude each other",
            "prune first, then quantize with besa quantize",
        )
    if pruner.options.memory_use().changes:
        raise UsageError(
            f"--global-epochs {epochs} and --method {pruner.name} exclude each other: it changes the kept weights",
            "use --method besa or --method wanda",
        )
    require_counts(global_epochs=epochs)
    require_factors(global_lr=rate)
    return GlobalOptions(epochs=epochs, rate=RATE if rate is None else rate)


def _repair(pruner: pruners.Pruner, update: Update, epochs: int | None, rate: float | None) -> RepairOptions | None:
    """Return how the kept weights are repaired; None if they are not."""
    if update != "tune":
        given = {"epochs": epochs, "lr": rate}
        for name in (name for name, value in given.items() if value is not None):
            raise UsageError(f"--update-{name} has no effect without --update tune", "give --update tune with it")
    if update == "none":
        return None
    if pruner.grid:
        raise UsageError(
            f"--update {update} and --bits {pruner.grid.bits} exclude each other",
            "prune first, then quantize with besa quantize",
        )
    require_counts(update_epochs=epochs)
    require_factors(update_lr=rate)
    loss = getattr(pruner.options, "loss", None) or RepairOptions.loss
    return RepairOptions(
        update=update,
        epochs=RepairOptions.epochs if epochs is None else epochs,
        rate=RepairOptions.rate if rate is None else rate,
        loss=loss,
    )


def _require_no_grid(given: GivenOptions) -> None:
    if given.get("bits"):
        raise UsageError(
            f"--preset best and --bits {given['bits']} exclude each other",
            "prune first, then quantize with besa quantize",
        )


def _require_learnable(sparsity: float, options: MethodOptions, preset: str | None) -> None:
    low, high = options.sparsity_range()
    if not low <= sparsity <= high:
        raise UsageError(
            f"--sparsity {sparsity} is beyond what --preset {preset} can learn: {low:.3f} to {high:.3f}",
            "leave the preset out; the released program itself needs --no-sigmoid-smooth there",
        )
