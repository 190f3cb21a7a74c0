"""The record of one measurement: its numbers and all that is needed to repeat it, as one JSON file.

Beside NAME.json stands NAME.samples.safetensors with what the model did on every sample, which a paired comparison of
two models needs (`python -m eval.compare`).
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from vision_moe.assets import resolve_model
from vision_moe.files import replacing, weights_sha256, write_json
from vision_moe.tracking import environment


def record(benchmark: str, model: str, settings: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Wraps a result with the weights' hash (None for a hub id), the settings, the versions and the time (UTC)."""
    folder = Path(resolve_model(model))
    return {
        "benchmark": benchmark,
        "model": {"path": model, "weights_sha256": weights_sha256(folder) if folder.is_dir() else None},
        "settings": settings,
        "result": result,
        "environment": environment(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def emit(
    content: dict[str, Any],
    table: str,
    output: Path | None,
    samples: Mapping[str, NDArray[np.integer[Any]]] | None = None,
) -> None:
    """Writes the record to `output`, if given, with its samples beside it, and shows the table and where they are."""
    sys.stdout.write(table + "\n")
    if output is None:
        return
    if samples is not None:
        file = output.with_suffix(".samples.safetensors")
        encoded = save({name: np.ascontiguousarray(values) for name, values in samples.items()})
        with replacing(file) as temporary:
            temporary.write_bytes(encoded)
        content = {**content, "samples": {"file": file.name, "sha256": hashlib.sha256(encoded).hexdigest()}}
    # Last: a record names samples that are there.
    write_json(output, content)
    sys.stdout.write(f"\nwritten: {output}\n")


def read_record(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[np.int64]]]:
    """A record and its samples.

    Raises:
        FileNotFoundError: one of the two files is not there.
        ValueError: the record has no samples, or the file beside it is of another run.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "samples" not in content:
        raise ValueError(f"{path} names no samples; measure again with --output (eval.retrieval, eval.zero_shot)")
    file = path.parent / content["samples"]["file"]
    encoded = file.read_bytes()
    if hashlib.sha256(encoded).hexdigest() != content["samples"]["sha256"]:
        raise ValueError(f"{file} is not the one that {path} was written with; measure again")
    return content, load(encoded)


def questions_sha256(questions: Iterable[Any]) -> str:
    """What was asked, sample by sample, as one hash: equal for two records that may be compared pair by pair."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps(question, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
