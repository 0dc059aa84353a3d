"""Pure tensor functions: the mathematics of pruning, without models, files or consoles."""
