"""Local files of zero-shot tasks with a handful of made-up questions, in the published forms."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import tiny_models

Row = dict[str, Any]


def words(draw: random.Random, least: int = 1, most: int = 6) -> str:
    """A few words that the tiny tokenizer knows."""
    return " ".join(f"w{draw.randrange(3, tiny_models.VOCABULARY)}" for _ in range(draw.randint(least, most)))


def piqa(draw: random.Random) -> Row:
    return {**{name: words(draw) for name in ("goal", "sol1", "sol2")}, "label": draw.randrange(2)}


def boolq(draw: random.Random) -> Row:
    return {"question": words(draw), "passage": words(draw, 4, 12), "idx": 0, "label": draw.randrange(2)}


def hellaswag(draw: random.Random) -> Row:
    start, end = words(draw), words(draw, 1, 2)
    texts = {"activity_label": words(draw, 1, 2), "ctx_a": start, "ctx_b": end, "ctx": f"{start} {end}"}
    return {**texts, "endings": [words(draw) for _ in range(4)], "label": str(draw.randrange(4))}


def winogrande(draw: random.Random) -> Row:
    options = {name: words(draw, 1, 2) for name in ("option1", "option2")}
    return {"sentence": f"{words(draw)} _ {words(draw)}", **options, "answer": str(draw.randint(1, 2))}


def arc(draw: random.Random) -> Row:
    labels = list("ABCD" if draw.random() < 0.7 else "1234")
    choices = {"text": [words(draw) for _ in labels], "label": labels}
    return {"id": words(draw, 1, 1), "question": words(draw), "choices": choices, "answerKey": draw.choice(labels)}


MADE = {
    "piqa": piqa,
    "boolq": boolq,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "arc_easy": arc,
    "arc_challenge": arc,
}


def rows(task: str, count: int = 7, *, seed: int = 3) -> list[Row]:
    """Questions of a task as the hub has them."""
    draw = random.Random(f"{task} {seed}")
    return [MADE[task](draw) for _ in range(count)]


def json_lines(path: Path, records: Sequence[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def data_dir(directory: Path, *, tasks: Sequence[str] = tuple(MADE), count: int = 7) -> Path:
    """A directory for `--data-dir` with a validation file for each task; PIQA's labels lie in a file of their own."""
    for task in tasks:
        made = rows(task, count)
        if task == "piqa":
            labels = [record.pop("label") for record in made]
            json_lines(directory / "piqa" / "valid.jsonl", made)
            (directory / "piqa" / "valid-labels.lst").write_text("".join(f"{label}\n" for label in labels))
        else:
            json_lines(directory / task / "validation.jsonl", made)
    return directory
