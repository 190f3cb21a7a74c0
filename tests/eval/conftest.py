"""A small POPE on plain pictures, in the form of Scenes, and a tiny CLIP in a folder."""

import json

import pytest
from PIL import Image

from vision_moe.recipe import ScratchConfig
from vision_moe.scratch import build_clip


@pytest.fixture(scope="session")
def pope_folder(tmp_path_factory):
    """Six questions about three pictures, yes and no in turn, in two categories."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "images" / "test").mkdir(parents=True)
    lines = []
    for index, color in enumerate(["red", "green", "blue"]):
        image = f"test/{index}.png"
        Image.new("RGB", (32, 32), color).save(folder / "images" / image)
        for label, asked in (("yes", color), ("no", "white")):
            lines.append(
                {
                    "question_id": len(lines) + 1,
                    "image": image,
                    "text": f"Is there a {asked} wall in the image?",
                    "label": label,
                    "category": "random" if index < 2 else "popular",
                }
            )
    (folder / "pope_test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A CLIP of 2 + 2 layers and width 32 for pictures of 32 pixels, with random weights."""
    config = ScratchConfig(
        image_size=32,
        patch_size=16,
        hidden_size=32,
        num_vision_layers=2,
        num_text_layers=2,
        num_heads=2,
        projection_dim=16,
        max_text_tokens=12,
        vocab_size=300,
    )
    model, processor = build_clip(config, [f"a {color} picture" for color in ("red", "green", "blue", "white")], seed=0)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
