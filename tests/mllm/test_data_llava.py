"""LlavaDataset, LlavaCollator and the image processing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mllm.collate import LlavaCollator
from mllm.data import LlavaDataset, SkippedSample, UnusableSampleError
from mllm.images import build_image_processor, pixels, set_aspect_ratio

Writer = Callable[..., tuple[Path, Path]]
TURNS = [{"from": "human", "value": "<image>\nIs there a dog?"}, {"from": "gpt", "value": "Yes."}]
TEXT_TURNS = [{"from": "human", "value": "Is there a dog?"}, {"from": "gpt", "value": "No, there is no dog."}]
SAMPLE = {"id": "one", "image": "a.png", "conversations": TURNS}
TEXT_SAMPLE = {"id": "two", "conversations": TEXT_TURNS}
VISION = CLIPVisionConfig(image_size=32, patch_size=8)


@pytest.fixture
def open_data(write_llava: Writer, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlavaDataset]:
    tiny_tokenizer.add_tokens(["<image>"], special_tokens=True)

    def build(*samples: dict[str, Any], name: str = "data.json", **settings: Any) -> LlavaDataset:
        path, images = write_llava(list(samples), name)
        settings = {"template": "v1", "num_image_tokens": 16, "image_folder": images, **settings}
        return LlavaDataset(
            path,
            tokenizer=tiny_tokenizer,
            image_processor=build_image_processor(VISION, "pad"),
            **settings,
        )

    return build


def test_a_picture_takes_its_number_of_tokens_and_none_is_supervised(open_data: Any) -> None:
    data = open_data(SAMPLE)
    item = data[0]
    at_image = [
        label for id_, label in zip(item["input_ids"], item["labels"], strict=True) if id_ == data.image_token_id
    ]
    assert at_image == [-100] * 16
    assert item["pixel_values"].shape == (1, 3, 32, 32)
    assert data.tokenizer.decode([label for label in item["labels"] if label != -100]) == " Yes.</s>"


def test_a_sample_of_text_brings_no_pixels(open_data: Any) -> None:
    item = open_data(TEXT_SAMPLE)[0]
    assert item.keys() == {"input_ids", "labels"}


def test_json_lines_hold_the_same_samples_as_a_list(open_data: Any) -> None:
    # U+2028 ends a line for str.splitlines, not for JSON lines.
    odd = {**TEXT_SAMPLE, "conversations": [TEXT_TURNS[0], {"from": "gpt", "value": "a\u2028b"}]}
    assert open_data(SAMPLE, odd, name="data.jsonl")[1] == open_data(SAMPLE, odd)[1]


@pytest.mark.parametrize("template", ["v1", "llama_2", "chatml", "chat"])
def test_several_pictures_come_in_the_order_of_their_turns(open_data: Any, tmp_path: Path, template: str) -> None:
    turns = [{"from": "human", "value": "Is <image>\nlike <image>?"}, TURNS[1], *TURNS]
    data = open_data({"images": ["a.png", "b.png", "a.png"], "conversations": turns}, template=template)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "images" / "b.png")
    item = data[0]
    assert item["input_ids"].count(data.image_token_id) == 3 * 16
    first, second, third = item["pixel_values"]
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


def test_lengths_and_modality_are_known_without_reading_a_picture(open_data: Any) -> None:
    data = open_data({**SAMPLE, "image": "absent.png"}, TEXT_SAMPLE)
    # Words of both turns, and the 16 tokens of a picture.
    assert data.lengths.tolist() == [6 + 16, 9]
    assert data.has_image.tolist() == [True, False]


def test_long_text_is_cut_at_its_end(open_data: Any) -> None:
    whole = open_data(SAMPLE)[0]
    cut = open_data(SAMPLE, max_length=len(whole["input_ids"]) - 2)[0]
    assert cut["input_ids"] == whole["input_ids"][:-2]
    assert cut["labels"] == whole["labels"][:-2]


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"conversations": [TURNS[0], {"from": "gpt", "value": ""}]}, {}, "answer is empty"),
        ({"image": "b.png"}, {}, r"cannot read the picture .*b\.png: FileNotFoundError"),
        ({"image": "torn.png"}, {}, r"cannot read the picture .*torn\.png"),
        ({"image": ["a.png", "a.png"]}, {}, r"2 picture\(s\) but 1 <image> placeholder"),
        ({"image": None, "images": ["a.png"] * 3}, {}, r"3 picture\(s\) but 1 <image> placeholder"),
        ({"conversations": [*TURNS, *TURNS]}, {}, r"1 picture\(s\) but 2 <image> placeholder"),
        ({"conversations": TEXT_TURNS}, {}, r"1 picture\(s\) but 0 <image> placeholder"),
        ({"image": None}, {}, r"0 picture\(s\) but 1 <image> placeholder"),
        ({}, {"max_length": 50}, "may not be cut"),
        ({}, {"max_length": 150, "template": "chat"}, None),
        ({}, {"image_folder": None}, "no image_folder was given"),
    ],
)
def test_an_unusable_sample_is_an_error_that_names_it(
    open_data: Any, tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any], message: str | None
) -> None:
    data = open_data({**SAMPLE, **changes}, **settings)
    whole = (tmp_path / "images" / "a.png").read_bytes()
    (tmp_path / "images" / "torn.png").write_bytes(whole[: len(whole) // 2])
    if message is None:
        assert data[0]["input_ids"]
        return
    with pytest.raises(ValueError, match=r"sample 'one' \(number 0\): .*" + message):
        data[0]


def test_a_sample_whose_answer_is_cut_away_is_an_error(open_data: Any) -> None:
    length = len(open_data(TEXT_SAMPLE)[0]["input_ids"])
    supervised = sum(label != -100 for label in open_data(TEXT_SAMPLE)[0]["labels"])
    with pytest.raises(ValueError, match="no answer begins within max_length"):
        open_data(TEXT_SAMPLE, max_length=length - supervised)[0]


@pytest.mark.parametrize("template", ["v1", "llama_2", "chatml", "chat"])
@pytest.mark.parametrize("num_turns", [2, 6])
def test_no_length_cuts_the_tokens_of_a_picture(open_data: Any, template: str, num_turns: int) -> None:
    """At any max_length a sample has all tokens of all its pictures, or is an error."""
    turns = (TURNS * 3)[:num_turns]
    sample = {"images": ["a.png"] * (num_turns // 2), "conversations": turns}
    data = open_data(sample, template=template)
    whole = data.encoded(0)
    usable = 0
    for max_length in range(len(whole.input_ids) + 1, 16, -3):
        data.max_length = max_length
        try:
            encoded = data.encoded(0)
        except UnusableSampleError:
            continue
        usable += 1
        assert encoded.input_ids == whole.input_ids[:max_length]
        assert encoded.labels == whole.labels[:max_length]
        assert encoded.input_ids.count(data.image_token_id) == 16 * len(encoded.pictures)
        assert encoded.num_cut == max(0, len(whole.input_ids) - max_length)
    assert usable >= 2


@pytest.mark.parametrize("changes", [{"image": "b.png"}, {"image": "torn.png"}])
def test_a_sample_without_its_picture_is_skipped_by_choice(
    open_data: Any, tmp_path: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    data = open_data(SAMPLE, {**SAMPLE, **changes}, bad_samples="skip")
    (tmp_path / "images" / "torn.png").write_bytes((tmp_path / "images" / "a.png").read_bytes()[:200])
    assert "pixel_values" in data[0]
    assert isinstance(data[1], SkippedSample)
    assert "skipped sample 'one' (number 1): cannot read the picture" in caplog.text


def test_a_malformed_sample_is_never_skipped(open_data: Any) -> None:
    with pytest.raises(ValueError, match="but 0 <image> placeholder"):
        open_data({**SAMPLE, "conversations": TEXT_TURNS}, bad_samples="skip")[0]


@pytest.mark.parametrize("content", [{}, [], [{"id": "x"}]])
def test_a_file_of_another_form_is_an_error(open_data: Any, write_llava: Writer, content: Any) -> None:
    path, _ = write_llava(content)
    data = open_data(SAMPLE)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"must (hold a list|be an object)"):
        LlavaDataset(path, None, data.tokenizer, data.image_processor, "v1", 16)


def test_a_tokenizer_without_the_image_token_is_an_error(
    write_llava: Writer, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    path, images = write_llava([SAMPLE])
    with pytest.raises(ValueError, match="no <image> token"):
        LlavaDataset(path, images, tiny_tokenizer, build_image_processor(VISION, "pad"), "v1", 16)


def test_batches_are_padded_on_the_right_and_stack_what_pictures_there_are(open_data: Any) -> None:
    data = open_data(SAMPLE, TEXT_SAMPLE, SAMPLE)
    items = [data[0], data[1], data[2]]
    batch = LlavaCollator(pad_token_id=3, pad_to_multiple_of=8)(items)
    length = max(len(item["input_ids"]) for item in items)
    assert batch["input_ids"].shape == (3, -(-length // 8) * 8)
    for row, item in enumerate(items):
        size = len(item["input_ids"])
        assert batch["attention_mask"][row].tolist() == [1] * size + [0] * (batch["input_ids"].shape[1] - size)
        assert batch["input_ids"][row, :size].tolist() == item["input_ids"]
        assert batch["labels"][row, :size].tolist() == item["labels"]
        assert set(batch["input_ids"][row, size:].tolist()) <= {3}
        assert set(batch["labels"][row, size:].tolist()) <= {-100}
    assert torch.equal(batch["pixel_values"], torch.cat([items[0]["pixel_values"], items[2]["pixel_values"]]))
    assert "pixel_values" not in LlavaCollator(pad_token_id=3)([data[1]])


@pytest.mark.parametrize("size", [(44, 30), (30, 44), (33, 33), (31, 44)])
def test_pad_is_llavas_expand_to_square_and_square_is_clips_crop(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    processor = build_image_processor(VISION, "pad")
    clip = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})

    side = max(size)
    square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in clip.image_mean))
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    expected = clip(images=square, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(pixels(processor, image), expected)

    set_aspect_ratio(processor, "square")
    assert torch.equal(pixels(processor, image), clip(images=image, return_tensors="pt")["pixel_values"][0])


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
@pytest.mark.parametrize("size", [(640, 480), (333, 501), (336, 336), (40, 1000), (1025, 7)])
def test_pixels_are_bit_for_bit_those_of_pillow_and_numpy(size: tuple[int, int], aspect_ratio: Any) -> None:
    """LLaVA-1.5's steps written out, at the size of its tower."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    actual = pixels(build_image_processor(CLIPVisionConfig(image_size=336, patch_size=14), aspect_ratio), image)

    if aspect_ratio == "pad":
        # (122, 116, 104) is int(255 x CLIP's mean).
        square = Image.new("RGB", (max(size), max(size)), (122, 116, 104))
        square.paste(image, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
        image = square
    width, height = (int(336 * side / min(image.size)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - 336) // 2, (height - 336) // 2
    values = np.asarray(image.crop((left, top, left + 336, top + 336))).astype(np.float64) * (1 / 255)
    mean = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
    std = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
    expected = (values.astype(np.float32) - mean) / std
    assert torch.equal(actual, torch.from_numpy(expected).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_pictures_of_any_mode_become_rgb(picture: Image.Image, mode: str) -> None:
    assert pixels(build_image_processor(VISION, "pad"), picture.convert(mode)).shape == (3, 32, 32)


def test_an_unknown_aspect_ratio_is_an_error() -> None:
    with pytest.raises(ValueError, match="choose one of: square, pad"):
        build_image_processor(VISION, "anyres")  # type: ignore[arg-type]


def test_a_towers_own_mean_and_deviation_are_kept(tmp_path: Path) -> None:
    CLIPImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(tmp_path)
    processor = build_image_processor(VISION, "pad", tmp_path)
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.5] * 3, [0.25] * 3)
    assert processor.crop_size["height"] == 32
