"""The command that writes Scenes: files, repeatability, and what happens on a second call."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from vision_moe.data import scenes
from vision_moe.data.captions import open_captions
from vision_moe.data.scenes import ScenesArguments, generate, main

ARGUMENTS = ScenesArguments(num=25, num_test=12, seed=1, image_size=64, shard_size=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sets") / "scenes"
    assert generate(out, ARGUMENTS)
    return out


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _samples(folder: Path, split: str) -> dict[str, tuple[bytes, dict]]:
    samples = {}
    for shard in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            names = tar.getnames()
            for name in names[::2]:
                key = name.removesuffix(".jpg")
                files = [tar.extractfile(f"{key}.{ending}").read() for ending in ("jpg", "json")]
                samples[key] = (files[0], json.loads(files[1]))
    return samples


def test_shards_hold_all_pictures_once_with_their_captions(folder):
    assert [p.name for p in sorted(folder.glob("*.tar"))] == [
        "test-0000.tar",
        "test-0001.tar",
        "train-0000.tar",
        "train-0001.tar",
        "train-0002.tar",
    ]
    for split, num in (("train", 25), ("test", 12)):
        samples = _samples(folder, split)
        assert list(samples) == [f"{split}{i:06d}" for i in range(num)]
        for key, (jpeg, metadata) in samples.items():
            assert (folder / "images" / split / f"{key}.jpg").read_bytes() == jpeg
            assert Image.open(io.BytesIO(jpeg)).size == (64, 64)
            assert len(metadata["captions"]) == 5
            assert ("variants" in metadata) == (split == "test")
            assert set(metadata) - {"variants"} == {"captions", "long", "factors", "objects"}


def test_lists_name_pictures_that_exist(folder):
    lines = [json.loads(line) for line in (folder / "pope_test.jsonl").read_text().splitlines()]
    records = [
        record
        for name in ("llava_pretrain.json", "llava_finetune.json")
        for record in json.loads((folder / name).read_text())
    ]
    assert len(records) == 2 * 25
    assert {Path(r["image"]).parts[0] for r in records} == {"train"}
    assert {Path(line["image"]).parts[0] for line in lines} == {"test"}
    for entry in (*records, *lines):
        assert (folder / "images" / entry["image"]).is_file()


def test_two_processes_write_the_same_bytes_as_one(folder, tmp_path):
    assert generate(tmp_path / "two", ARGUMENTS, num_workers=2)
    assert _contents(tmp_path / "two") == _contents(folder)


def test_another_seed_writes_other_pictures(folder, tmp_path):
    generate(tmp_path / "other", ScenesArguments(num=2, num_test=1, seed=2))
    assert (tmp_path / "other/images/train/train000000.jpg").read_bytes() != (
        folder / "images/train/train000000.jpg"
    ).read_bytes()


def test_a_second_call_returns_at_once_and_changes_nothing(folder, monkeypatch):
    before = _contents(folder)
    monkeypatch.setattr(scenes, "_write_set", lambda *_: pytest.fail("drew again"))
    assert not generate(folder, ARGUMENTS)
    assert _contents(folder) == before


def test_other_arguments_on_a_finished_set_are_refused(folder):
    with pytest.raises(ValueError, match=r"another Scenes set: seed=1 \(asked for 2\); choose another --out"):
        generate(folder, ScenesArguments(num=25, num_test=12, seed=2, shard_size=10))


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear to me")
    with pytest.raises(ValueError, match=r"is not a Scenes set \(it has no scenes.json\)"):
        generate(tmp_path, ARGUMENTS)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "pope_lines", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "set", ScenesArguments(num=2, num_test=1))
    assert list(tmp_path.iterdir()) == []


def test_command_line_writes_a_set_into_an_empty_folder_and_says_where(tmp_path, capsys):
    flags = ["--out", str(tmp_path), "--num", "3", "--seed", "0", "--num-test", "2", "--num-workers", "1"]
    assert main(flags) == 0
    assert f"3 train and 2 test pictures written to {tmp_path}" in capsys.readouterr().out
    assert json.loads((tmp_path / "scenes.json").read_text())["counts"]["train"] == 3
    assert main(flags) == 0
    assert "already in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--image-size", "32", "image_size must be in [64, 336], but got 32"),
        ("--num", "0", "num must be in [1, 999999], but got 0"),
        ("--num-workers", "0", "num_workers must be at least 1, but got 0"),
    ],
)
def test_command_line_refuses_numbers_out_of_range_in_words(tmp_path, capsys, flag, value, message):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "set"), "--num", "2", "--num-test", "1", flag, value])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_only_draws_scenes_with_these_values(tmp_path):
    only = {"shape": ["circle", "square"], "background": ["white"]}
    generate(tmp_path / "narrow", ScenesArguments(num=12, num_test=6, only=only))
    for split, num in (("train", 12), ("test", 6)):
        dataset = open_captions(tmp_path / "narrow", split=split)
        factors = [dataset.metadata(index)["factors"] for index in range(len(dataset))]
        assert len(factors) == num
        assert {f["shape"] for f in factors} == {"circle", "square"}
        assert {f["background"] for f in factors} == {"white"}
    assert not generate(tmp_path / "narrow", ScenesArguments(num=12, num_test=6, only=only))


def test_only_refuses_what_is_no_value_of_a_factor():
    with pytest.raises(ValueError, match=r"only must name values of a factor .* but got shape=blob"):
        ScenesArguments(num=1, num_test=1, only={"shape": ["blob"]})
