"""GPTQ by llm-compressor, written as an ordinary checkpoint: what `besa quantize --method gptq` is compared with.

    python -m venv DIR && DIR/bin/pip install llmcompressor==0.14.0.1
    DIR/bin/python -m benchmarks.reference.gptq_reference MODEL TOKENS.jsonl OUT [--bits 4] [--group-size 64]

`quant_protocol_a.py --reference DIR/bin/python` calls it and measures what it wrote. Settings are those of besa:
symmetric, grids between the extreme weights, blocks of 128 columns, 1 % damping, fp32, every block calibrated on what
the quantized blocks before it give. What differs: its scales are fp32 (besa's fp16), and its grids are laid over the
weights before any update (besa's over a group as it is when its first column is reached). It refuses a group size that
does not divide the columns; 576 columns have no groups of 128.
"""

import argparse
from pathlib import Path

from llmcompressor.modifiers.gptq import GPTQModifier

from benchmarks.reference.llm_compressor import compress


def main() -> None:
    """Quantize, and write the de-quantized weights in the source's dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument(
        "--order", choices=["natural", "static"], default="natural", help="static: heaviest columns first"
    )
    arguments = parser.parse_args()
    weights = {
        "num_bits": arguments.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": arguments.group_size,
        "observer": "memoryless_minmax",
    }
    modifier = GPTQModifier(
        config_groups={"all": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        block_size=128,
        dampening_frac=0.01,
        actorder=None if arguments.order == "natural" else "static",
    )
    compress(arguments.model, arguments.tokens, modifier, arguments.out)


if __name__ == "__main__":
    main()
