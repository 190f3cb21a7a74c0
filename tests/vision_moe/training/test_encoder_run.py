"""The stages of an encoder run: what they leave, that a killed run ends as an unbroken one, that recipes hold."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel

from vision_moe.config import parse
from vision_moe.recipe import TrainConfig
from vision_moe.train import run
from vision_moe.trainer import ContrastiveTrainer

ALL_STAGES = ("dense", "direct", "sparse_upcycling", "mcl1", "mcl2", "mcl3", "dmu")


@pytest.fixture
def flags(small_scenes, recipes):
    def of(output: Path, *more: str) -> list[str]:
        recipe = [str(recipes / "scenes.yaml"), str(recipes / "smoke.yaml")]
        data = ["--data.train", str(small_scenes), "--output", str(output), "--factor_pictures", "4"]
        return [*recipe, *data, "--bf16", "false", "--save_steps", "1", *more]

    return of


@pytest.fixture(scope="session")
def unbroken(small_scenes, recipes, tmp_path_factory):
    """The whole road with tiny models: dense start from nothing, direct, sparse upcycling, DMU."""
    output = tmp_path_factory.mktemp("run") / "unbroken"
    recipe = [str(recipes / "scenes.yaml"), str(recipes / "smoke.yaml")]
    data = ["--data.train", str(small_scenes), "--output", str(output), "--factor_pictures", "4"]
    run(parse(TrainConfig, [*recipe, *data, "--bf16", "false", "--save_steps", "1"]))
    return output


def weights(output: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(output / stage / "model" / "model.safetensors")


def assert_equal_runs(output: Path, other: Path) -> None:
    for stage in ALL_STAGES:
        ours, theirs = weights(output, stage), weights(other, stage)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), stage


def test_run_leaves_models_metrics_tables_and_environment(unbroken):
    results = json.loads((unbroken / "results.json").read_text())
    assert list(results["models"]) == list(ALL_STAGES)
    for row in results["models"].values():
        assert row["retrieval"]["num_images"] == 24
        assert set(row["factors"]) == {
            "shape",
            "color",
            "texture",
            "size",
            "count",
            "position",
            "relation",
            "background",
        }
    assert {stage["samples"] for stage in results["stages"].values()} == {64}
    report = (unbroken / "report.md").read_text()
    assert "CLIP-MoE (DMU)" in report
    assert "expert 2 alone" in report
    sizes = results["stages"]["mcl2"]["cluster_batches"]["sizes"].values()
    assert sum(sizes) == 128
    assert f"| mcl2 | {len(sizes)} | {min(sizes)} | " in report
    logged = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert {entry["stage"] for entry in logged} == set(ALL_STAGES)
    assert json.loads((unbroken / "environment.json").read_text())["packages"]["torch"]
    assert parse(TrainConfig, [str(unbroken / "config.yaml")]).data.caption_field == "long"


def test_an_mcl_stage_trains_the_feed_forward_weights_only(unbroken):
    start, stage = weights(unbroken, "dense"), weights(unbroken, "mcl1")
    changed = {name for name in start if not torch.equal(start[name], stage[name])}
    assert changed == {name for name in start if ".mlp.fc" in name}


def test_the_router_stage_trains_routers_over_the_stages_experts(unbroken):
    moe = weights(unbroken, "dmu")
    for expert, stage in enumerate(("dense", "mcl1", "mcl2", "mcl3")):
        dense = weights(unbroken, stage)
        for name in dense:
            if name.endswith(".mlp.fc1.weight"):
                experts = moe[name.replace("fc1.weight", "experts.up_proj")]
                assert torch.equal(experts[expert], dense[name])
    model = AutoModel.from_pretrained(unbroken / "dmu" / "model")
    assert model.config.vision_config.router_aux_loss_coef == 0.01


def test_a_finished_run_is_not_run_again(unbroken, flags, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a finished stage trained again")

    monkeypatch.setattr(ContrastiveTrainer, "train", fail)
    run(parse(TrainConfig, flags(unbroken)))


def test_an_interrupted_stage_ends_as_an_unbroken_one(unbroken, flags, tmp_path, monkeypatch):
    class Interrupted(Exception):  # noqa: N818
        pass

    step = ContrastiveTrainer.training_step
    taken = []

    def interrupt_twice(self, *args, **kwargs):
        taken.append(1)
        # The second step of `dense`, and the second step of `mcl2`.
        if len(taken) in (2, 13):
            raise Interrupted
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ContrastiveTrainer, "training_step", interrupt_twice)
    for _ in range(2):
        with pytest.raises(Interrupted):
            run(parse(TrainConfig, flags(tmp_path / "run")))
    run(parse(TrainConfig, flags(tmp_path / "run")))
    assert_equal_runs(tmp_path / "run", unbroken)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [(entry["stage"], entry["step"]) for entry in logged if "loss" in entry]
    assert len(losses) == len(set(losses)) == 2 * len(ALL_STAGES)


@pytest.mark.slow
def test_kill_9_in_every_stage_ends_as_an_unbroken_run(unbroken, flags, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "vision_moe.train", *flags(output)]
    for stage in ALL_STAGES:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 180
        while not (output / stage / "checkpoints" / "checkpoint-1").exists():
            assert process.poll() is None, f"the run ended before stage {stage} was seen"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (output / stage / "stage.json").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert_equal_runs(output, unbroken)


def test_random_batches_cluster_nothing_and_make_experts_that_differ(flags, tmp_path):
    few = ["--methods", "[dmu]", "--moe.num_experts", "3", "--clustering.random_batches", "true", "--report", "false"]
    run(parse(TrainConfig, flags(tmp_path / "run", *few)))
    assert json.loads((tmp_path / "run" / "mcl1" / "stage.json").read_text())["cluster_batches"] is None
    assert not list((tmp_path / "run").glob("*/clusters.json"))
    assert not (tmp_path / "run" / "results.json").exists()
    start, *experts = (weights(tmp_path / "run", stage) for stage in ("dense", "mcl1", "mcl2"))
    for one, other in ((start, experts[0]), (start, experts[1]), experts):
        assert any(not torch.equal(one[name], other[name]) for name in start)


def test_another_recipe_in_the_same_folder_is_refused(unbroken, flags):
    with pytest.raises(ValueError, match="other settings of seed"):
        run(parse(TrainConfig, flags(unbroken, "--seed", "1")))


def test_a_set_smaller_than_a_batch_is_refused(flags, tmp_path):
    with pytest.raises(ValueError, match="128 pictures, fewer than one global batch of 200"):
        run(parse(TrainConfig, flags(tmp_path / "run", "--global_batch_size", "200")))


# Stages of each recipe with the last one's model first, and its text positions.
RECIPES = {
    "scenes_dense": (("dense",), 77),
    "flickr8k": (("dmu", *ALL_STAGES[:-1]), 77),
    "clip_moe_paper": (("dmu", *ALL_STAGES[:-1]), 248),
    "clip_moe_official_code": (("dmu", "dense", "mcl1", "mcl2", "mcl3"), 248),
    "clip_up": (("sparse_upcycling", "dense", "direct"), 77),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_two_steps_of_every_stage(name, small_scenes, recipes, tmp_path):
    data = ["--data.train", str(small_scenes), "--data.eval_split", "test", "--output", str(tmp_path / "run")]
    config = parse(
        TrainConfig,
        [str(recipes / f"{name}.yaml"), "--smoke", "--data.num_workers", "0", *data],
        smoke=recipes / "smoke.yaml",
    )
    models = run(config)
    stages, text_positions = RECIPES[name]
    assert set(models) == set(stages)
    last = AutoModel.from_pretrained(models[stages[0]])
    assert last.config.text_config.max_position_embeddings == text_positions
    if name == "clip_up":
        assert last.config.vision_config.moe_layers == last.config.text_config.moe_layers == [1]
        assert last.vision_model.encoder.layers[1].mlp.capacity_factor == 2.0
        logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        steps = [entry for entry in logged if entry["stage"] == "sparse_upcycling" and "loss" in entry]
        for entry in steps:
            routing = {key: value for key, value in entry.items() if key.startswith("moe/")}
            assert set(routing) == {
                f"moe/{tower}/layer1/{metric}"
                for tower in ("vision", "text")
                for metric in ("max_violation", "dropped_fraction")
            }
            # 8 experts, top-2: all tokens in the same two exceed the mean by 3.
            assert all(0 <= value <= 3 for value in routing.values())
        assert not [key for entry in logged if entry["stage"] == "direct" for key in entry if key.startswith("moe/")]


def test_every_recipe_is_in_the_test_above(recipes):
    # scenes_limoe: test_limoe_run.py.
    assert {path.stem for path in recipes.glob("*.yaml")} == {*RECIPES, "scenes", "scenes_limoe", "smoke"}


def test_two_processes_train_what_one_process_trains(unbroken, flags, tmp_path):
    output = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "vision_moe.train", *flags(output)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    # Sums in another order: equal to rounding. Adam's first steps make whole steps of the rounding of a gradient near
    # 0, so single entries may differ.
    for stage in ("dense", "dmu"):
        ours, theirs = weights(output, stage), weights(unbroken, stage)
        start = weights(unbroken, "dense") if stage == "dmu" else {}
        for name in ours:
            scale = (theirs[name] - start[name]).abs().max() if name in start else theirs[name].abs().max()
            is_other = (ours[name] - theirs[name]).abs() > 1e-2 * scale + 1e-4
            assert is_other.float().mean() <= 0.03, (stage, name)


def test_every_model_has_a_card_with_the_numbers_of_the_run(unbroken):
    results = json.loads((unbroken / "results.json").read_text())
    for stage, row in results["models"].items():
        card = ModelCard.load(unbroken / stage / "model" / "README.md")
        wanted = row["retrieval"]["image_to_text"]["R@1"]
        assert card.data.eval_results[0].metric_value == pytest.approx(wanted, abs=1e-4)
        assert card.data.pipeline_tag == "zero-shot-image-classification"
        assert f"| samples seen | {results['stages'][stage]['samples']} |" in card.text
        assert "global_batch_size: 32" in card.text
        low, high = row["retrieval"]["mean_R@1_interval"]
        assert f"(95 % interval {100 * low:.1f} to {100 * high:.1f})" in card.text
    assert "mixture-of-experts" in ModelCard.load(unbroken / "dmu" / "model" / "README.md").data.tags
