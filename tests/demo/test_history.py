"""Edits of a conversation, and the saved ones."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from demo.chat import Turn, read_history
from demo.history import clean, edit, error_message, save, title, undo, until_last_question, user_messages
from demo.uploads import Uploads


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    folder = tmp_path / "uploads"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    return Uploads(folder)


@pytest.fixture
def history(uploads: Uploads) -> list[dict[str, Any]]:
    """As the browser sends it."""
    file = {"path": str(uploads.folder / "a.png"), "meta": {"_type": "gradio.FileData"}}
    return [
        {"role": "user", "content": [{"type": "file", "file": file}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A star."}], "metadata": None},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Broken."}], "metadata": {"title": "Not answered"}},
    ]


def test_clean_keeps_texts_errors_and_uploaded_pictures_only(history: list[dict[str, Any]], uploads: Uploads) -> None:
    history[0]["content"].append(
        {"type": "component", "component": "html", "value": "<script>", "constructor_args": {}}
    )
    history[2]["content"].append({"type": "file", "file": {"path": str(uploads.folder.parent / "secret.png")}})
    assert clean(history, uploads) == [
        {"role": "user", "content": [{"path": str(uploads.folder / "a.png")}]},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A star."},
        {"role": "user", "content": "Sure?"},
        error_message("Broken."),
    ]


def test_retry_undo_and_edit(history: list[dict[str, Any]], uploads: Uploads) -> None:
    shown = clean(history, uploads)
    assert until_last_question(shown) == shown[:4]
    assert undo(shown) == (shown[:3], {"text": "Sure?", "files": []})
    # The picture goes back with its text, and stays when the text is edited.
    assert undo(shown[:3]) == ([], {"text": "What is it?", "files": [str(uploads.folder / "a.png")]})
    assert undo([]) == ([], {"text": "", "files": []})
    assert edit(shown, 1, " What color? ") == user_messages("What color?", [uploads.folder / "a.png"])
    assert read_history(edit(shown, 1, "What color?")) == [Turn("What color?", (uploads.folder / "a.png",))]


def test_saved_conversations_stand_latest_first_and_are_limited() -> None:
    saved: list[dict[str, Any]] = []
    for number in range(35):
        saved = save(saved, str(number), user_messages(str(number), []))
    assert [entry["id"] for entry in saved] == [str(number) for number in range(34, 4, -1)]
    saved = save(saved, "20", user_messages("again", []))
    assert (saved[0]["id"], title(saved[0]["messages"]), len(saved)) == ("20", "again", 30)


def test_title_is_the_first_words() -> None:
    assert title(user_messages("a" * 60, [])) == "a" * 47 + "…"
    assert title([]) == "Conversation"
