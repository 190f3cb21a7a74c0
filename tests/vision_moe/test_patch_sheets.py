"""Which patches an expert keeps, and where they are cut from, worked by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vision_moe.moe.router import Router
from vision_moe.patch_sheets import TopPatch, TopPatches, crop, write_sheet
from vision_moe.routing_trace import Visit


def _visit(scores: Any, index: list[int], *, top_k: int = 1, modality: str = "vision") -> Visit:
    """Scores float[B, S, E] of pictures with one class token and the patches after it."""
    scores_VE = torch.tensor(scores).flatten(0, 1)
    routed = Router(8, scores_VE.shape[-1], top_k).decide(scores_VE.log())
    return Visit(
        modality,
        3,
        None,  # type: ignore[arg-type]  # not asked for
        torch.tensor(index),
        torch.arange(len(scores_VE)),
        torch.zeros(len(scores_VE), 8),
        routed,
        routed.topk_experts_TK,
    )


def test_best_patch_of_each_picture_is_kept_best_first() -> None:
    top = TopPatches(num_patches=2, num_kept=2)
    # The class token, first of each picture, would be the best of all.
    top(_visit([[[0.99, 0.01], [0.6, 0.4], [0.7, 0.3]], [[0.99, 0.01], [0.2, 0.8], [0.9, 0.1]]], [0, 1]))
    top(_visit([[[0.99, 0.01], [0.8, 0.2], [0.3, 0.7]]], [2]))
    (block, experts) = next(iter(top.blocks().items()))
    assert block == 3
    assert [(found.picture, found.patch) for found in experts[0]] == [(1, 1), (2, 0)]
    assert [found.score for found in experts[0]] == pytest.approx([0.9, 0.8])
    # Picture 0 sends expert 1 nothing, whatever its score.
    assert [(found.picture, found.patch) for found in experts[1]] == [(1, 0), (2, 1)]


def test_an_expert_that_took_no_patch_has_none() -> None:
    top = TopPatches(num_patches=1, num_kept=4)
    top(_visit([[[0.5, 0.5], [0.9, 0.1]]], [0]))
    assert [len(found) for found in top.blocks()[3]] == [1, 0]


def test_captions_have_no_patches() -> None:
    top = TopPatches(num_patches=1, num_kept=1)
    top(_visit([[[0.5, 0.5], [0.9, 0.1]]], [0], modality="text"))
    assert top.blocks() == {}


def test_tokens_that_are_not_whole_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens of 1 pictures are not 4 patches"):
        TopPatches(num_patches=4, num_kept=1)(_visit([[[0.5, 0.5]] * 3], [0]))


def test_a_crop_has_the_patch_in_its_middle() -> None:
    pixels = np.zeros((40, 40, 3), dtype=np.uint8)
    # Patch (1, 2) of 4 x 4.
    pixels[10:20, 20:30] = 255
    tile = np.asarray(crop(Image.fromarray(pixels), 1 * 4 + 2, (4, 4)))
    assert (tile[48, 48] == 255).all()
    # One patch to the left, and beyond the upper edge.
    assert (tile[48, 24] == 0).all()
    assert (tile[2, 48] == 0).all()


def test_a_sheet_has_a_row_an_expert(tmp_path: Path) -> None:
    class Red:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"image": Image.new("RGB", (8, 8), "red")}

    def process(images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.from_numpy(np.array(images[0])).permute(2, 0, 1)[None] / 255}

    class Processor(SimpleNamespace):
        def __call__(self, **kwargs: Any) -> dict[str, torch.Tensor]:
            return process(**kwargs)

    processor = Processor(image_mean=[0, 0, 0], image_std=[1, 1, 1])
    write_sheet([[TopPatch(0.9, 0, 3)], []], Red(), processor, (2, 2), tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    # Rows of 96 and 2 pixels; the first 24 columns are the label.
    assert sheet.shape == (2 * 98, 24 + 98, 3)
    assert sheet[40, 24 + 48].tolist() == [255, 0, 0]
    assert (sheet[98:, 24:] == 255).all()
