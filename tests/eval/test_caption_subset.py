"""eval.caption_subset: pictures go where their captions' whole words send them, and come out as they were."""

import io
import json
import tarfile

import pytest
from PIL import Image

from eval.caption_subset import main
from vision_moe.data.captions import open_captions


@pytest.fixture
def shards(tmp_path):
    captions = {
        "a": ["A dog runs .", "the Dogs play", "grass"],
        "c": ["a dog", "a cat", "grass"],
        "d": ["hotdogs", "dogged men", "a doghouse"],
        "e": ["dog", "dog", "dog"],
    }
    with tarfile.open(tmp_path / "val-0000.tar", "w") as tar:
        for number, (key, found) in enumerate(captions.items()):
            picture = io.BytesIO()
            Image.new("RGB", (32, 32), (number * 40, 128, 0)).save(picture, "JPEG")
            for suffix, content in (("jpg", picture.getvalue()), ("json", json.dumps({"captions": found}).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return tmp_path


def keys(folder, split):
    return {name.rpartition("/")[2] for name in _names(open_captions(folder, split=split))}


def _names(dataset):
    return [dataset.name(index) for index in range(len(dataset))]


def test_pictures_are_split_by_whole_words_in_at_least_two_captions(shards, tmp_path, capsys):
    main(["--data", str(shards), "--split", "val", "--words", "dog", "dogs", "--out", str(tmp_path / "out")])
    assert keys(tmp_path / "out", "val") == {"a", "e"}
    assert keys(tmp_path / "out", "other_val") == {"c", "d"}
    assert "val-0000.tar: 2 pictures" in capsys.readouterr().out
    with tarfile.open(shards / "val-0000.tar") as old, tarfile.open(tmp_path / "out" / "val-0000.tar") as new:
        assert new.extractfile("e.jpg").read() == old.extractfile("e.jpg").read()
    written = open_captions(tmp_path / "out", split="val")
    assert written.captions(_names(written).index("val-0000.tar/e")) == ["dog", "dog", "dog"]


def test_held_out_pictures_are_in_no_other_part(shards, tmp_path):
    words = ["--words", "dog", "dogs", "--at-least", "1", "--holdout", "1"]
    main(["--data", str(shards), "--split", "val", *words, "--out", str(tmp_path / "out")])
    parts = [keys(tmp_path / "out", split) for split in ("val", "held_val", "other_val")]
    assert [len(part) for part in parts] == [2, 1, 1]
    assert set().union(*parts) == {"a", "c", "d", "e"}


def test_words_that_name_all_or_none_and_too_large_a_holdout_are_refused(shards, tmp_path):
    command = ["--data", str(shards), "--split", "val", "--out", str(tmp_path / "out"), "--words"]
    with pytest.raises(ValueError, match="0 of 4 pictures have 2 captions with horse"):
        main([*command, "horse"])
    with pytest.raises(SystemExit):
        main([*command, "dog", "--holdout", "2"])
