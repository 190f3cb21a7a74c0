"""A small POPE on plain pictures, in the form of Scenes."""

import json

import pytest
from PIL import Image


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
