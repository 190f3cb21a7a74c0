"""The page without a browser: what is built, what it finds by itself, how it is guarded, what it never does."""

import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from gradio_client import Client
from PIL import Image

from demo import app as demo_app
from demo.chat_tab import ChatTab
from demo.experts_tab import ExpertsPanel
from demo.page import build, launch
from demo.quickstart import check_llava, find
from demo.service import Service
from demo.uploads import Uploads
from mllm.generate import Chat


def _make(path: Path, text: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_quick_starts_parts_are_found_the_whole_run_before_the_smoke_one(tmp_path: Path) -> None:
    for run in ("quickstart_smoke", "quickstart"):
        _make(tmp_path / run / "llava" / "model" / "config.json")
        found = find(outputs=tmp_path)
        assert found.model == tmp_path / run / "llava" / "model"
    assert (found.encoder, found.dense, found.pictures) == (None, None, None)
    _make(tmp_path / "quickstart" / "encoder" / "dmu" / "model" / "config.json")
    (tmp_path / "quickstart" / "scenes" / "images" / "test").mkdir(parents=True)
    found = find(outputs=tmp_path)
    assert found.encoder == tmp_path / "quickstart" / "encoder" / "dmu" / "model"
    assert found.pictures == tmp_path / "quickstart" / "scenes" / "images" / "test"


def test_without_a_model_the_demo_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no quick start(.|\n)*bash scripts/quickstart\.sh(.|\n)*--model DIR"):
        find(outputs=tmp_path)
    (tmp_path / "quickstart").mkdir()
    with pytest.raises(FileNotFoundError, match="goes on where it stopped"):
        find(outputs=tmp_path)
    with pytest.raises(SystemExit, match=r"demo: the quick start in"):
        demo_app.main(["--run", str(tmp_path / "quickstart")])


@pytest.mark.parametrize(
    ("config", "message"),
    [(None, "is no folder"), ('{"model_type": "clip_moe"}', r"holds a 'clip_moe'.*llava_finetune\.sh")],
)
def test_folder_that_holds_no_llava_is_an_error(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        _make(tmp_path / "model" / "config.json", config)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        check_llava(str(tmp_path / "model"))


def test_dense_tower_is_chatted_with_and_the_panel_says_why_it_is_empty(
    make_chat: Callable[[list[int]], Chat], tmp_path: Path
) -> None:
    service = Service(make_chat([]), Uploads(tmp_path))
    assert service.routing(Image.new("RGB", (32, 32))) is None
    with gr.Blocks(analytics_enabled=False):
        shown = ExpertsPanel(service, gr.State(None)).show(None, 0, 1)
    assert "has no experts" in shown
    texts = [str(block.value) for block in build(service).blocks.values() if isinstance(block, gr.Markdown | gr.HTML)]
    for missing in ("--compare DIR", "--encoder DIR", "--pictures FOLDER"):
        assert any(missing in text for text in texts), missing


def test_folder_of_examples_without_pictures_is_an_error(chat: Chat, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no pictures"):
        build(Service(chat, Uploads(tmp_path / "uploads")), tmp_path)


def test_failure_inside_the_model_stands_in_the_answers_place_with_its_text(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service(chat, Uploads(tmp_path))

    def fail(*_: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(service, "answer", fail)
    with gr.Blocks(analytics_enabled=False):
        tab = ChatTab(service, gr.State(None), [])
    history = [{"role": "user", "content": [{"type": "text", "text": "is it"}]}]
    with caplog.at_level(logging.ERROR):
        *_, (last, _) = tab.reply(history, 0.0, 1.0, 4)
    assert last[-1]["content"] == "RuntimeError: CUDA out of memory"
    assert last[-1]["metadata"] == {"title": "Not answered"}
    assert "an answer failed" in caplog.text


def test_password_guards_the_page_and_nothing_leaves_the_machine(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's own connections are counted from its building on: Gradio's telemetry would be among them."""
    asked = []
    original = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(host)
        return original(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    app = build(Service(chat, Uploads(tmp_path)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    _, url, _ = launch(app, port=port, password="secret", prevent_thread_lock=True, quiet=True)
    try:
        assert httpx.get(f"{url}config").status_code == 401
        assert httpx.post(f"{url}login", data={"username": "demo", "password": "guess"}).status_code == 400
        # What watches the process needs no password.
        assert httpx.get(f"{url}health").status_code == 200
        client = Client(url, verbose=False, auth=("demo", "secret"))
        assert client.predict(question="is it", max_new_tokens=2, api_name="/chat")
    finally:
        app.close()
    assert set(map(str, asked)) <= {"127.0.0.1", "localhost", "None"}
    assert app.server_name == "127.0.0.1"


def test_password_files_first_line_counts(tmp_path: Path) -> None:
    assert demo_app._password(_make(tmp_path / "password", "secret\nmore\n")) == "secret"
    with pytest.raises(ValueError, match="no password in its first line"):
        demo_app._password(_make(tmp_path / "empty", "\n"))
