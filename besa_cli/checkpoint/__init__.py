"""The run directory and its stages; `docs/checkpoint.md` specifies the format."""
