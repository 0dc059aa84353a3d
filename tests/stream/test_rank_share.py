"""Samples dealt out to ranks, against all samples in one place."""

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import few
from torch import Tensor

from besa_cli.stream.rank_share import RankShare
from besa_cli.system.ranks import Ranks

Message = tuple[int, int, int]  # sender, receiver, tag


class Post(Ranks):
    """A rank whose tensors stay in a letter box until all ranks have written."""

    def __init__(self, rank: int, size: int, sent: dict[Message, Tensor], taken: dict[Message, Tensor]) -> None:
        super().__init__()
        self.rank, self.size, self._sent, self._taken = rank, size, sent, taken

    def exchange(self, sent: Sequence[tuple[int, int, Tensor]], taken: Sequence[tuple[int, int, Tensor]]) -> None:
        for box, letters in ((self._sent, sent), (self._taken, taken)):
            for tag, other, tensor in letters:
                key = (self.rank, other, tag) if box is self._sent else (other, self.rank, tag)
                assert key not in box
                box[key] = tensor


@few
@given(st.data(), st.integers(1, 4))
def test_all_samples_of_a_step_are_dealt_once_and_evenly(data: st.DataObject, size: int) -> None:
    samples = data.draw(st.integers(size, 12))
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, samples - 1), min_size=1, max_size=samples, unique=True)))
    inputs = torch.arange(samples * 6.0).reshape(samples, 2, 3)
    target = -inputs[..., :1]
    sent: dict[Message, Tensor] = {}
    taken: dict[Message, Tensor] = {}
    dealt = []
    for rank in range(size):
        share = RankShare(samples, Post(rank, size, sent, taken))
        own = slice(share.own.start, share.own.stop)
        dealt.append(share.fetch(chosen, inputs[own], target[own]))
    assert sent.keys() == taken.keys()
    for key, tensor in taken.items():
        tensor.copy_(sent[key])
    assert max(len(pair[0]) for pair in dealt) == -(-len(chosen) // size)
    found = torch.cat([pair[0] for pair in dealt])
    assert torch.equal(found[found[:, 0, 0].argsort()], inputs[chosen.sort().values])
    assert torch.equal(torch.cat([pair[1] for pair in dealt]), -found[..., :1])


def test_one_rank_has_the_samples_in_the_order_of_the_step() -> None:
    held = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([3, 0, 4])
    (dealt,) = RankShare(5).fetch(chosen, held)
    assert torch.equal(dealt, held[chosen])
