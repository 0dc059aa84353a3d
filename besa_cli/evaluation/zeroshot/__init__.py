"""Zero-shot tasks, evaluated by unmodified lm-eval with its own task definitions, on local files or data of the hub."""
