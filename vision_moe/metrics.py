"""`metrics.jsonl`, the log of a run: one line for every log of the Trainer."""

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All entries of a `metrics.jsonl`, oldest first."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
