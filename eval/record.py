"""The record of one measurement: its numbers and all that is needed to repeat it, as one JSON file."""

import sys
import time
from pathlib import Path
from typing import Any

from eval.encoder import weights_sha256
from vision_moe.files import write_json
from vision_moe.tracking import environment


def record(benchmark: str, model: str, settings: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Wraps a result with the model's fingerprint, the settings, the versions and the time (UTC)."""
    return {
        "benchmark": benchmark,
        "model": {"path": model, "weights_sha256": weights_sha256(model)},
        "settings": settings,
        "result": result,
        "environment": environment(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def emit(content: dict[str, Any], table: str, output: Path | None) -> None:
    """Writes the record to `output`, if given, and shows the table and where the record is."""
    sys.stdout.write(table + "\n")
    if output is not None:
        write_json(output, content)
        sys.stdout.write(f"\nwritten: {output}\n")
