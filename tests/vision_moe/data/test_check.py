"""What the check of a data set says, and when it ends with an error."""

import json

import datasets
import pytest
from PIL import Image

from vision_moe.data.check import main


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the check; returns its status, its JSON and what it printed."""

    def checked(path, *flags):
        output = tmp_path / "report.json"
        status = main([str(path), "--output", str(output), *flags])
        return status, json.loads(output.read_text()), capsys.readouterr().out

    return checked


def test_sound_data_are_counted_and_accepted(numbered_shards, run, tiny_processor, tmp_path):
    tiny_processor.save_pretrained(tmp_path / "model")
    status, found, printed = run(numbered_shards, "--tokenizer", str(tmp_path / "model"), "--max_tokens", "3")
    assert (status, found["refused"]) == (0, [])
    assert found["pictures"] == {"total": 20, "readable": 20, "unreadable": 0}
    assert found["captions"]["words"] == {"min": 2, "median": 2, "p95": 2, "max": 2, "mean": 2}
    # <bos> number n <eos>: four tokens, one too many.
    assert found["captions"]["tokens"] | {"limit": 3, "cut": 20} == found["captions"]["tokens"]
    assert found["captions"]["tokens"]["max"] == 4
    assert found["fields"] == {"caption": 20, "re_caption": 20, "status": 20, "key": 20, "txt": 20}
    assert found["modes"] == {"JPEG RGB": 20}
    assert found["width"]["max"] == found["height"]["min"] == 8
    assert "a training would take these data" in printed


@pytest.fixture
def faulty(tmp_path, write_tar, encode):
    """A shard with one of everything."""
    red, blue = (encode(Image.new("RGB", (4, 6), color)) for color in ("red", "blue"))
    exif = Image.Exif()
    exif[0x0112] = 3
    caption = json.dumps({"caption": "the same"}).encode()
    files = {
        "good.png": red,
        "good.json": caption,
        "again.png": red,
        "again.json": json.dumps({"caption": "another one here", "extra": 1}).encode(),
        "turned.jpg": encode(Image.new("RGB", (4, 6), "red"), "JPEG", exif=exif),
        "turned.json": caption,
        "clear.png": encode(Image.new("RGBA", (4, 6))),
        "clear.json": caption,
        "cut.png": blue[:-30],
        "cut.json": caption,
        "bare.json": caption,
        "mute.png": blue,
        "mute.json": json.dumps({"caption": " "}).encode(),
        "torn.png": blue,
        "torn.json": b'{"caption": "x',
        "wide.png": encode(Image.new("1", (300, 1))),
        "wide.json": caption,
    }
    write_tar(tmp_path / "faulty" / "train-0.tar", files)
    return tmp_path / "faulty"


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_every_fault_is_named_by_kind(faulty, run, streaming):
    status, found, printed = run(faulty, "--streaming", streaming)
    assert status == 1
    assert found["pictures"] == {"total": 9, "readable": 4, "unreadable": 5}
    assert {kind: sorted(named) for kind, named in found["faults"].items()} == {
        "damaged picture": ["train-0.tar/cut"],
        "no picture": ["train-0.tar/bare"],
        "caption": ["train-0.tar/mute", "train-0.tar/torn"],
        "refused picture": ["train-0.tar/wide"],
    }
    assert "5 of 9 pictures cannot be read (55.56%); at most 1.00%" in found["refused"][0]
    assert "REFUSED: 5 of 9" in printed
    assert found["duplicates"]["pictures"] == 1
    assert found["duplicates"]["picture_examples"] == [["train-0.tar/good", "train-0.tar/again"]]
    assert found["duplicates"]["captions"] == 2
    assert found["duplicates"]["caption_examples"] == {"the same": 3}
    assert found["traits"] == {"rotated by EXIF": 1, "transparent": 1}
    assert found["modes"] == {"PNG RGB": 2, "JPEG RGB": 1, "PNG RGBA": 1}
    assert found["missing_fields"]["extra"] == 8


def test_a_higher_share_is_accepted_as_in_training(faulty, run):
    assert run(faulty, "--max_unreadable_share", "0.6")[0] == 0
    assert run(faulty, "--max_unreadable_share", "0.5")[0] == 1


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_all_damaged_shards_are_named(numbered_shards, run, streaming):
    for shard in ("00001", "00003"):
        path = numbered_shards / f"{shard}.tar"
        path.write_bytes(path.read_bytes()[:3000])
    status, found, _ = run(numbered_shards, "--streaming", streaming)
    assert status == 1
    assert [name[-9:] for name in sorted(found["damaged_shards"])] == ["00001.tar", "00003.tar"]
    assert "2 damaged shards" in found["refused"][0]
    assert run(numbered_shards, "--streaming", streaming, "--damaged_shards", "skip")[0] == 0


def test_shards_behind_a_url_are_streamed(numbered_shards, serve, run):
    status, found, _ = run(serve(numbered_shards) + "/{00000..00003}.tar")
    assert (status, found["pictures"]["total"]) == (0, 20)


def test_hugging_face_columns_are_checked(tmp_path, run, encode, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"image": [{"bytes": encode(Image.new("L", (4, 4))), "path": None}, None], "caption": ["one", "two"]}
    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(folder / "train.parquet")
    status, found, _ = run(folder, "--format", "hf")
    assert status == 1
    assert found["faults"]["no picture"] == {"row 1": "row 1 has no picture"}
    assert found["modes"] == {"PNG L": 1}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split", "val"], "no val-*.tar"),
        (["--caption_field", "caption_of"], "'caption_of' must be a string"),
    ],
)
def test_wrong_splits_and_fields_are_refused(faulty, run, flags, message):
    status, found, _ = run(faulty, *flags)
    assert status == 1
    assert message in found["refused"][0]


def test_real_photos_are_sound(shared_data, run):
    status, found, _ = run(shared_data / "flickr8k", "--split", "val")
    assert status == 0
    assert found["pictures"] == {"total": 500, "readable": 500, "unreadable": 0}
    assert found["captions"]["total"] == 2500
