"""Photos with captions as LLaVA data, and the loss that tells whether a model looks at its pictures."""

import io
import json
import math
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from mllm.assemble import assemble
from mllm.caption_loss import CaptionLossConfig, caption_loss
from mllm.captions_to_conversations import ConversionConfig, convert


@pytest.fixture
def shards(tmp_path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "val-0000.tar", "w") as tar:
        for number, captions in enumerate([["one", "two", "three"], ["alone"], ["never seen"]]):
            encoded = io.BytesIO()
            Image.new("RGB", (32, 32), (80 * number, 0, 0)).save(encoded, "JPEG")
            broken = number == 2
            files = {
                "jpg": encoded.getvalue()[: 50 if broken else None],
                "json": json.dumps({"captions": captions}).encode(),
            }
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"key{number}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def test_each_readable_photo_comes_once_in_both_lists_with_different_captions(shards, tmp_path, caplog):
    out = tmp_path / "out"
    assert convert(ConversionConfig(data=shards, out=out, split="val")) == 2
    pretrain, finetune = (json.loads((out / f"llava_{name}.json").read_text()) for name in ("pretrain", "finetune"))
    assert [s["image"] for s in pretrain] == [s["image"] for s in finetune] == ["val/key0.jpg", "val/key1.jpg"]
    first, second = pretrain[0]["conversations"][1]["value"], finetune[0]["conversations"][1]["value"]
    assert {first, second} < {"one", "two", "three"}
    assert pretrain[1]["conversations"][1]["value"] == finetune[1]["conversations"][1]["value"] == "alone"
    assert all(s["conversations"][0]["value"].startswith("<image>\n") for s in pretrain + finetune)
    with tarfile.open(shards / "val-0000.tar") as tar:
        member = tar.extractfile("key0.jpg")
        assert member is not None
        assert (out / "images" / "val" / "key0.jpg").read_bytes() == member.read()
    assert "val-0000.tar/key2" in caplog.text


def test_matching_questions_come_alone_and_behind_the_caption(shards, tmp_path):
    out = tmp_path / "out"
    convert(ConversionConfig(data=shards, out=out, split="val", matching=2))
    lists = {
        name: [sample["conversations"] for sample in json.loads((out / f"llava_{name}.json").read_text())]
        for name in ("pretrain", "finetune", "matching", "mixed")
    }
    for told, asked, mixed in zip(lists["finetune"], lists["matching"], lists["mixed"], strict=True):
        assert asked[0]["value"].startswith("<image>\n")
        assert mixed == [*told, {**asked[0], "value": asked[0]["value"].removeprefix("<image>\n")}, *asked[1:]]
        assert sorted(turn["value"] for turn in asked[1::2]) == ["No", "Yes"]
    # The third caption of three: the other two are told.
    (right,) = (q["value"] for q, a in zip(*[iter(lists["matching"][0])] * 2, strict=True) if a["value"] == "Yes")
    assert right.split('"')[1] not in {lists[name][0][1]["value"] for name in ("pretrain", "finetune")}
    with pytest.raises(ValueError, match="even number"):
        ConversionConfig(data=shards, out=out, matching=1)


def test_caption_loss_is_the_models_own_loss_and_blank_pictures_make_the_other(tiny_parts, dialogues, tmp_path):
    model = assemble(tiny_parts["vision"], tiny_parts["llm"], None, tmp_path / "model")
    config = CaptionLossConfig(
        model=model, data=dialogues["pretrain"], image_folder=dialogues["images"], batch_size=4, device="cpu"
    )
    result = caption_loss(config)
    assert result["num_samples"] == 6
    assert result["num_tokens"] > 6
    # Random weights: near the uniform loss over a vocabulary of some 300.
    assert result["loss_image"] == pytest.approx(math.log(300), abs=0.7)
    assert result["loss_blank"] != result["loss_image"]
    for batch_size in (1, 6):
        other = caption_loss(
            CaptionLossConfig(
                model=model,
                data=dialogues["pretrain"],
                image_folder=dialogues["images"],
                batch_size=batch_size,
                device="cpu",
            )
        )
        torch.testing.assert_close(
            torch.tensor(other["loss_image"]), torch.tensor(result["loss_image"]), rtol=1e-5, atol=0
        )


def test_caption_loss_refuses_samples_without_a_picture(tiny_parts, dialogues, tmp_path):
    model = assemble(tiny_parts["vision"], tiny_parts["llm"], None, tmp_path / "model")
    with pytest.raises(ValueError, match="samples without a picture"):
        caption_loss(
            CaptionLossConfig(model=model, data=dialogues["finetune"], image_folder=dialogues["images"], device="cpu")
        )
