"""A small Scenes set and the flags of a tiny run on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vision_moe.config import parse
from vision_moe.data.scenes import ScenesArguments, generate
from vision_moe.recipe import TrainConfig
from vision_moe.train import run
from vision_moe.trainer import ContrastiveTrainer

CHECKOUT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def small_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 training and 24 test pictures."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    generate(folder, ScenesArguments(num=128, num_test=24, shard_size=64), num_workers=1, progress=False)
    return folder


@pytest.fixture(scope="session")
def recipes() -> Path:
    """Folder of the encoder recipes."""
    return CHECKOUT / "vision_moe" / "recipes"


@pytest.fixture
def train_dense(small_scenes: Path, recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """train_dense(output, *flags, stop_in=None): trains a tiny CLIP for four steps, with a checkpoint after each.

    It returns the model's folder, or raises InterruptedError in the step `stop_in`, counted from 1 in this call.
    """
    step = ContrastiveTrainer.training_step

    def train(output: Path, *flags: str, stop_in: int | None = None) -> Path:
        taken = []

        def count(self: ContrastiveTrainer, *args: Any, **kwargs: Any) -> Any:
            taken.append(1)
            if len(taken) == stop_in:
                raise InterruptedError
            return step(self, *args, **kwargs)

        monkeypatch.setattr(ContrastiveTrainer, "training_step", count)
        recipe = [str(recipes / "scenes.yaml"), str(recipes / "smoke.yaml")]
        data = ["--data.train", str(small_scenes), "--output", str(output), "--factor_pictures", "4"]
        steps = ["--dense.samples", "128", "--save_steps", "1", "--bf16", "false", "--methods", "[dense]"]
        return run(parse(TrainConfig, [*recipe, *data, *steps, *flags]))["dense"]

    return train
