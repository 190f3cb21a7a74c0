"""From what the browser sends to what the model is asked: pictures, the conversation in view, a streamed answer."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

from mllm.generate import Chat


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


def read_picture(path: Path) -> Image.Image:
    """Decodes a picture completely, turned the way its camera was held.

    Raises:
        ValueError: if it cannot be decoded.
    """
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except UnidentifiedImageError:
        reason = "not a known picture format"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error)
    raise ValueError(f"Cannot read {path.name} ({reason}). Send a JPEG, PNG or WebP picture.")


def read_message(message: dict[str, Any]) -> Turn:
    """The turn of a message that Gradio's multimodal textbox sent, with its picture checked.

    Raises:
        ValueError: if there is no question, more than one picture, or one that cannot be decoded.
    """
    turn = Turn((message.get("text") or "").strip(), tuple(_path(file) for file in message.get("files") or []))
    if len(turn.pictures) > 1:
        raise ValueError(
            f"Got {len(turn.pictures)} pictures; the model was trained on one at a time. Send one, then the next."
        )
    for path in turn.pictures:
        read_picture(path)
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
        text, pictures = _content(message["content"])
        if message["role"] == "user":
            turns.append(Turn(text, pictures))
        elif turns:
            turns[-1] = turns[-1]._replace(answer=(turns[-1].answer + text).strip())
    return turns


def conversation(turns: Sequence[Turn]) -> tuple[list[dict[str, str]], Path | None]:
    """What the model is asked: the turns since the latest readable picture, and that picture.

    LLaVA-1.5 is trained on one picture at the head of a conversation, so a new picture starts a new one.

    Args:
        turns: oldest first; the last is the question, its answer still "".

    Returns:
        Messages with "role" and "content", `<image>` in the first if there is a picture; and the picture's path.
    """
    start, picture = 0, None
    for index, turn in enumerate(turns):
        for path in turn.pictures:
            if _is_readable(path):
                start, picture = index, path
    asked = [turn for turn in turns[start:-1] if turn.text and turn.answer] + [turns[-1]]
    messages = []
    for turn in asked:
        messages.append({"role": "user", "content": turn.text.replace("<image>", "").strip()})
        messages.append({"role": "assistant", "content": turn.answer})
    del messages[-1]
    if picture is not None:
        messages[0]["content"] = "<image>\n" + messages[0]["content"]
    return messages, picture


def answer(
    chat: Chat, messages: list[dict[str, str]], picture: Image.Image | None, settings: Settings
) -> Iterator[str]:
    """Streams the growing answer; closing the iterator stops the generation."""
    stop = threading.Event()
    images = [] if picture is None else [picture]
    try:
        # No `yield from`, which would close the stream, and wait for it, before the flag is set.
        for text in chat.stream(messages, images, stop=stop, **settings._asdict()):  # noqa: UP028
            yield text
    finally:
        # Gradio closes this generator when the stop button is pressed or the browser is gone.
        stop.set()


def _content(content: Any) -> tuple[str, tuple[Path, ...]]:
    """Text and files of one message's content, in any form Gradio and its clients send it in."""
    parts = content if isinstance(content, list | tuple) else [content]
    texts, pictures = [], []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif part.get("type") == "text":
            texts.append(part["text"])
        else:
            pictures.append(_path(part.get("file", part)))
    return "".join(texts).strip(), tuple(pictures)


def _path(file: Any) -> Path:
    return Path(file["path"] if isinstance(file, dict) else file)


def _is_readable(path: Path) -> bool:
    try:
        read_picture(path)
    except ValueError:
        return False
    return True
