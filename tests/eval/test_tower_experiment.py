"""eval.tower_experiment: same data and seeds for every tower, differences paired by photo, and it goes on."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from eval.tower_experiment import TowerExperimentConfig, run
from vision_moe.config import parse

EXPERIMENTS = sorted((Path(__file__).parents[2] / "eval" / "experiments" / "towers").glob("*.yaml"))


def finished(folder, losses, right):
    """A run that has ended and been measured on two photos: 10 tokens and 2 questions each."""
    (folder / "finetune").mkdir(parents=True)
    (folder / "finetune" / "stage.json").write_text("{}")
    (folder / "hits").mkdir()
    blank = [30.0, 30.0]
    for name, sums, counts in (
        ("caption loss", losses, [10, 10]),
        ("caption loss, blank photo", blank, [10, 10]),
        ("matching", right, [2, 2]),
    ):
        arrays = {"hits": np.array([sums], dtype=np.float64), "questions": np.array([counts], dtype=np.float64)}
        save_file(arrays, folder / "hits" / f"{name}.safetensors")


@pytest.mark.parametrize("recipe", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_is_read(recipe, tmp_path):
    flags = ["--data", "shards", "--output", str(tmp_path), "--towers", "{dense: a, CLIP-MoE: b}"]
    read = parse(TowerExperimentConfig, [str(recipe), *flags])
    assert read.recipe.is_file()
    assert read.towers == {"dense": "a", "CLIP-MoE": "b"}
    assert len(read.seeds) == 3


def test_means_over_seeds_and_differences_by_photo(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "dialogues" / split).mkdir(parents=True)
    for seed, right in ((0, [1, 1]), (1, [2, 0])):
        finished(tmp_path / "runs" / f"dense-seed{seed}", [20, 30], [1, 1])
        finished(tmp_path / "runs" / f"moe-seed{seed}", [10 + 10 * seed, 30], right)
    config = TowerExperimentConfig(
        recipe=Path("unread"),
        data=Path("unread"),
        output=tmp_path,
        towers={"dense": "a", "moe": "b"},
        baseline="dense",
        seeds=[0, 1],
    )
    results = run(config)
    loss, matching = (results["rows"]["moe"][name] for name in ("caption loss", "matching"))
    assert loss["mean"] == pytest.approx(2.25)
    assert loss["difference"] == pytest.approx(-0.25)
    # Only photo 0 differs between the towers: by 0.5 nats a token in the mean of both seeds.
    assert loss["interval"] == pytest.approx([-0.5, 0])
    assert matching["mean"] == 0.5
    report = (tmp_path / "report.md").read_text()
    assert "| moe | 2.250 ± 0.354 | -0.250 [-0.500, +0.000] | 3.000 ± 0.000 |" in report
    assert "| dense | 2.500 ± 0.000 | +0.000 [+0.000, +0.000] |" in report
    assert run(replace(config, seeds=[0]))["rows"]["moe"]["matching"]["deviation"] is None
    with pytest.raises(ValueError, match="other settings of towers"):
        run(replace(config, towers={"dense": "a", "moe": "c"}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"baseline": "moe"}, "one of the towers"), ({"questions": 3}, "even number"), ({"seeds": []}, "seeds is empty")],
)
def test_what_cannot_be_compared_is_refused(tmp_path, fields, message):
    given = {"recipe": Path("r"), "data": Path("d"), "output": tmp_path, "towers": {"dense": "a"}, "baseline": "dense"}
    with pytest.raises(ValueError, match=message):
        TowerExperimentConfig(**{**given, **fields})


@pytest.mark.slow
def test_an_experiment_runs_from_shards_to_a_report(tmp_path):
    """Two towers that are the same one: every difference is zero."""
    (tmp_path / "shards").mkdir()
    for split in ("train", "val"):
        with tarfile.open(tmp_path / "shards" / f"{split}-0000.tar", "w") as tar:
            for number, color in enumerate(("red", "green", "blue")):
                encoded = io.BytesIO()
                Image.new("RGB", (64, 64), color).save(encoded, "JPEG")
                captions = json.dumps({"captions": [f"a {color} {word}" for word in ("photo", "picture", "wall")]})
                for suffix, content in (("jpg", encoded.getvalue()), ("json", captions.encode())):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    short = ["samples=8", "global_batch_size=4", "per_device_batch_size=4"]
    config = TowerExperimentConfig(
        recipe=EXPERIMENTS[0].parents[3] / "mllm" / "recipes" / "smollm2_towers.yaml",
        data=tmp_path / "shards",
        output=tmp_path / "out",
        towers={"dense": "scenes-clip", "twin": "scenes-clip"},
        baseline="dense",
        seeds=[0],
        flags=["--llm=scenes-llama", *(f"--{stage}.{flag}" for stage in ("pretrain", "finetune") for flag in short)],
    )
    results = run(config)
    for measure in results["rows"]["twin"].values():
        assert measure["difference"] == 0
        assert np.isfinite(measure["mean"])
    assert (
        results["rows"]["dense"]["caption loss"]["mean"]
        != results["rows"]["dense"]["caption loss, blank photo"]["mean"]
    )
    assert (tmp_path / "out" / "dialogues" / "train" / "llava_mixed.json").is_file()
