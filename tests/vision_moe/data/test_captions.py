"""Captioned pictures from shards and lists: what is read, drawn, skipped and refused."""

import json
import logging
import os
import pickle

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from vision_moe.data import open_captions


@pytest.fixture
def shards(tmp_path, write_shard):
    """Two train shards of 3 + 2 pictures and one val shard of one."""
    samples = {f"k{i}": {"captions": [f"one {i}", f"two {i}", f"three {i}"], "long": f"all of {i}"} for i in range(6)}
    parts = {"train-0000": range(3), "train-0001": range(3, 5), "val-0000": range(5, 6)}
    for name, keys in parts.items():
        write_shard(tmp_path / f"{name}.tar", {f"k{i}": samples[f"k{i}"] for i in keys})
    return tmp_path


@pytest.fixture
def pictures(tmp_path):
    """Folder with a.png to d.png."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, name in enumerate("abcd"):
        Image.new("L", (8, 4), 60 * number).save(folder / f"{name}.png")
    return folder


def test_shards_of_a_split_are_read_in_order(shards):
    dataset = open_captions(shards)
    assert [dataset.name(i) for i in range(len(dataset))] == [
        "train-0000.tar/k0",
        "train-0000.tar/k1",
        "train-0000.tar/k2",
        "train-0001.tar/k3",
        "train-0001.tar/k4",
    ]
    assert dataset.captions(3) == ["one 3", "two 3", "three 3"]
    sample = dataset[3]
    assert (sample["image"].mode, sample["image"].size, sample["index"]) == ("RGB", (32, 32), 3)
    assert sample["caption"] in dataset.captions(3)
    assert len(open_captions(shards, split="val")) == 1


def test_metadata_and_a_string_field_are_at_hand(shards):
    dataset = open_captions(shards, caption_field="long")
    assert dataset.captions(4) == ["all of 4"]
    assert dataset.metadata(4)["captions"][0] == "one 4"


def test_captions_of_joined_fields_are_pooled(shards):
    assert open_captions(shards, caption_field="captions+long").captions(0) == ["one 0", "two 0", "three 0", "all of 0"]
    with pytest.raises(ValueError, match="'short'"):
        open_captions(shards, caption_field="captions+short")


def test_caption_depends_on_seed_epoch_and_picture_only(shards):
    first, again = (open_captions(shards, seed=0) for _ in range(2))
    draws = [[first.caption(i, epoch) for i in range(5)] for epoch in range(20)]
    assert [[again[(i, epoch)]["caption"] for i in range(5)] for epoch in range(20)] == draws
    assert again[2]["caption"] == again[(2, 0)]["caption"]
    assert {captions[0] for captions in draws} == {"one 0", "two 0", "three 0"}
    other = open_captions(shards, seed=1)
    assert [[other.caption(i, epoch) for i in range(5)] for epoch in range(20)] != draws


def test_dataset_survives_pickling_and_worker_processes(shards):
    dataset = open_captions(shards)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[4]["caption"] == dataset[4]["caption"]
    keys = [[(4, 1), (0, 1)], [(2, 1), (3, 1)]]
    loader = DataLoader(dataset, batch_sampler=keys, num_workers=2, collate_fn=list)
    read = [(s["index"], s["caption"], s["image"].tobytes()) for batch in loader for s in batch]
    assert read == [(i, dataset.caption(i, 1), dataset.image(i).tobytes()) for i in (4, 0, 2, 3)]


def test_sharegpt4v_list_gives_the_answer_on_one_line(pictures):
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Grey.\nAll of it."}]
    rows = [{"id": "1", "image": "pictures/a.png", "conversations": turns}]
    path = pictures.parent / "list.json"
    path.write_text(json.dumps(rows))
    dataset = open_captions(path)
    assert dataset[0]["caption"] == "Grey. All of it."
    assert dataset[0]["image"].mode == "RGB"


def test_jsonl_takes_caption_or_captions(pictures):
    path = pictures.parent / "list.jsonl"
    rows = [{"image": "a.png", "caption": "one"}, {"image": "b.png", "captions": ["two", "three"]}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    dataset = open_captions(path, image_dir=pictures)
    assert [dataset.captions(i) for i in range(2)] == [["one"], ["two", "three"]]


def test_unreadable_pictures_are_skipped_counted_and_named(tmp_path, write_shard, caplog):
    samples = {f"k{i}": {"captions": [f"number {i}"]} for i in range(10)}
    write_shard(tmp_path / "train-0000.tar", samples, broken=("k3",))
    with caplog.at_level(logging.WARNING):
        dataset = open_captions(tmp_path, max_unreadable_share=0.1)
    assert [dataset.caption(i) for i in range(len(dataset))] == [f"number {i}" for i in range(10) if i != 3]
    assert list(dataset.unreadable) == ["train-0000.tar/k3"]
    assert "1 of 10 pictures (10.00%) cannot be read: train-0000.tar/k3" in caplog.text


def test_too_many_unreadable_pictures_are_an_error(tmp_path, write_shard):
    samples = {f"k{i}": {"captions": ["x"]} for i in range(10)}
    write_shard(tmp_path / "train-0000.tar", samples, broken=("k3",))
    with pytest.raises(ValueError, match=r"1 of 10 .*train-0000\.tar/k3.*max_unreadable_share"):
        open_captions(tmp_path, max_unreadable_share=0.09)


def test_missing_and_cut_pictures_of_a_list_are_unreadable(pictures):
    Image.effect_noise((64, 64), 50).save(pictures / "b.jpg")
    (pictures / "b.jpg").write_bytes((pictures / "b.jpg").read_bytes()[:-500])
    path = pictures / "list.json"
    names = ["a.png", "b.jpg", "c.png", "e.png"]
    path.write_text(json.dumps([{"image": name, "caption": name[0]} for name in names]))
    dataset = open_captions(path, max_unreadable_share=0.5)
    assert set(dataset.unreadable) == {"b.jpg", "e.png"}
    assert [dataset.caption(i) for i in range(2)] == ["a", "c"]


def test_pictures_without_a_caption_are_skipped_like_unreadable_ones(tmp_path, write_shard):
    samples = {f"k{i}": {"captions": [f"number {i}"]} for i in range(4)}
    samples["k0"] = {"captions": ["fine", " \n"]}
    samples["k2"] = {"captions": []}
    write_shard(tmp_path / "train-0000.tar", samples)
    dataset = open_captions(tmp_path, max_unreadable_share=0.5)
    assert [dataset.caption(i) for i in range(len(dataset))] == ["number 1", "number 3"]
    assert "empty caption" in dataset.unreadable["train-0000.tar/k0"]
    with pytest.raises(ValueError, match="2 of 4 pictures"):
        open_captions(tmp_path)


def test_check_is_kept_until_a_file_changes(shards, tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "check.json"
    open_captions(shards, check_cache=cache)

    decoded = []

    def count(encoded, max_pixels):
        decoded.append(len(encoded))
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr("vision_moe.data.readable.decode", count)
    open_captions(shards, check_cache=cache)
    assert decoded == []
    os.utime(shards / "train-0001.tar", (1, 1))
    open_captions(shards, check_cache=cache)
    assert len(decoded) == 5


def test_kept_check_still_refuses_too_many_unreadable(tmp_path, write_shard):
    write_shard(tmp_path / "train-0000.tar", {"a": {"captions": ["x"]}, "b": {"captions": ["y"]}}, broken=("b",))
    cache = tmp_path / "check.json"
    assert len(open_captions(tmp_path, max_unreadable_share=0.5, check_cache=cache)) == 1
    with pytest.raises(ValueError, match="1 of 2"):
        open_captions(tmp_path, max_unreadable_share=0.4, check_cache=cache)


def test_check_in_worker_processes_finds_the_same(tmp_path, write_shard, monkeypatch):
    samples = {f"k{i}": {"captions": ["x"]} for i in range(70)}
    write_shard(tmp_path / "train-0000.tar", samples, broken=("k3", "k66"))
    monkeypatch.setattr("vision_moe.data.readable._WORTH_WORKERS", 1)
    dataset = open_captions(tmp_path, max_unreadable_share=0.5)
    assert set(dataset.unreadable) == {"train-0000.tar/k3", "train-0000.tar/k66"}


def test_fingerprint_names_files_field_and_seed(shards):
    prints = {
        open_captions(shards).fingerprint,
        open_captions(shards, seed=1).fingerprint,
        open_captions(shards, caption_field="long").fingerprint,
        open_captions(shards, split="val").fingerprint,
    }
    assert len(prints) == 4
    assert open_captions(shards).fingerprint in prints
    os.utime(shards / "train-0001.tar", (1, 1))
    assert open_captions(shards).fingerprint not in prints


def test_wrong_paths_and_forms_are_refused(shards, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no test-\*\.tar .*train-0000\.tar"):
        open_captions(shards, split="test")
    with pytest.raises(FileNotFoundError, match="no data at"):
        open_captions(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"'short' must be a string or a list.*long"):
        open_captions(shards, caption_field="short")
    for name, content, message in (
        ("a.csv", "x", "a folder of shards"),
        ("a.json", '{"image": "a.png"}', "JSON list"),
        ("b.json", "[", "not JSON"),
        ("c.json", '[{"caption": "x"}]', 'row 0 has no "image"'),
        ("d.json", "[]", "no picture is listed"),
        ("e.jsonl", '{"image": "a.png", "caption": "x"}\n{"ima', "e.jsonl:2: not JSON"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            open_captions(tmp_path / name)


def test_damaged_and_incomplete_shards_are_refused(tmp_path, write_shard):
    shard = tmp_path / "train-0000.tar"
    shard.write_bytes(b"not a tar file" * 100)
    with pytest.raises(ValueError, match=r"train-0000\.tar is damaged"):
        open_captions(tmp_path)
    write_shard(shard, {f"k{i}": {"captions": ["x"]} for i in range(4)})
    whole = shard.read_bytes()
    # Cut inside the picture of the second sample.
    shard.write_bytes(whole[: whole.index(b"k1.jpg") + 700])
    with pytest.raises(ValueError, match=r"train-0000\.tar"):
        open_captions(tmp_path)


def test_real_photos_open_with_five_captions_each(shared_data):
    dataset = open_captions(shared_data / "flickr8k", split="val")
    assert len(dataset) == 500
    assert dataset.unreadable == {}
    for index in range(len(dataset)):
        captions = dataset.captions(index)
        assert len(captions) == 5
        assert all(captions)
    assert {dataset.image(index).size for index in range(0, 500, 25)} == {(224, 224)}
