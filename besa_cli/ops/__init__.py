"""Pure tensor functions: the mathematics of pruning and quantization, without models, files or consoles."""
