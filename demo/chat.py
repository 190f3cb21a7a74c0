"""From what the browser sends to what the model is asked: pictures, the conversation in view, a streamed answer."""

import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from demo.uploads import Uploads
from mllm.generate import Chat

MAX_CHARACTERS = 2000
MAX_PICTURES = 4
# What an answer's place shows when there is none; never part of what the model is asked.
NOT_ANSWERED = "Not answered"


class Settings(NamedTuple):
    """How an answer is drawn.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        top_p: share of the probability mass that tokens are drawn from.
        max_new_tokens: length of an answer at most.
    """

    temperature: float
    top_p: float
    max_new_tokens: int


class Turn(NamedTuple):
    """One message of the user and the answer to it; "" where there is none."""

    text: str
    pictures: tuple[Path, ...]
    answer: str = ""


def read_message(message: dict[str, Any], uploads: Uploads) -> Turn:
    """The turn of a message as Gradio's multimodal textbox sends it, checked.

    Raises:
        ValueError: there is no question or too long a one, too many pictures, or one that cannot be read.
    """
    turn = Turn((message.get("text") or "").strip(), tuple(_path(file) for file in message.get("files") or []))
    if len(turn.pictures) > MAX_PICTURES:
        raise ValueError(f"Got {len(turn.pictures)} pictures; at most {MAX_PICTURES} in one message.")
    if len(turn.text) > MAX_CHARACTERS:
        raise ValueError(f"The message has {len(turn.text):,} characters; at most {MAX_CHARACTERS:,}. Shorten it.")
    for path in turn.pictures:
        uploads.read(path)
    if not turn.text:
        raise ValueError("Write a question to go with the picture.")
    return turn


def read_history(history: Sequence[dict[str, Any]]) -> list[Turn]:
    """The turns of Gradio's message list.

    What was sent without getting an answer (an error, or a stop before the first word) keeps its pictures and
    loses its text, so that roles alternate as they did in training.
    """
    turns: list[Turn] = []
    for message in history:
        text, pictures = content(message["content"])
        if message["role"] == "user" and turns and turns[-1].text == turns[-1].answer == "":
            # Pictures sent with this text stand in a message of their own.
            turns[-1] = Turn(text, turns[-1].pictures + pictures)
        elif message["role"] == "user":
            turns.append(Turn(text, pictures))
        elif turns and not is_error(message):
            turns[-1] = turns[-1]._replace(answer=(turns[-1].answer + text).strip())
    return turns


def conversation(turns: Sequence[Turn], uploads: Uploads) -> tuple[list[dict[str, str]], list[Image.Image]]:
    """What the model is asked: the turns since the latest one with a readable picture, and its pictures.

    LLaVA-1.5 is trained on pictures at the head of a conversation, so a new picture starts a new one.

    Args:
        turns: oldest first; the last is the question, its answer still "".
        uploads: where the pictures are.

    Returns:
        Messages with "role" and "content", an `<image>` in the first for each picture; and the pictures.
    """
    start, pictures = 0, []
    for index in range(len(turns) - 1, -1, -1):
        pictures = _readable(turns[index].pictures, uploads)
        if pictures:
            start = index
            break
    asked = [turn for turn in turns[start:-1] if turn.text and turn.answer] + [turns[-1]]
    messages = []
    for turn in asked:
        messages.append({"role": "user", "content": turn.text.replace("<image>", "").strip()})
        messages.append({"role": "assistant", "content": turn.answer})
    del messages[-1]
    messages[0]["content"] = "<image>\n" * len(pictures) + messages[0]["content"]
    return messages, pictures


def answer(
    chat: Chat,
    messages: list[dict[str, str]],
    pictures: Sequence[Image.Image],
    settings: Settings,
    seconds: float = float("inf"),
) -> Generator[str, None, None]:
    """Streams the growing answer; closing the iterator stops the generation.

    Args:
        chat: the model.
        messages: as `conversation` makes them.
        pictures: one for each `<image>`.
        settings: how tokens are drawn.
        seconds: time limit.

    Raises:
        TimeoutError: the time was up; what was said until then has been yielded.
    """
    stop, expired = threading.Event(), threading.Event()

    def expire() -> None:
        expired.set()
        stop.set()

    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), expire)
    timer.daemon = True
    timer.start()
    try:
        # No `yield from`, which would close the stream, and wait for it, before the flag is set.
        for text in chat.stream(messages, list(pictures), stop=stop, **settings._asdict()):  # noqa: UP028
            yield text
    finally:
        # Gradio closes this generator when the stop button is pressed or the browser is gone.
        stop.set()
        timer.cancel()
    if expired.is_set():
        raise TimeoutError(f"The answer was ended after {seconds:g} seconds, the time limit of this demo.")


def content(parts: Any) -> tuple[str, tuple[Path, ...]]:
    """Text and files of one message's content, in any form Gradio and its clients send it in."""
    texts, pictures = [], []
    for part in parts if isinstance(parts, list | tuple) else [parts]:
        if isinstance(part, str):
            texts.append(part)
        elif part.get("type") == "text":
            texts.append(part["text"])
        elif "file" in part or "path" in part:
            pictures.append(_path(part.get("file", part)))
    return "".join(texts).strip(), tuple(pictures)


def is_error(message: dict[str, Any]) -> bool:
    """Whether a message of the assistant's side tells why there is no answer."""
    return (message.get("metadata") or {}).get("title") == NOT_ANSWERED


def _path(file: Any) -> Path:
    return Path(file["path"] if isinstance(file, dict) else file)


def _readable(paths: Sequence[Path], uploads: Uploads) -> list[Image.Image]:
    found = []
    for path in paths:
        try:
            found.append(uploads.read(path))
        except ValueError:
            # Told when it was sent; in the history it is passed over.
            continue
    return found
