"""The wheel ships the two packages with their data, and nothing else."""

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def test_wheel_holds_vision_moe_and_mllm_with_recipes_and_assets(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(CHECKOUT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("vision_moe-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"vision_moe", "mllm"}
    for package in ("vision_moe", "mllm"):
        for recipe in (CHECKOUT / package / "recipes").glob("*.yaml"):
            assert f"{package}/recipes/{recipe.name}" in names
    for name in ("vision_moe/assets/scenes_clip", "vision_moe/assets/scenes_llama"):
        assert f"{name}/model.safetensors" in names
        assert f"{name}/tokenizer.json" in names
    assert "mllm/zero2.json" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_shipped_weights_stay_below_30_mb():
    weights = list((CHECKOUT / "vision_moe" / "assets").rglob("*.safetensors"))
    assert len(weights) == 2
    assert sum(path.stat().st_size for path in weights) <= 30e6


def test_no_foreign_package_is_called_mllm():
    assert set(importlib.metadata.packages_distributions()["mllm"]) == {"vision-moe"}
