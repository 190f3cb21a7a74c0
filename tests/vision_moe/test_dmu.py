"""DMU's stages: which model each of them starts from."""

from pathlib import Path

import pytest

from vision_moe.config import parse
from vision_moe.dmu import run_dmu
from vision_moe.recipe import TrainConfig


class RecordingRunner:
    """Runs nothing, and keeps the folder that each MCL stage would load."""

    def __init__(self, config):
        self.config = config
        self.dataset = range(8)
        self.starts = []

    def is_finished(self, name):
        return False

    def run(self, stage, make_model):
        if stage.name.startswith("mcl"):
            self.starts.append(*make_model.args)
        return Path(stage.name)


@pytest.mark.parametrize(
    ("init_from", "starts"), [("base", ["start", "start", "start"]), ("previous", ["start", "mcl1", "mcl2"])]
)
def test_a_stage_starts_from_the_dense_model_or_from_the_stage_before(tmp_path, init_from, starts):
    flags = ["--clustering.init_from", init_from, "--clustering.random_batches", "true"]
    config = parse(TrainConfig, ["--output", str(tmp_path), "--data.train", "x", *flags])
    runner = RecordingRunner(config)
    models = run_dmu(runner, Path("start"))
    assert runner.starts == [Path(start) for start in starts]
    assert list(models) == ["mcl1", "mcl2", "mcl3", "dmu"]
