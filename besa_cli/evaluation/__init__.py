"""Measurements of a model: perplexity, zero-shot tasks, continuations, and comparisons of runs."""
