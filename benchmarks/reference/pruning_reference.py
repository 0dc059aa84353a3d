"""Wanda and SparseGPT by llm-compressor, written as an ordinary checkpoint: what `besa prune` is compared with.

    python -m venv DIR && DIR/bin/pip install llmcompressor==0.14.0.1
    DIR/bin/python -m benchmarks.reference.pruning_reference wanda 0.7 MODEL TOKENS.jsonl OUT
    besa eval ppl wikitext2 --model OUT --limit 16

What differs: its Wanda rounds the number of pruned weights down in every row, besa prunes the asked number over all.
"""

import argparse
from pathlib import Path

from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

from benchmarks.reference.llm_compressor import compress

MODIFIERS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}


def main() -> None:
    """Prune the linears of all blocks and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=MODIFIERS)
    parser.add_argument("sparsity", type=float)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    modifier = MODIFIERS[given.method](
        sparsity=given.sparsity, mask_structure="0:0", targets=["LlamaDecoderLayer"], ignore=["re:.*lm_head"]
    )
    compress(given.model, given.tokens, modifier, given.out)


if __name__ == "__main__":
    main()
