"""Evaluation of a model: perplexity, zero-shot tasks, continuations of a prompt, and comparison of runs."""
