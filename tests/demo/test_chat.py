"""From Gradio's messages to the conversation that the model is asked."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo.chat import Settings, Turn, answer, conversation, read_history, read_message, read_picture


@pytest.fixture
def star(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "star.png")
    return tmp_path / "star.png"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "disk.png")
    return tmp_path / "disk.png"


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    return tmp_path / "broken.jpg"


def test_picture_stays_at_the_head_of_the_conversation(star: Path) -> None:
    turns = [Turn("What is it?", (star,), "A star."), Turn("What color?", ())]
    messages, picture = conversation(turns)
    assert messages == [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "A star."},
        {"role": "user", "content": "What color?"},
    ]
    assert picture == star


def test_new_picture_starts_a_new_conversation(star: Path, disk: Path) -> None:
    turns = [Turn("What is it?", (star,), "A star."), Turn("Why?", (), "So."), Turn("And this?", (disk,))]
    assert conversation(turns) == ([{"role": "user", "content": "<image>\nAnd this?"}], disk)


def test_turn_without_answer_keeps_its_picture_and_loses_its_text(star: Path) -> None:
    turns = [Turn("Stopped.", (star,)), Turn("What is it?", ())]
    assert conversation(turns) == ([{"role": "user", "content": "<image>\nWhat is it?"}], star)


def test_unreadable_picture_in_the_history_is_passed_over(star: Path, broken: Path) -> None:
    turns = [Turn("What is it?", (star,), "A star."), Turn("And this?", (broken,)), Turn("What color?", ())]
    messages, picture = conversation(turns)
    assert picture == star
    assert [message["content"] for message in messages] == ["<image>\nWhat is it?", "A star.", "What color?"]


def test_placeholder_typed_by_the_user_is_removed() -> None:
    messages, picture = conversation([Turn("What does <image> mean?", ())])
    assert messages == [{"role": "user", "content": "What does  mean?"}]
    assert picture is None


def test_history_is_read_in_each_form_gradio_gives_it(star: Path) -> None:
    expected = [Turn("What is it?", (star,), "A star."), Turn("Sure?", ())]
    file = {"path": str(star), "meta": {"_type": "gradio.FileData"}}
    from_browser = [
        {
            "role": "user",
            "content": [{"type": "file", "file": file}, {"type": "text", "text": "What is it?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A star."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]
    from_api = [
        {"role": "user", "content": [{"path": str(star)}, "What is it?"]},
        {"role": "assistant", "content": "A star."},
        {"role": "user", "content": "Sure?"},
    ]
    assert read_history(from_browser) == expected
    assert read_history(from_api) == expected


@pytest.mark.parametrize(
    ("text", "files", "error"),
    [
        ("What is it?", ["broken"], r"Cannot read broken.jpg \(not a known picture format\). Send a JPEG"),
        ("", ["star"], "Write a question"),
        ("What is it?", ["star", "star"], "Got 2 pictures"),
    ],
)
def test_bad_message_is_an_error_that_says_what_to_do(
    star: Path, broken: Path, text: str, files: list[str], error: str
) -> None:
    paths = {"star": str(star), "broken": str(broken)}
    with pytest.raises(ValueError, match=error):
        read_message({"text": text, "files": [paths[name] for name in files]})


def test_truncated_picture_is_an_error(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"Cannot read half.jpg \(.*truncated"):
        read_picture(tmp_path / "half.jpg")


def test_picture_is_turned_the_way_the_camera_was_held(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "side.jpg", exif=exif)
    assert read_picture(tmp_path / "side.jpg").size == (4, 8)


def test_closing_the_answer_stops_the_generation() -> None:
    class Endless:
        stop: threading.Event

        def stream(self, messages: Any, images: Any, *, stop: threading.Event, **_: Any) -> Iterator[str]:
            self.stop = stop
            while True:
                yield "more"

    chat = Endless()
    stream = answer(chat, [], None, Settings(0.0, 1.0, 8))  # type: ignore[arg-type]
    assert next(stream) == "more"
    assert not chat.stop.is_set()
    stream.close()
    assert chat.stop.is_set()
