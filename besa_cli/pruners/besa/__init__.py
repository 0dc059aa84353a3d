"""BESA: learn how much to prune in every row or linear so that the block keeps its output (arXiv 2402.16880).

With `bits` the weights are put on a grid first, and what is pruned are the quantized weights: how far each group's grid
reaches is learned together with the mixtures (section 3.3, Eq. 7).

Per block: score and rank once, learn the mixtures over candidate sparsities with a straight-through mask, project onto
the exact budget, and keep the uniform allocation where learning did not beat it on the same samples.
"""

from besa_cli.pruners.besa.deciding import prune
from besa_cli.pruners.besa.options import BesaOptions, Options

__all__ = ["BesaOptions", "Options", "prune"]
