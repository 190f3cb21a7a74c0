"""From Gradio's messages to the conversation that the model is asked."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from demo.chat import Settings, Turn, answer, conversation, read_history, read_message
from demo.uploads import Uploads


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return Uploads(tmp_path)


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


def test_picture_stays_at_the_head_of_the_conversation(star: Path, uploads: Uploads) -> None:
    turns = [Turn("What is it?", (star,), "A star."), Turn("What color?", ())]
    messages, pictures = conversation(turns, uploads)
    assert messages == [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "A star."},
        {"role": "user", "content": "What color?"},
    ]
    assert [picture.getpixel((0, 0)) for picture in pictures] == [(255, 0, 0)]


def test_new_picture_starts_a_new_conversation(star: Path, disk: Path, uploads: Uploads) -> None:
    turns = [Turn("What is it?", (star,), "A star."), Turn("Why?", (), "So."), Turn("And this?", (disk,))]
    messages, (picture,) = conversation(turns, uploads)
    assert messages == [{"role": "user", "content": "<image>\nAnd this?"}]
    assert picture.getpixel((0, 0)) == (0, 0, 255)


def test_several_pictures_of_a_message_stand_in_their_order(star: Path, disk: Path, uploads: Uploads) -> None:
    messages, pictures = conversation([Turn("Which is red?", (star, disk))], uploads)
    assert messages == [{"role": "user", "content": "<image>\n<image>\nWhich is red?"}]
    assert [picture.getpixel((0, 0)) for picture in pictures] == [(255, 0, 0), (0, 0, 255)]


def test_turn_without_answer_keeps_its_picture_and_loses_its_text(star: Path, uploads: Uploads) -> None:
    turns = [Turn("Stopped.", (star,)), Turn("What is it?", ())]
    messages, pictures = conversation(turns, uploads)
    assert messages == [{"role": "user", "content": "<image>\nWhat is it?"}]
    assert len(pictures) == 1


def test_unreadable_picture_in_the_history_is_passed_over(star: Path, broken: Path, uploads: Uploads) -> None:
    turns = [Turn("What is it?", (star,), "A star."), Turn("And this?", (broken,)), Turn("What color?", ())]
    messages, pictures = conversation(turns, uploads)
    assert len(pictures) == 1
    assert [message["content"] for message in messages] == ["<image>\nWhat is it?", "A star.", "What color?"]


def test_placeholder_typed_by_the_user_is_removed(uploads: Uploads) -> None:
    messages, pictures = conversation([Turn("What does <image> mean?", ())], uploads)
    assert messages == [{"role": "user", "content": "What does  mean?"}]
    assert pictures == []


def test_reason_for_no_answer_is_no_answer() -> None:
    history = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "Too long.", "metadata": {"title": "Not answered"}},
    ]
    assert read_history(history) == [Turn("What is it?", ())]


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
        ("What is it?", ["broken"], r"Cannot read broken.jpg: its content is not a known picture. Send a JPEG"),
        ("", ["star"], "Write a question"),
        ("What is it?", ["star"] * 5, "Got 5 pictures; at most 4"),
        ("a" * 2001, [], "2,001 characters; at most 2,000"),
    ],
)
def test_bad_message_is_an_error_that_says_what_to_do(
    star: Path, broken: Path, uploads: Uploads, text: str, files: list[str], error: str
) -> None:
    paths = {"star": str(star), "broken": str(broken)}
    with pytest.raises(ValueError, match=error):
        read_message({"text": text, "files": [paths[name] for name in files]}, uploads)


class Endless:
    """A model that never comes to an end by itself."""

    def stream(self, messages: Any, images: Any, *, stop: threading.Event, **_: Any) -> Iterator[str]:
        self.stop = stop
        while not stop.is_set():
            yield "more"


def test_closing_the_answer_stops_the_generation() -> None:
    chat = Endless()
    stream = answer(chat, [], [], Settings(0.0, 1.0, 8))  # type: ignore[arg-type]
    assert next(stream) == "more"
    assert not chat.stop.is_set()
    stream.close()
    assert chat.stop.is_set()


def test_answer_is_ended_at_its_time_limit_after_what_was_said() -> None:
    stream = answer(Endless(), [], [], Settings(0.0, 1.0, 8), seconds=0.05)  # type: ignore[arg-type]
    assert next(stream) == "more"
    with pytest.raises(TimeoutError, match=r"ended after 0\.05 seconds"):
        list(stream)
