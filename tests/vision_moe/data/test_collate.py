"""Batches for a CLIP: padding, truncation, positions."""

import pytest
import torch
from PIL import Image
from transformers import CLIPProcessor

from vision_moe.data.collate import CaptionCollator


def _sample(index: int, caption: str) -> dict[str, object]:
    return {"image": Image.new("RGB", (40, 50), (255, 0, 0)), "caption": caption, "index": index}


def test_captions_are_padded_to_the_longest_of_the_batch(tiny_processor):
    batch = CaptionCollator(tiny_processor)([_sample(7, "a photo"), _sample(3, "red")])
    # <bos>=1 <eos>=3 <pad>=0; a=4 photo=5 red=7
    assert batch["input_ids"].tolist() == [[1, 4, 5, 3], [1, 7, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["index"].tolist() == [7, 3]
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["pixel_values"].dtype == torch.float32


def test_long_captions_are_cut_and_keep_their_end_token(tiny_processor):
    long = _sample(0, " ".join(["red"] * 50))
    ids = CaptionCollator(tiny_processor)([long])["input_ids"]
    assert ids.tolist() == [[1, 7, 7, 7, 7, 7, 7, 3]]
    assert CaptionCollator(tiny_processor, max_length=4)([long])["input_ids"].tolist() == [[1, 7, 7, 3]]


def test_a_tokenizer_without_limit_needs_max_length(tiny_processor):
    class Endless:
        model_max_length = int(1e30)

    processor = CLIPProcessor.__new__(CLIPProcessor)
    processor.tokenizer = Endless()
    with pytest.raises(ValueError, match="pass max_length"):
        CaptionCollator(processor)
