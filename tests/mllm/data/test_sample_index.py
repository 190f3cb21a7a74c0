"""SampleIndex: the same samples as a whole parse, in little memory, kept between runs."""

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import mllm.data.index
from mllm.data.index import SampleIndex, image_names


def sample(number: int, **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"What is {number}?"}, {"from": "gpt", "value": 'é 日本 😀 \u2028 " \\ ] }, {'}]
    return {"id": number if number % 2 else str(number), "conversations": turns, **fields}


def write(path: Path, samples: list[Any], indent: int | None = None, ensure_ascii: bool = False) -> Path:
    if path.suffix == ".jsonl":
        text = "\n\n".join(json.dumps(row, ensure_ascii=ensure_ascii) for row in samples) + "\n"
    else:
        text = json.dumps(samples, indent=indent, ensure_ascii=ensure_ascii)
    path.write_bytes(text.replace("\n", "\r\n").encode())
    return path


@pytest.mark.parametrize("window", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_samples_are_those_of_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, name: str, indent: int | None, ensure_ascii: bool
) -> None:
    monkeypatch.setattr(mllm.data.index, "_WINDOW", window)
    samples = [sample(0, image="a.png"), sample(1), sample(2, images=["a.png", "b.png"]), sample(3, image=None)]
    index = SampleIndex(write(tmp_path / name, samples, indent, ensure_ascii))
    assert [index[number] for number in range(len(index))] == samples
    assert index.num_images.tolist() == [1, 0, 2, 0]
    # "What is N?" and: é 日本 😀 " \ ] }, {
    assert index.num_words.tolist() == [3 + 8] * 4


def test_fifty_thousand_samples_take_little_memory(tmp_path: Path) -> None:
    rng = random.Random(0)
    text = " ".join(str(rng.random()) for _ in range(30))
    path = tmp_path / "big.json"
    with path.open("w") as file:
        file.write("[")
        for number in range(50_000):
            file.write(("," if number else "") + json.dumps(sample(number, image=f"{number}.jpg", text=text)))
        file.write("]")
    assert path.stat().st_size > 35e6
    tracemalloc.start()
    index = SampleIndex(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) == 50_000
    assert index[49_999]["image"] == "49999.jpg"
    # 22 bytes a sample; while building, a window of the file and a block of places.
    assert kept < 2e6
    assert peak < 20e6


def test_the_kept_index_is_used_until_the_data_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = write(tmp_path / "a.json", [sample(0), sample(1)]), tmp_path / "run" / "index.safetensors"
    first = SampleIndex(path, cache)
    assert [entry.name for entry in cache.parent.iterdir()] == ["index.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(mllm.data.index, "_build", lambda path: pytest.fail("built again"))
        again = SampleIndex(path, cache)
    assert [again[number] for number in (0, 1)] == [first[number] for number in (0, 1)]
    write(path, [sample(5), sample(6), sample(7)])
    assert len(SampleIndex(path, cache)) == 3


def test_a_file_that_changed_behind_the_index_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [sample(0), sample(1)])
    index = SampleIndex(path)
    path.write_text("[" + " " * 500 + "]")
    with pytest.raises(ValueError, match="has changed since it was indexed"):
        index[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}', r"must hold a list of samples, but it begins with '\{'; for one sample a line, name it .jsonl"),
        ("", "must hold a list of samples, but it begins with ''"),
        ("[]", "must hold a list of at least one sample"),
        ('[{"conversations": []}, 7]', "in sample 1: expected an object, but got '7'"),
        ('[{"conversations": []},]', "in sample 1: expected an object, but got ']'"),
        ('[{"conversations": []} {"conversations": []}]', "behind sample 0: got '{', not a comma"),
        ('[{"conversations": []}', "behind sample 0: got '', not a comma"),
        ('[{"conversations": [}, {"conversations": []}]', r"in sample 0: .*begins at byte 1"),
        ('[{"id": 1}]', r'sample 0 of .* must be an object with a list "conversations"'),
        ('[{"conversations": [], "image": 3}]', r'sample 0 of .*"image" must be a file name'),
    ],
)
def test_a_malformed_list_is_an_error_that_says_where(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        SampleIndex(path)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"conversations": []}\n{"conv')
    with pytest.raises(ValueError, match="no JSON in line 2"):
        SampleIndex(path)


@pytest.mark.parametrize(
    ("fields", "names"),
    [({}, []), ({"image": "a"}, ["a"]), ({"image": ["a", "b"]}, ["a", "b"]), ({"images": ["a"]}, ["a"])],
)
def test_pictures_are_named_by_image_or_images(fields: dict[str, Any], names: list[str]) -> None:
    assert image_names(fields) == names


@pytest.mark.parametrize("fields", [{"image": "a", "images": ["b"]}, {"images": [1]}, {"images": {"a": 1}}])
def test_pictures_named_in_another_way_are_an_error(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="image"):
        image_names(fields)
