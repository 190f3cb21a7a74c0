"""Edits of a conversation in Gradio's message list, and the list of saved ones. Nothing here knows the model.

Messages come from browsers: only their texts, and pictures in the upload folder, are taken over.
"""

from collections.abc import Sequence
from typing import Any

from demo.chat import NOT_ANSWERED, content, is_error
from demo.uploads import Uploads

Message = dict[str, Any]
_KEPT = 30
_TITLE = 48


def user_messages(text: str, files: Sequence[Any]) -> list[Message]:
    """What a user sends, as the chat window shows it: the pictures, then the text.

    Apart, since Gradio 6.31 loses a picture when the text beside it is edited.
    """
    shown: list[Message] = [{"role": "user", "content": [{"path": str(file)} for file in files]}] if files else []
    return [*shown, {"role": "user", "content": text}] if text else shown


def error_message(text: str) -> Message:
    """What stands in an answer's place and says why there is none."""
    return {"role": "assistant", "content": text, "metadata": {"title": NOT_ANSWERED}}


def clean(history: Sequence[Message], uploads: Uploads) -> list[Message]:
    """The messages with nothing in them but text and pictures that are still kept."""
    messages = []
    for message in history:
        text, pictures = content(message["content"])
        if message["role"] == "user":
            messages += user_messages(text, [path for path in pictures if uploads.holds(path)])
        else:
            messages.append(error_message(text) if is_error(message) else {"role": "assistant", "content": text})
    return [message for message in messages if message["content"]]


def until_last_question(history: Sequence[Message]) -> list[Message]:
    """The conversation without what came after the user's last message."""
    last = max((index for index, message in enumerate(history) if message["role"] == "user"), default=-1)
    return list(history[: last + 1])


def undo(history: Sequence[Message]) -> tuple[list[Message], Message]:
    """The conversation before the user's last message, and that message as the textbox takes it."""
    asked = until_last_question(history)
    text, pictures = content(asked.pop()["content"]) if asked else ("", ())
    while asked and asked[-1]["role"] == "user" and not content(asked[-1]["content"])[0]:
        pictures = (*content(asked.pop()["content"])[1], *pictures)
    return asked, {"text": text, "files": [str(path) for path in pictures]}


def edit(history: Sequence[Message], index: int, text: str) -> list[Message]:
    """The conversation up to a text of the user, which is replaced; the pictures before it stay."""
    return [*history[:index], *user_messages(text.strip(), [])]


def title(history: Sequence[Message]) -> str:
    """What a conversation is called in the list: its first words."""
    for message in history:
        text, _ = content(message["content"])
        if message["role"] == "user" and text:
            return text if len(text) <= _TITLE else text[: _TITLE - 1] + "…"
    return "Conversation"


def save(saved: Sequence[dict[str, Any]], identity: str, history: list[Message]) -> list[dict[str, Any]]:
    """The saved conversations with this one at the top, and no more than are kept.

    Args:
        saved: {"id", "messages"} each, the latest first.
        identity: of this conversation, which replaces what is saved under it.
        history: the conversation.
    """
    others = [entry for entry in saved if entry["id"] != identity]
    return [{"id": identity, "messages": history}, *others][:_KEPT]
