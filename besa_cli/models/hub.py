"""Models from the Hugging Face hub: only the required files, in the hub's own cache."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from besa_cli.errors import BesaError, reason_of
from besa_cli.models import answers, cache, files, headers, hub_errors, pickled, transfer
from besa_cli.models.files import CheckConfig
from besa_cli.system.disk import read_json
from besa_cli.system.notes import Notify


def directory(
    repo: str, revision: str | None, *, notify: Notify, check_config: CheckConfig = lambda _: None
) -> tuple[Path, str]:
    """Return the checkpoint directory of a model on the hub, and its commit.

    A complete copy in the hub's cache is used without the network if a commit is named, the hub cannot be reached, or
    ``HF_HUB_OFFLINE`` is set.

    Parameters
    ----------
    repo : str
        ``org/name``.
    revision : str or None
        A branch, a tag or a commit; the default branch if not given.
    notify, check_config : callable
        The parameters of `besa_cli.models.resolve`.

    Raises
    ------
    BesaError
        The model is missing, gated, private or without usable weights, or the hub is unreachable or the transfer broke
        off.
    """
    if revision is not None and not all(part.strip(".") for part in revision.split("/")):
        raise BesaError(f"'{revision}' is not a valid revision of {repo}", "name a branch, a tag or a commit")
    hub_errors.require_cache()
    with _quiet():
        snapshot = _snapshot(repo, revision, notify, check_config)
    if files.weight_files(snapshot) is None:
        return pickled.directory(snapshot, files.list_side_files(snapshot), notify=notify), snapshot.name
    for shard in files.weight_files(snapshot) or []:
        files.check_whole(shard)
    return snapshot, snapshot.name


def _snapshot(repo: str, revision: str | None, notify: Notify, check_config: CheckConfig) -> Path:
    from huggingface_hub import constants

    cached = _undamaged(_cached(repo, revision))
    if cached is not None:
        check_config(cached)
    if cached is not None and cached.name == revision and _has_tokenizer(cached):
        return cached
    if constants.HF_HUB_OFFLINE:
        if cached is None:
            raise hub_errors.offline(repo)
        return cached
    try:
        listing = _listing(repo, revision)
    except BesaError as error:
        if cached is None or not hub_errors.is_transient(error):
            raise
        notify(f"{error.message}; using the cached copy {cached}")
        return cached
    return _fetch(repo, revision, listing, notify, check_config)


def _cached(repo: str, revision: str | None) -> Path | None:
    """Return the snapshot in the hub's cache if it is complete, else None."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    snapshot = Path(config).parent
    for single, index in ((headers.SINGLE, headers.INDEX), (pickled.SINGLE, pickled.INDEX)):
        if (snapshot / single).is_file():
            return snapshot
        if (snapshot / index).is_file():
            complete = all((snapshot / name).is_file() for name in files.shards(snapshot / index))
            return snapshot if complete else None
    return None


def _undamaged(snapshot: Path | None) -> Path | None:
    """Return the snapshot, or None if it does not exist or one of its files has to be fetched again."""
    from huggingface_hub import constants

    if snapshot is None:
        return None
    side_files = files.list_side_files(snapshot)
    weights = files.weight_files(snapshot) or pickled.weight_files(snapshot)
    for path in [*(snapshot / name for name in side_files if (snapshot / name).is_file()), *weights]:
        if not cache.is_undamaged(path):
            if constants.HF_HUB_OFFLINE:
                raise BesaError(f"{path} is damaged: it has changed since it was fetched", "unset HF_HUB_OFFLINE")
            return None
    return snapshot


def _has_tokenizer(snapshot: Path) -> bool:
    """Check for tokenizer files: other programs may have fetched the weights alone."""
    return any(name.startswith(("tokenizer", "vocab")) for name in (entry.name for entry in snapshot.iterdir()))


def _listing(repo: str, revision: str | None) -> answers.Listing:
    """Ask the hub for the files of the model; without an answer, raise an error within ten seconds."""
    results: list[answers.Listing | Exception] = []

    def ask() -> None:
        try:
            results.append(answers.listing(repo, revision))
        except Exception as error:  # noqa: BLE001  # an answer can make the libraries raise anything
            results.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(answers.ANSWER_SECONDS + 1)
    if not results:
        raise hub_errors.unreachable(repo, f"no answer in {answers.ANSWER_SECONDS:.0f} s")
    answer = results[0]
    if not isinstance(answer, Exception):
        return answer
    if isinstance(answer, BesaError):
        raise answer
    if not isinstance(answer, hub_errors.kinds()):
        raise BesaError(
            f"cannot read the hub's answer for {repo}: {reason_of(answer)}", answers.CHECK_ENDPOINT
        ) from answer
    raise hub_errors.translate(answer, repo, revision) from answer


def _fetch(
    repo: str, revision: str | None, listing: answers.Listing, notify: Notify, check_config: CheckConfig
) -> Path:
    """Fetch config and tokenizer, then the weights, all from one commit."""
    sizes = {name: size for name, size in listing.sizes.items() if "/" not in name or files.side_files([name])}
    if "config.json" not in sizes:
        raise BesaError(
            f"{repo} on the hub has no config.json", "name a transformers model, not an adapter or a GGUF repository"
        )
    download = transfer.Download(repo=repo, commit=listing.commit, sizes=sizes, digests=listing.digests, notify=notify)
    download.fetch(["config.json"])
    files.refuse_quantized(read_json(download.snapshot / "config.json"), repo)
    check_config(download.snapshot)
    single, index = _weights(repo, set(sizes))
    if index:
        download.fetch([index])
    weights = files.shards(download.snapshot / index) if index else [single]
    if any(not (download.snapshot / name).exists() for name in weights):
        total = sum(sizes.get(name, 0) for name in weights)
        notify(f"fetching {repo} from the hub: {hub_errors.size(total)} in {len(weights)} file(s)")
    download.fetch([*files.side_files(sizes), *weights])
    download.remember(revision or "main")
    return download.snapshot


def _weights(repo: str, names: set[str]) -> tuple[str, str]:
    """Return the name of the single weight file, or of the index of many; safetensors are preferred to pickles."""
    for single, index in ((headers.SINGLE, headers.INDEX), (pickled.SINGLE, pickled.INDEX)):
        if single in names:
            return single, ""
        if index in names:
            return "", index
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    hint = f"`hf download {repo} {gguf[0]}` and name that file" if gguf else "name a repository with model.safetensors"
    raise BesaError(f"{repo} on the hub has neither safetensors nor pytorch_model.bin weights", hint)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the hub library's progress bars and warnings off the terminal."""
    from huggingface_hub import logging as hub_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    level, bars_disabled = hub_logging.get_verbosity(), are_progress_bars_disabled()
    hub_logging.set_verbosity(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        if not bars_disabled:
            enable_progress_bars()
