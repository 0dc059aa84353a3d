"""Evaluation of a model: perplexity, zero-shot tasks, and comparison of runs."""
