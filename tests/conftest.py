"""Fixtures shared by the whole suite."""

import os
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
def _truncated_pictures_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval switches this off for the whole process when its tasks are imported, and so for every later test."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
