"""The check of all architectures: every type is in one group, and a type's line says what became of it."""

import json
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from benchmarks.checks import architectures


def test_every_type_is_in_one_group() -> None:
    kinds = [kind for group in architectures.groups().values() for kind in group]
    assert sorted(kinds) == sorted(CAUSAL)


def test_a_line_says_whether_a_type_prunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = tmp_path / "lines.jsonl"
    monkeypatch.setattr(architectures, "LINES", lines)
    architectures.main(["olmoe", "zamba", "--work", str(tmp_path / "work")])
    pruned, refused = (json.loads(line) for line in lines.read_text().splitlines())
    assert (pruned["type"], pruned["verdict"], pruned["class"]) == ("olmoe", "prunes", "OlmoeForCausalLM")
    assert "model.layers.*.mlp.experts.*.up_proj.weight" in pruned["pruned"]
    assert "model.layers.*.mlp.gate.weight" not in pruned["pruned"]
    assert (refused["verdict"], "zamba" in refused["why"]) == ("refused", True)
    rows = architectures.table().splitlines()
    assert "| experts | 43 | 1 | 1 |" in rows
    assert rows[-1] == f"| **all** | **{len(CAUSAL)}** | **1** | **1** |"
