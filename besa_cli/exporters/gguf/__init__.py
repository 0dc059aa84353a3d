"""`gguf`: one file with the tokenizer for llama.cpp and programs based on it; LLaMA-architecture models only."""

from besa_cli.exporters.gguf.write import Options, file_name, loading, pieces, write

__all__ = ["Options", "file_name", "loading", "pieces", "write"]
