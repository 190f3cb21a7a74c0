"""Data sets of other makers at random access: img2dataset, ShareGPT4V, Hugging Face."""

import json
import pickle

import datasets
import pytest
from PIL import Image

from vision_moe.data.archive import DamagedShardError
from vision_moe.data.captions import open_dataset
from vision_moe.data.read_config import ReadConfig


def first_captions(dataset):
    return [dataset.captions(index)[0] for index in range(len(dataset))]


def test_img2dataset_shards_need_no_split_and_no_field(numbered_shards):
    dataset = open_dataset(numbered_shards, ReadConfig())
    assert first_captions(dataset) == [f"number {number}" for number in range(20)]
    assert dataset.name(7) == "00001.tar/000010007"
    again = open_dataset(numbered_shards, ReadConfig(caption_field="re_caption"))
    assert first_captions(again)[:2] == ["again 0", "again 1"]


def test_shards_with_text_files_alone_are_open_clips_form(tmp_path, write_tar, encode):
    picture = encode(Image.new("RGB", (4, 4)))
    write_tar(tmp_path / "train-0.tar", {"a.png": picture, "a.txt": b"one\n", "b.png": picture, "b.txt": b"two"})
    assert first_captions(open_dataset(tmp_path, ReadConfig())) == ["one", "two"]
    assert open_dataset(tmp_path, ReadConfig(caption_field="txt")).captions(1) == ["two"]


def test_img2dataset_files_are_found_at_any_depth(tmp_path, encode):
    for folder, number in (("00000", 0), ("00001", 1)):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / f"{folder}0000"
        path.with_suffix(".jpg").write_bytes(encode(Image.new("RGB", (4, 4)), "JPEG"))
        path.with_suffix(".json").write_text(json.dumps({"caption": f"row {number}", "status": "success"}))
        path.with_suffix(".txt").write_text(f"text {number}")
        (tmp_path / f"{folder}.parquet").write_bytes(b"")
    dataset = open_dataset(tmp_path, ReadConfig())
    assert first_captions(dataset) == ["row 0", "row 1"]
    assert first_captions(open_dataset(tmp_path, ReadConfig(caption_field="txt"))) == ["text 0", "text 1"]
    assert dataset.name(1) == "00001/000010000.jpg"


def test_sharegpt4v_needs_no_field(tmp_path, encode):
    (tmp_path / "sam" / "images").mkdir(parents=True)
    (tmp_path / "sam" / "images" / "sa_545504.jpg").write_bytes(encode(Image.new("RGB", (4, 4)), "JPEG"))
    turns = [
        {"from": "human", "value": "What do you see happening in this image?\n<image>"},
        {"from": "gpt", "value": "In the center of the image,\na lake."},
    ]
    path = tmp_path / "share-captioner_coco_lcs_sam_1246k_1107.json"
    path.write_text(json.dumps([{"id": "0", "image": "sam/images/sa_545504.jpg", "conversations": turns}]))
    assert open_dataset(path, ReadConfig()).captions(0) == ["In the center of the image, a lake."]


def test_damaged_shards_keep_what_lies_before_the_damage_by_choice(numbered_shards, caplog):
    shard = numbered_shards / "00001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: whole.index(b"000010008.jpg")])
    with pytest.raises(DamagedShardError, match=r"00001\.tar is damaged .*after 2 samples.*damaged_shards"):
        open_dataset(numbered_shards, ReadConfig())
    dataset = open_dataset(numbered_shards, ReadConfig(damaged_shards="skip"))
    assert first_captions(dataset) == [f"number {number}" for number in [*range(7), *range(10, 20)]]
    assert "00001.tar is damaged after 2 samples" in caplog.text


def test_large_pictures_are_unreadable(numbered_shards):
    with pytest.raises(ValueError, match=r"20 of 20 .*8 x 8 pixels; at most 63"):
        open_dataset(numbered_shards, ReadConfig(max_pixels=63))


def test_urls_cannot_be_read_at_random_access():
    with pytest.raises(ValueError, match="can only be streamed"):
        open_dataset("http://example.org/{0..3}.tar", ReadConfig())


@pytest.fixture
def rows(encode):
    """Five pictures with two caption columns."""
    return {
        "picture": [{"bytes": encode(Image.new("RGB", (4, 4), (n, 0, 0))), "path": None} for n in range(5)],
        "caption": [f"row {n}" for n in range(5)],
        "others": [[f"more {n}", f"still more {n}"] for n in range(5)],
    }


@pytest.mark.parametrize("kind", ["parquet", "plain parquet", "save_to_disk", "splits on disk"])
def test_hugging_face_folders_open_by_column(tmp_path, rows, kind, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_dict(rows)
    if kind != "plain parquet":
        table = table.cast_column("picture", datasets.Image())
    folder = tmp_path / "set"
    if kind == "save_to_disk":
        table.save_to_disk(folder)
    elif kind == "splits on disk":
        datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(folder)
    else:
        folder.mkdir()
        table.to_parquet(folder / "train-00000-of-00001.parquet")
    config = ReadConfig(format="hf", image_field="picture", caption_field="caption+others")
    dataset = open_dataset(folder, config, check_cache=tmp_path / "check.json")
    assert len(dataset) == 5
    assert dataset.captions(3) == ["row 3", "more 3", "still more 3"]
    assert dataset[4]["image"].getpixel((0, 0)) == (4, 0, 0)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[2]["image"].tobytes() == dataset[2]["image"].tobytes()
    assert dataset.fingerprint == open_dataset(folder, config).fingerprint


def test_hugging_face_mistakes_are_named(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)}).save_to_disk(folder)
    with pytest.raises(
        ValueError, match=r"no column 'image'; there are \['caption', 'others', 'picture'\].*img2dataset"
    ):
        open_dataset(folder, ReadConfig(format="hf"))
    with pytest.raises(ValueError, match=r"no split 'val' .*\['train'\]"):
        open_dataset(folder, ReadConfig(format="hf", image_field="picture"), split="val")
    with pytest.raises(ValueError, match='format "hf"'):
        open_dataset(folder, ReadConfig())
