"""Training from a stream: a resumed stage ends as an unbroken one, and recipes that cannot stream are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from vision_moe.config import parse
from vision_moe.data.collate import CaptionCollator
from vision_moe.data.read_config import ReadConfig
from vision_moe.data.shard_source import find_shards
from vision_moe.data.stream import CaptionStream
from vision_moe.data.stream_loader import StreamLoader, load_state
from vision_moe.data.tar_shards import TarShards
from vision_moe.recipe import TrainConfig
from vision_moe.train import run
from vision_moe.trainer import ContrastiveTrainer, training_arguments
from vision_moe.training_data import TrainingData


class _StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.fixture
def shards(tmp_path, write_shard):
    """Four train shards of six pictures each, and a test shard."""
    (tmp_path / "shards").mkdir()
    words = ["a", "photo", "of", "red", "blue", "square"]
    for shard in range(4):
        samples = {f"k{shard}{n}": {"captions": [f"{words[n]} {words[shard]}", words[n]]} for n in range(6)}
        write_shard(tmp_path / "shards" / f"train-{shard:04d}.tar", samples)
    write_shard(tmp_path / "shards" / "test-0000.tar", {f"t{n}": {"captions": [words[n]]} for n in range(6)})
    return tmp_path / "shards"


@pytest.fixture
def train(shards, make_tiny_clip, tiny_processor, tmp_path):
    """Trains a tiny CLIP for eight steps of five pairs; stops at a step, and goes on from a checkpoint."""

    def trained(name, num_workers, stop_at=8, checkpoint=None):
        flags = ["--output", str(tmp_path), "--data.train", str(shards), "--global_batch_size", "5", "--bf16", "false"]
        config = parse(TrainConfig, [*flags, "--save_steps", "1", "--logging_steps", "1", "--data.streaming", "true"])
        stream = CaptionStream(TarShards(find_shards(str(shards), "train")), ReadConfig(), shuffle_buffer=4)
        loader = StreamLoader(
            stream,
            CaptionCollator(tiny_processor),
            batch_size=5,
            num_workers=num_workers,
            state=None if checkpoint is None else load_state(checkpoint, 0),
        )
        trainer = ContrastiveTrainer(
            model=make_tiny_clip().train(),
            args=training_arguments(config, config.dense, tmp_path / name, 8),
            train_dataset=stream,
            stream_loader=loader,
            callbacks=[_StopAt(stop_at)],
        )
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return trainer

    return trained


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_stream_trains_as_an_unbroken_one(train, tmp_path, num_workers):
    unbroken = train("unbroken", num_workers)
    train("broken", num_workers, stop_at=3)
    checkpoint = tmp_path / "broken" / "checkpoints" / "checkpoint-3"
    resumed = train("broken", num_workers, checkpoint=checkpoint)
    assert resumed.state.global_step == 8
    weights, others = unbroken.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert resumed.stream_loader.state() == unbroken.stream_loader.state()
    epochs = [entry["epoch"] for entry in resumed.state.log_history if "loss" in entry]
    assert epochs == pytest.approx([step / 8 for step in range(1, 9)])


def test_a_recipe_streams_its_random_stages_and_clusters_from_the_same_shards(small_scenes, recipes, tmp_path):
    recipe = [str(recipes / "scenes.yaml"), str(recipes / "smoke.yaml")]
    flags = ["--data.train", str(small_scenes), "--output", str(tmp_path / "run"), "--factor_pictures", "4"]
    stream = ["--data.streaming", "true", "--data.shuffle_buffer", "20", "--bf16", "false"]
    few = ["--methods", "[dmu]", "--moe.num_experts", "2"]
    models = run(parse(TrainConfig, [*recipe, *flags, *stream, *few]))
    stages = {name: json.loads((tmp_path / "run" / name / "stage.json").read_text()) for name in models}
    for name in ("dense", "dmu"):
        assert stages[name]["stream"] == {"seen": 64, "unreadable": 0, "damaged_shards": 0}
    assert stages["mcl1"]["stream"] is None
    assert stages["mcl1"]["cluster_batches"]["batches"] > 0
    start, expert = (load_file(models[name] / "model.safetensors") for name in ("dense", "mcl1"))
    assert any(not torch.equal(start[name], expert[name]) for name in start)


@pytest.fixture
def open_training(shards, tmp_path):
    def opened(*flags):
        return TrainingData(
            parse(TrainConfig, ["--output", str(tmp_path / "run"), "--data.train", str(shards), *flags])
        )

    return opened


def test_local_shards_are_counted_and_remote_ones_need_a_number(open_training):
    streamed = ("--data.streaming", "true", "--methods", "[direct]")
    assert len(open_training(*streamed)) == 24
    assert len(set(open_training(*streamed).captions())) == 24 + 6
    remote = (*streamed, "--data.train", "http://127.0.0.1:9/{0..3}.tar", "--data.eval", "x")
    with pytest.raises(ValueError, match=r"set data\.num_samples"):
        open_training(*remote)
    assert len(open_training(*remote, "--data.num_samples", "1000")) == 1000


def test_streams_give_no_random_access(open_training):
    with pytest.raises(ValueError, match="random access"):
        _ = open_training("--data.streaming", "true", "--methods", "[direct]").dataset
    with pytest.raises(ValueError, match="can only be streamed"):
        open_training("--data.streaming", "true", "--data.train", "http://127.0.0.1:9/{0..3}.tar", "--data.eval", "x")
    with pytest.raises(ValueError, match="only shards and Hugging Face"):
        open_training("--data.streaming", "true", "--data.format", "list")


def test_data_without_splits_need_others_to_evaluate_on(open_training, tmp_path):
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"no splits.*set data\.eval"):
        open_training("--data.train", str(tmp_path / "list.json"))


def test_all_fields_of_reading_are_flags_with_help(capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--help", "all"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--data.allow_pipe" in text
    assert "run its shell command with your rights" in text
    assert "Encoded pictures that each loading process holds" in text
    config = parse(
        TrainConfig,
        ["--output", "x", "--data.train", "http://h/{0..1}.tar", "--data.caption_weights", '{"a": 0.8, "b": 0.2}'],
    )
    assert config.data.train == "http://h/{0..1}.tar"
    assert config.data.caption_weights == {"a": 0.8, "b": 0.2}
