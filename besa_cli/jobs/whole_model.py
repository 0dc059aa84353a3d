"""Work on the whole model after its blocks: learn the sparsities of all rows, and repair the blocks afterwards."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from besa_cli.checkpoint import manifests, stages
from besa_cli.checkpoint.manifests import AddedFields
from besa_cli.checkpoint.rates_file import RatesFile
from besa_cli.checkpoint.reports import BlockReport, PassReport
from besa_cli.checkpoint.stages import Stage
from besa_cli.jobs.worker import StageWorker
from besa_cli.stream import global_rates, memory_model
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.block import OnStep
from besa_cli.stream.global_rates import GlobalRates


@dataclass(kw_only=True)
class WholeModelWork:
    """Passes in which the whole model learns, from the draft to the blocks of the stage; of the main rank alone.

    Attributes
    ----------
    worker : StageWorker
    memory : MemoryPlan
    directory : Path
        Directory of the stage.
    stage : Stage
        Blocks as they stay.
    draft : Stage
        Blocks as they were pruned one after the other.
    repairs : bool
        Change the kept weights afterwards; the blocks are written by `repaired` then, else by `passes`.
    """

    worker: StageWorker
    memory: memory_model.MemoryPlan
    directory: Path
    stage: Stage
    draft: Stage
    repairs: bool
    _learner: GlobalRates | None = field(default=None, init=False)

    @property
    def written(self) -> bool:
        """True if all blocks have been written as they stay."""
        return self.stage.finished() == self.stage.blocks

    def passes(self, on_step: OnStep) -> Iterator[PassReport]:
        """Learn from the stored state on, and write the blocks unless they are repaired.

        Yields a report before the first pass over the samples and after each.
        """
        if self.written:
            return
        self._learner = self.worker.global_rates(
            self.draft, self._rates, self._activations(), on_step, batch=self.memory.batch
        )
        yield from self._learner.learn()
        if not self.repairs:
            self._learner.write(self.stage)

    def repaired(self, on_step: OnStep, channels: Tensor | None) -> Iterator[BlockReport]:
        """Write the blocks with their kept weights changed, if that is asked for; yield the report of each.

        Comes after `passes`. `channels` is the sensitivity of the channels, of shape (blocks, hidden), if the repair
        needs it.
        """
        if self.repairs and self._learner is not None and not self.written:
            yield from self.worker.repaired(
                self._learner, self.stage, self._activations(), on_step, batch=self.memory.batch, channels=channels
            )

    def record(self, held_out: int) -> AddedFields:
        """Return the manifest's entries on what was learned; empty if nothing was.

        Parameters
        ----------
        held_out : int
            Samples that are held out.
        """
        state = self._rates.read()
        if state is None:
            return {}
        divergence, kept = global_rates.result(state)
        added: AddedFields = {"whole_model": {"held_out": held_out, "divergence": divergence, "kept": kept}}
        checked = manifests.read_stage(self.directory).get("held_out")
        if checked and self.repairs:
            found = self.worker.held_out_divergence(self.stage, batch=self.memory.batch)
            added["held_out"] = {**checked, "kl": found}
        elif checked and kept:  # the same samples
            added["held_out"] = {**checked, "kl": divergence[kept]}
        return added

    @property
    def _rates(self) -> RatesFile:
        return RatesFile(self.draft.directory / stages.RATES)

    def _activations(self) -> ActivationStore:
        return ActivationStore(self.directory if self.memory.in_files else None)
