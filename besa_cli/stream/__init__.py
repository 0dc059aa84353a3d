"""Block stream: load a block, compress it, store it, propagate the activations through it, drop it."""
