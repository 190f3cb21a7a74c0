"""A small Scenes set and the flags of a tiny run on it."""

from pathlib import Path

import pytest

from vision_moe.data.scenes import ScenesArguments, generate

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
