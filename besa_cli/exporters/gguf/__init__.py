"""`gguf`: one file for llama.cpp and what is built on it, tokenizer included; LLaMA-architecture models."""

from besa_cli.exporters.gguf.write import Options, file_name, loading, pieces, write

__all__ = ["Options", "file_name", "loading", "pieces", "write"]
