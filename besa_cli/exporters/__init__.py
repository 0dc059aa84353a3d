"""Export formats, one module each with its `Options`, and `write`, which fills a directory and yields each piece."""

# Name on the command line -> what it is, in a few words. The module has the same name, with _ for -.
EXPORTERS = {
    "hf": "dense safetensors with exact zeros, for any program",
    "sparse": "a smaller safetensors checkpoint, for transformers with besa_cli.hf",
    "compressed-tensors": "the codes of a quantized stage, for transformers and vLLM",
    "gguf": "one file for llama.cpp (LLaMA-architecture models)",
}
