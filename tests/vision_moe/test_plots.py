"""The reports' plots: what they draw, what they refuse, and that they write whole files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vision_moe.plots import COLORS, plot_curves, plot_differences, plot_factors, plot_utilization


def _metrics(path: Path, stages: list[str]) -> Path:
    entries = [{"stage": s, "step": i, "time": 0.0, "loss": 1.0 / i} for s in stages for i in range(1, 6)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def _share_of_color(path: Path, color: str) -> float:
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.asarray(Image.open(path).convert("RGB")) == rgb).all(axis=-1).mean())


def test_curves_draw_one_line_per_run_and_stage(tmp_path: Path) -> None:
    runs = {"a": _metrics(tmp_path / "a.jsonl", ["x", "y"]), "b": _metrics(tmp_path / "b.jsonl", ["x"])}
    plot_curves(runs, tmp_path / "new" / "curves.png")
    drawn = [_share_of_color(tmp_path / "new" / "curves.png", color) > 0 for color in COLORS[:4]]
    assert drawn == [True, True, True, False]


def test_curves_of_an_unknown_key_name_the_logged_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run logs 'los'; logged are: loss, stage, step, time"):
        plot_curves({"a": _metrics(tmp_path / "a.jsonl", ["x"])}, tmp_path / "c.png", keys=["los"])
    assert not (tmp_path / "c.png").exists()


def test_factor_bars_stand_as_high_as_the_accuracy(tmp_path: Path) -> None:
    table = {"dense": {"shape": 0.8, "size": 0.8}, "moe": {"shape": 0.4, "size": 0.4}}
    plot_factors(table, tmp_path / "f.png", chance={"shape": 0.25, "size": 0.5})
    areas = [_share_of_color(tmp_path / "f.png", color) for color in COLORS[:2]]
    # The chance marks cover a little of the bars.
    assert areas[0] / areas[1] == pytest.approx(2.0, rel=0.1)


def test_factor_rows_must_hold_the_same_factors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'b' has factors \['size'\]"):
        plot_factors({"a": {"shape": 1.0}, "b": {"size": 1.0}}, tmp_path / "f.png")


def test_a_difference_is_drawn_as_long_as_its_interval(tmp_path: Path) -> None:
    rows = {"a": {"kept": (0.0, (-0.02, 0.02))}, "b": {"kept": (0.0, (-0.04, 0.04))}}
    plot_differences(rows, tmp_path / "d.png", baseline="direct")
    areas = [_share_of_color(tmp_path / "d.png", color) for color in COLORS[:2]]
    # Each line carries the same round mark.
    assert 1.5 < areas[1] / areas[0] < 2.0


def test_differences_without_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got no rows"):
        plot_differences({}, tmp_path / "d.png", baseline="direct")


def test_utilization_refuses_an_unknown_share(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose one of: share_top_k, share_top_1"):
        plot_utilization({"towers": {}}, tmp_path / "u.png", share="top")
