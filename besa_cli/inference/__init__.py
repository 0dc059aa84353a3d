"""Inference with whole models: dense or from packed weights, from a prompt to the text that continues it."""
