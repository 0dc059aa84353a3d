"""Search for the sparsity and the bits that meet a target: the space of candidates, the search, and its record."""
