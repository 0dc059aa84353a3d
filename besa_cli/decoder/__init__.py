"""A stock transformers decoder, run block by block."""
