"""besa: learned sparsity for large language models (BESA, ICLR 2024, arXiv 2402.16880)."""

__version__ = "0.1.0"
