"""Fixtures shared by the whole suite."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import ImageFile

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with development data that the project may not ship; VISION_MOE_SHARED names it."""
    folder = Path(os.environ.get("VISION_MOE_SHARED", CHECKOUT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"no development data at {folder}; set VISION_MOE_SHARED to the folder that holds data/")
    return folder


@pytest.fixture(autouse=True)
def _log_level_is_the_tests_own() -> Iterator[None]:
    """Entry points set the level of the root logger, below which later tests would see no log."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)


@pytest.fixture(autouse=True)
def _truncated_pictures_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval switches this off for the whole process when its tasks are imported, and so for every later test."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
