"""What a run does with its data: packing, skipping, and what metrics.jsonl tells of it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mllm.train import run
from vision_moe.config import write_yaml
from vision_moe.metrics import read_metrics


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=2e-5, msg=name)


def entries(output: Path) -> list[dict[str, Any]]:
    return [entry for entry in read_metrics(output / "metrics.jsonl") if "loss" in entry]


@pytest.fixture
def make_finetune(make_config: Any) -> Any:
    """make_finetune(output, recipe fields, **stage fields): a run of the second stage alone, 4 samples a forward."""

    def make(output: Path, fields: dict[str, Any] | None = None, **stage: Any) -> Any:
        settings = {"per_device_batch_size": 4, **stage}
        config = make_config(output, finetune=settings, **(fields or {}))
        return replace(config, pretrain=replace(config.pretrain, enabled=False))

    return make


@pytest.fixture
def one_missing(dialogues: dict[str, Path], tmp_path: Path) -> Path:
    """The dialogues of the second stage; the picture of one of the seven is not there."""
    samples = json.loads(dialogues["finetune"].read_text())
    samples[2]["image"] = "absent.png"
    path = tmp_path / "one_missing.json"
    path.write_text(json.dumps(samples))
    return path


def test_packing_leaves_the_weights_that_padding_leaves(make_finetune: Any, tmp_path: Path) -> None:
    padded = make_finetune(tmp_path / "padded")
    packed = make_finetune(tmp_path / "packed", packing=True)
    same(weights(run(packed)), weights(run(padded)))
    for entry, other in zip(entries(padded.output), entries(packed.output), strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert 0 < entry["non_padding_share"] <= 1
        assert 0 < other["non_padding_share"] <= 1
        assert min(entry["tokens_per_second"], other["tokens_per_second"]) > 0


def test_a_missing_picture_stops_the_run_unless_it_is_to_be_skipped(
    make_finetune: Any, tmp_path: Path, one_missing: Path
) -> None:
    with pytest.raises(ValueError, match=r"sample '2' \(number 2\): cannot read the picture .*absent.png"):
        run(make_finetune(tmp_path / "error", data=one_missing))


def test_skipping_does_not_depend_on_how_samples_are_dealt_out(
    make_finetune: Any, tmp_path: Path, one_missing: Path
) -> None:
    """With one sample a forward, a forward is left with nothing; with four, with three. The steps are the same."""
    whole = make_finetune(tmp_path / "whole", {"bad_samples": "skip"}, data=one_missing)
    single = make_finetune(tmp_path / "single", {"bad_samples": "skip"}, data=one_missing, per_device_batch_size=1)
    same(weights(run(single)), weights(run(whole)))
    # 12 samples of 7: each comes at least once.
    skipped = [entries(config.output)[-1]["skipped_samples"] for config in (whole, single)]
    assert skipped[0] == skipped[1] >= 1


@pytest.mark.slow
def test_two_processes_skip_and_pack_as_one_does(make_finetune: Any, tmp_path: Path, one_missing: Path) -> None:
    fields = {"bad_samples": "skip"}
    alone = make_finetune(tmp_path / "alone", fields, data=one_missing, packing=True)
    ranks = make_finetune(tmp_path / "ranks", fields, data=one_missing, packing=True, per_device_batch_size=2)
    write_yaml(ranks, tmp_path / "ranks.yaml")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mllm.train"]
    subprocess.run(
        [sys.executable, *command, str(tmp_path / "ranks.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        timeout=400,
    )
    same(weights(ranks.output / "model"), weights(run(alone)))
    for entry, other in zip(entries(ranks.output), entries(alone.output), strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert entry.get("skipped_samples") == other.get("skipped_samples")
