"""Conversion of GGUF files, once, to checkpoints of transformers."""
