"""What besa writes of a stage, for tests that need one without making it, or change one by hand."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from besa_cli.checkpoint import weights
from besa_cli.checkpoint.reports import BlockReport
from besa_cli.checkpoint.stages import Stage


def digest_of(name: str) -> str:
    """A SHA-256 that stands for something of this name."""
    return hashlib.sha256(name.encode()).hexdigest()


def stage_manifest(**changed: Any) -> dict[str, Any]:
    """The manifest of an unfinished stage; with ``status="complete"`` that of a finished one."""
    manifest = {
        "format": 1,
        "stage": "pruned",
        "command": "prune",
        "options": {},
        "compute": {
            "device": "cpu",
            "dtype": "float32",
            "threads": 1,
            "batch": 1,
            "kernels": "native",
            "processor": "AVX2",
            "environment": {},
        },
        "model": {
            "name": "some/model",
            "kind": "hub",
            "revision": None,
            "directory": "somewhere",
            "digest": digest_of("origin"),
        },
        "calibration": {"tokens_digest": digest_of("tokens"), "sources": []},
        "versions": {"besa": "0.1.0"},
        "history": [],
        "status": "running",
        "blocks": 2,
        **changed,
    }
    if manifest["status"] == "complete":
        counts = {"weights": 100, "pruned": 50, "zeros": 50, "blocks_kept_uniform": 0, "sparsity": 0.5}
        manifest = {"counts": counts, "digest": digest_of("stage"), **manifest}
    return manifest


def settle(directory: Path, **changed: Any) -> None:
    """Let reports, counts and digests of a stage follow what was changed in its weights, or codes, by hand."""
    manifest = json.loads((directory / "besa.json").read_text()) | changed
    stage = Stage(directory, manifest["blocks"])
    totals = {"pruned": 0, "zeros": 0}
    for index in range(stage.blocks):
        shard = stage.shard(index)
        record = json.loads(shard.with_suffix(".json").read_text())
        tensors, codes = load_file(shard), directory / "codes" / shard.name
        linears = []
        for linear in record["linears"]:
            (weight,) = (tensors[name] for name in tensors if name.endswith(f".{linear['name']}.weight"))
            zeros = int((weight == 0).sum())
            linears.append({**linear, "zeros": zeros, "pruned": min(linear["pruned"], zeros)})
            for name in totals:
                totals[name] += linears[-1][name]
        kept = {field.name: record[field.name] for field in fields(BlockReport) if field.name in record}
        report = BlockReport.from_record({**kept, "linears": linears})
        stage.write(report, tensors, load_file(codes) if codes.exists() else {})
    manifest["counts"] |= {**totals, "sparsity": totals["pruned"] / manifest["counts"]["weights"]}
    manifest["digest"] = weights.check(weights.Weights(directory))
    (directory / "besa.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
