"""The CPU benchmark runs to its end on small sizes: every part gives rows, and the files hold what the table shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_every_part_gives_rows_a_json_and_a_plot(tmp_path):
    pytest.importorskip("faiss", reason="the extra bench is not installed")
    command = [sys.executable, "scripts/bench", "--tiny", "--rounds", "1", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    content = json.loads((tmp_path / "bench.json").read_text())
    works = {row["work"] for row in content["rows"]}
    for part in ("fp32 forward", "saved for backward", "trains router", "k-means", "tiles", "upcycling", "generation"):
        assert any(part in work for work in works), part
    assert all(row["ratio"] > 0 for row in content["rows"])
    assert {row["axis"] for row in content["growth"]} == {"tokens", "experts", "experts per token", "picture"}
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(content["rows"])
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
