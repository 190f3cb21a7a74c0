"""The page: its tabs around one service, and how it is served."""

import hashlib
import html
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from demo import panel
from demo.api import Api
from demo.chat_tab import ChatTab
from demo.compare_tab import CompareTab
from demo.experts_tab import ExpertsPanel, ExpertsTab
from demo.search_tab import SearchTab
from demo.service import Service, example_paths, tower_name
from demo.uploads import MAX_BYTES

_NUM_EXAMPLES = 6
# Asked of examples that bring no question, in turn.
_QUESTIONS = ("Describe the image.", "What is the background?", "How many objects are there?")
_SESSION_SECONDS = 3600


def build(service: Service, examples: Path | None = None, *, name: str = "") -> gr.Blocks:
    """Builds the page; `launch(app, ...)` serves it.

    Args:
        service: what it shows.
        examples: folder whose first pictures, by name, become examples; a NAME.txt beside a picture holds its question.
        name: of the model, for the heading.

    Raises:
        FileNotFoundError: if that folder has no pictures.
    """
    # Uploads that nobody needs any more go after a day.
    with gr.Blocks(title="vision-moe", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as app:
        routing = gr.State(None, time_to_live=_SESSION_SECONDS)
        gr.HTML(
            f"<h2>vision-moe<small>{html.escape(f'{name}: ' * bool(name) + tower_name(service.chat))}</small></h2>",
            elem_id="heading",
        )
        with gr.Tab("Chat"), gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=420):
                ChatTab(service, routing, _copied(examples, service.uploads.folder) if examples else [])
            with gr.Column(scale=2, min_width=340):
                ExpertsPanel(service, routing)
        with gr.Tab("Experts") as experts:
            ExpertsTab(service, experts)
        with gr.Tab("Side by side"):
            CompareTab(service)
        with gr.Tab("Search"):
            SearchTab(service)
        Api(service)
    return app


def launch(
    app: gr.Blocks,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    password: str | None = None,
    max_queue: int = 64,
    **kwargs: Any,
) -> Any:
    """Serves the page: no share link, no telemetry, no fonts or scripts from elsewhere.

    Args:
        app: from `build`.
        host: interface to listen on.
        port: port to listen on; None takes the first free one from 7860.
        password: of the user "demo"; None lets everyone in who reaches the port.
        max_queue: questions that may wait; more are turned away with a message.
        **kwargs: passed to `gr.Blocks.launch`.
    """
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    app.queue(max_size=max_queue, default_concurrency_limit=8)
    return app.launch(
        server_name=host,
        server_port=port,
        share=False,
        auth=None if password is None else ("demo", password),
        show_error=True,
        max_file_size=MAX_BYTES,
        footer_links=["api", "settings"],
        ssr_mode=False,
        enable_monitoring=False,
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=["monospace"]),
        css=panel.css(),
        # Before Gradio's own routes, and outside its login, for what watches the process.
        app_kwargs={"routes": [_health(app)]},
        **kwargs,
    )


def _health(app: gr.Blocks) -> Route:
    started = time.monotonic()

    def health(_: Request) -> JSONResponse:
        waiting = len(app._queue)
        return JSONResponse({"status": "ok", "waiting": waiting, "uptime_seconds": round(time.monotonic() - started)})

    return Route("/health", health)


def _copied(folder: Path, uploads: Path) -> Sequence[tuple[Path, str]]:
    """The examples, copied among the uploads: so that no other folder has to be readable by browsers."""
    copies = []
    for number, (path, question) in enumerate(example_paths(folder, _NUM_EXAMPLES)):
        copy = uploads / "examples" / hashlib.sha256(path.read_bytes()).hexdigest()[:16] / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        copies.append((copy, question or _QUESTIONS[number % len(_QUESTIONS)]))
    return copies
