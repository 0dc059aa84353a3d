"""Shapes of the dense model's linears, and the probe of all candidates."""

from collections.abc import Sequence

from torch import Tensor

from besa_cli.decoder.decoder import Decoder
from besa_cli.fitting.space import Candidate, Shapes, Space
from besa_cli.stream import probe
from besa_cli.stream.block import OnStep

_STEP = 0.2  # between two sparsities that are probed; those between follow from their neighbours


def shapes(decoder: Decoder) -> Shapes:
    """Return the shapes of a model whose blocks need not be loaded."""
    linears = tuple(
        (int(linear.out_features), int(linear.in_features))
        for index in range(len(decoder))
        for linear in decoder.linears(index).values()
    )
    names, weights = decoder.linear_tensors(), sum(rows * cols for rows, cols in linears)
    stored = decoder.weights.nbytes(names)
    return Shapes(
        linears=linears,
        value_bits=round(8 * stored / max(weights, 1)),
        rest=decoder.weights.nbytes(decoder.weights.names) - stored,
    )


def divergences(
    decoder: Decoder,
    tokens: Tensor,
    space: Space,
    candidates: Sequence[Candidate],
    *,
    batch: int = 1,
    on_step: OnStep = lambda done, total, phase: None,
) -> dict[Candidate, float]:
    """Probe candidates; return the divergence of each, in nats per token.

    Parameters
    ----------
    decoder : Decoder
    tokens : Tensor of shape (samples, seqlen)
        Calibration samples, of which the first ones are passed.
    space : Space
    candidates : sequence of Candidate
    batch : int
        Samples in a pass.
    on_step : function
        Gets the progress in blocks.
    """
    compressions = [probe.Compression(candidate.sparsity, space.grids[candidate.bits]) for candidate in candidates]
    passed = tokens[: probe.probed_samples(*tokens.shape)]
    found = probe.divergences(decoder, passed, compressions, batch=batch, on_step=on_step)
    return dict(zip(candidates, found, strict=True))


def probed(space: Space) -> list[Candidate]:
    """Return the candidates to probe: of each line the first, the last, and some between, `_STEP` apart at least."""
    chosen: list[Candidate] = []
    for line in space.lines.values():
        picked = [line[0]]
        for candidate in line[1:-1]:
            if candidate.sparsity - picked[-1].sparsity >= _STEP - 1e-9:
                picked.append(candidate)
        chosen += picked + line[-1:] * (len(line) > 1)
    return chosen
