"""The chat: its window, textbox, camera and saved conversations, and the events that join them to the service."""

import logging
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from demo import history as edits
from demo.chat import MAX_CHARACTERS, MAX_PICTURES, Settings, read_history, read_message
from demo.service import Service
from demo.uploads import SUFFIXES

logger = logging.getLogger(__name__)

# Events that run a model share one queue under this name, and run one at a time.
MODEL = "model"
_WELCOME = """### Ask about a picture
Drop a picture here, paste it, take one with the camera, or start with an example below. Then ask what is in it.
On the right you see which expert of the vision tower took which patch. A new picture starts a new conversation."""


class ChatTab:
    """Builds the chat inside the Blocks and the tab that are open.

    Args:
        service: what answers.
        routing: session state that gets the routings of the current pictures, a tuple.
        examples: picture and question each.
    """

    def __init__(self, service: Service, routing: gr.State, examples: Sequence[tuple[Path, str]]) -> None:
        self.service = service
        self.routing = routing
        self.window = gr.Chatbot(
            placeholder=_WELCOME,
            examples=[{"text": text, "files": [str(path)]} for path, text in examples] or None,
            height="calc(100vh - 330px)",
            min_height=360,
            show_label=False,
            buttons=["copy", "copy_all"],
            editable="user",
            # Gradio 6.31 cannot edit a text in one bubble with a picture.
            group_consecutive_messages=False,
            feedback_options=None,
            elem_id="window",
        )
        self.box = gr.MultimodalTextbox(
            file_types=list(SUFFIXES),
            file_count="multiple",
            placeholder="Ask about a picture: drop, paste or upload one",
            show_label=False,
            autofocus=True,
            stop_btn=False,
            # Longer pasted text would become a file.
            max_plain_text_length=100 * MAX_CHARACTERS,
            elem_id="box",
        )
        with gr.Row():
            with gr.Accordion("Answer settings", open=False):
                self.sliders = settings_sliders(service.max_new_tokens)
            with gr.Accordion("Camera", open=False):
                self.camera = gr.Image(
                    sources=["webcam"], type="filepath", show_label=False, height=240, elem_id="camera"
                )
        with gr.Sidebar(open=False, width=280, elem_id="history"):
            gr.Markdown("### Conversations\nKept in this browser only.")
            self.new = gr.Button("New conversation", variant="primary", size="md")
            self.list = gr.Dataset(
                components=[gr.Textbox(visible=False)],
                samples=[],
                layout="table",
                type="index",
                show_label=False,
                samples_per_page=12,
            )
        self.saved = gr.BrowserState([], storage_key="vision_moe_conversations")
        self.current = gr.State(None)
        self._answering()
        self._conversations()

    def _answering(self) -> None:
        private = {"api_visibility": "private"}
        free = {**private, "queue": False, "show_progress": "hidden"}
        send = self.box.submit(
            self.accept,
            [self.box, self.window],
            [self.window, self.box],
            validator=self.check,
            concurrency_limit=None,
            show_progress="hidden",
            **private,
        )
        retry = self.window.retry(edits.until_last_question, self.window, self.window, **free)
        edit = self.window.edit(self.edited, self.window, self.window, **free)
        example = self.window.example_select(self.example, None, self.window, **free)
        runs = []
        for event in (send, retry, edit, example):
            busy = event.success(lambda: gr.update(submit_btn=False, stop_btn=True), None, self.box, **free)
            runs.append(
                busy.then(
                    self.reply,
                    [self.window, *self.sliders],
                    [self.window, self.routing],
                    concurrency_id=MODEL,
                    concurrency_limit=1,
                    show_progress="minimal",
                    **private,
                )
            )
            ended = runs[-1].then(self.idle, None, self.box, **free)
            ended.then(self.save, [self.window, self.saved, self.current], [self.saved, self.current], **free)
        self.box.stop(self.idle, None, self.box, cancels=runs, **free)
        self.window.undo(edits.undo, self.window, [self.window, self.box], **free)
        self.camera.input(self.taken, [self.camera, self.box], [self.camera, self.box], **free)

    def _conversations(self) -> None:
        free = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
        nothing = [self.window, self.routing, self.current]
        self.new.click(lambda: ([], None, None), None, nothing, **free)
        self.window.clear(lambda: (None, None), None, [self.routing, self.current], **free)
        gr.on([self.saved.change], self.titles, self.saved, self.list, **free)
        self.list.click(self.open, [self.list, self.saved], [self.window, self.current], **free).then(
            self.look,
            self.window,
            self.routing,
            concurrency_id=MODEL,
            concurrency_limit=1,
            api_visibility="private",
            show_progress="hidden",
        )

    def check(self, message: dict[str, Any], _: Any) -> Any:
        """Validates a message before it enters the conversation."""
        try:
            read_message(message, self.service.uploads)
        except ValueError as error:
            return [gr.validate(False, str(error)), gr.validate(True, "")]
        return [gr.validate(True, ""), gr.validate(True, "")]

    def accept(self, message: dict[str, Any], history: list[edits.Message]) -> tuple[list[edits.Message], Any]:
        """Puts a checked message into the conversation and empties the textbox."""
        cleaned = edits.clean(history, self.service.uploads)
        turn = read_message(message, self.service.uploads)
        return [*cleaned, *edits.user_messages(turn.text, turn.pictures)], {"text": "", "files": []}

    def reply(
        self, history: list[edits.Message], temperature: float, top_p: float, max_new_tokens: int
    ) -> Iterator[tuple[list[edits.Message], Any]]:
        """Streams (the conversation with the answer so far, routings of its pictures)."""
        history = edits.clean(edits.until_last_question(history), self.service.uploads)
        try:
            messages, pictures = self.service.prompt(read_history(history))
            # The experts are shown before the first word; later yields leave them alone.
            yield history, tuple(filter(None, map(self.service.routing, pictures)))
            for text in self.service.answer(messages, pictures, Settings(temperature, top_p, int(max_new_tokens))):
                yield [*history, {"role": "assistant", "content": text}], gr.skip()
        except TimeoutError as error:
            gr.Warning(str(error))
        except ValueError as error:
            yield [*history, edits.error_message(_sentence(error))], gr.skip()
        except Exception as error:
            logger.exception("an answer failed")
            yield [*history, edits.error_message(f"{type(error).__name__}: {error}")], gr.skip()

    def idle(self) -> Any:
        """The textbox when nothing is being answered."""
        return gr.update(submit_btn=True, stop_btn=False)

    def edited(self, history: list[edits.Message], edit: gr.EditData) -> list[edits.Message]:
        """The conversation up to an edited message."""
        index = edit.index[0] if isinstance(edit.index, list | tuple) else edit.index
        return edits.edit(history, index, edit.value)

    def example(self, chosen: gr.SelectData) -> list[edits.Message]:
        """A conversation that begins with an example."""
        return edits.user_messages(chosen.value["text"], [file["path"] for file in chosen.value["files"]])

    def taken(self, picture: str | None, message: dict[str, Any]) -> tuple[Any, Any]:
        """Moves a picture from the camera into the textbox."""
        if picture is None:
            return gr.skip(), gr.skip()
        return None, {"text": message["text"], "files": [*message["files"], picture][-MAX_PICTURES:]}

    def save(
        self, history: list[edits.Message], saved: list[dict[str, Any]], current: str | None
    ) -> tuple[list[dict[str, Any]], str]:
        """Saves the conversation in the browser."""
        identity = current or uuid.uuid4().hex
        return edits.save(saved or [], identity, edits.clean(history, self.service.uploads)), identity

    def titles(self, saved: list[dict[str, Any]]) -> Any:
        """The list of saved conversations."""
        return gr.Dataset(samples=[[edits.title(entry["messages"])] for entry in saved or []])

    def open(self, index: int, saved: list[dict[str, Any]]) -> tuple[list[edits.Message], str]:
        """A saved conversation."""
        return edits.clean(saved[index]["messages"], self.service.uploads), saved[index]["id"]

    def look(self, history: list[edits.Message]) -> tuple[Any, ...] | None:
        """Routings of the pictures of a conversation that was opened."""
        _, pictures = self.service.prompt(read_history(history))
        return tuple(filter(None, map(self.service.routing, pictures))) or None


def settings_sliders(max_new_tokens: int) -> list[gr.Slider]:
    """One slider per field of `Settings`, in its order."""
    return [
        gr.Slider(0.0, 1.5, value=0.0, step=0.05, label="Temperature", info="0 takes the likeliest token"),
        gr.Slider(0.05, 1.0, value=1.0, step=0.05, label="Top-p", info="Counts above temperature 0"),
        gr.Slider(1, max_new_tokens, value=min(256, max_new_tokens), step=1, label="Answer length, tokens at most"),
    ]


def _sentence(error: ValueError) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]
