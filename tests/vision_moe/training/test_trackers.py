"""Experiment trackers: refused before a run when absent, one run for each stage otherwise."""

import pytest
from transformers import TrainerState, TrainingArguments

from mllm.recipe import LlavaConfig
from mllm.train import run as run_llava
from vision_moe import trackers
from vision_moe.config import parse
from vision_moe.recipe import TrainConfig
from vision_moe.trackers import tracker_callbacks
from vision_moe.train import run


@pytest.mark.parametrize(
    ("start", "recipe", "data"), [(run, TrainConfig, ["--data.train", "nowhere"]), (run_llava, LlavaConfig, [])]
)
def test_an_absent_tracker_stops_a_run_before_it_begins(start, recipe, data, tmp_path, monkeypatch):
    monkeypatch.setitem(trackers._IS_AVAILABLE, "trackio", lambda: False)
    config = parse(recipe, ["--output", str(tmp_path / "run"), "--report_to", "[trackio]", *data])
    with pytest.raises(ModuleNotFoundError, match="trackio, not installed here: pip install trackio"):
        start(config)
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused_by_the_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--output", str(tmp_path), "--data.train", "x", "--report_to", "[mlflow]"])
    assert "wandb" in capsys.readouterr().err


def log_two_stages(names, folder):
    """Lets the trackers of two stages hear of one step each."""
    for stage in ("mcl1", "mcl2"):
        args = TrainingArguments(
            str(folder / stage / "checkpoints"), run_name=trackers.run_name(folder / stage), use_cpu=True, report_to=[]
        )
        state = TrainerState(global_step=1, is_world_process_zero=True, is_local_process_zero=True)
        for callback in tracker_callbacks(names, folder / stage):
            callback.on_train_begin(args, state, None, model=None)
            callback.on_log(args, state, None, model=None, logs={"loss": 1.0})
            callback.on_train_end(args, state, None, model=None)


def test_wandb_gets_one_named_run_for_each_stage(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    begun, init = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **settings: begun.append(settings["name"]) or init(**settings))
    log_two_stages(("wandb",), tmp_path / "scenes")
    assert begun == ["scenes/mcl1", "scenes/mcl2"]
    assert wandb.run is None


def test_tensorboards_files_stay_when_the_checkpoints_go(tmp_path):
    pytest.importorskip("tensorboard")
    log_two_stages(("tensorboard",), tmp_path / "scenes")
    events = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("events.out.tfevents.*"))
    assert events == ["scenes/tensorboard/mcl1", "scenes/tensorboard/mcl2"]
