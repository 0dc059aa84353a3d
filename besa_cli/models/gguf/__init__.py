"""GGUF files, converted once to a checkpoint of transformers."""
