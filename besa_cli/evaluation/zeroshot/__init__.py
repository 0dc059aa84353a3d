"""Zero-shot tasks, measured by the unmodified lm-eval with its own definitions, on local files or the hub's data."""
