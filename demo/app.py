"""The chat demo: one process, a streamed chat about a picture, and which expert of the tower took which patch.

    python -m demo.app --model DIR [--examples FOLDER]

`mllm.generate` makes the prompt, so that the demo asks with the template the model was trained with.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gradio as gr
from PIL import Image

from demo import panel
from demo.chat import Settings, answer, conversation, read_history, read_message, read_picture
from demo.routing_view import Routing, overlay, route, seen_picture
from mllm.generate import Chat, load
from mllm.images import pixels
from vision_moe.config import parse
from vision_moe.moe.router import Router
from vision_moe.tracking import setup_logging

logger = logging.getLogger(__name__)

_QUESTION = "Describe the image."
_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_NUM_EXAMPLES = 6
# Of a patch whose gate is 1; the picture still shows through.
_OPACITY = 0.85
_MAX_NEW_TOKENS = 1024
_MAX_UPLOAD = "20mb"


class Demo:
    """The demo's event handlers. Holds the model and nothing of any user: that is in Gradio's session state.

    Args:
        chat: the model.
    """

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.blocks = sorted(getattr(chat.model.config.vision_config, "moe_block_indices", ()))
        context = getattr(chat.model.config.text_config, "max_position_embeddings", _MAX_NEW_TOKENS)
        self.max_new_tokens = min(_MAX_NEW_TOKENS, context)

    def check(self, message: dict[str, Any], *_: Any) -> Any:
        """Validates a message before it enters the conversation."""
        try:
            read_message(message)
        except ValueError as error:
            return gr.validate(False, str(error))
        return gr.validate(True, "")

    def respond(
        self,
        message: dict[str, Any],
        history: list[dict[str, Any]],
        temperature: float,
        top_p: float,
        max_new_tokens: int,
    ) -> Iterator[tuple[str, Any]]:
        """Streams (answer so far, routing of the current picture)."""
        try:
            turns = [*read_history(history), read_message(message)]
        except ValueError as error:
            raise gr.Error(str(error), title="Message not answered", print_exception=False) from error
        messages, path = conversation(turns)
        picture = None if path is None else read_picture(path)
        # The panel is filled before the first word; later yields leave it alone.
        yield "", None if picture is None else self.routing(picture)
        for text in answer(self.chat, messages, picture, Settings(temperature, top_p, int(max_new_tokens))):
            yield text, gr.skip()

    def routing(self, picture: Image.Image) -> Routing | None:
        """Routing of a picture through the tower; None for a dense tower."""
        if not self.blocks:
            return None
        router_logits, grid = self.chat.router_logits(picture)
        processor = self.chat.processor.image_processor
        seen = seen_picture(pixels(processor, picture), processor.image_mean, processor.image_std)
        routers = [module for module in self.chat.model.modules() if isinstance(module, Router)]
        return route(seen, router_logits, grid, routers)

    def show(self, routing: Routing | None, layer: int) -> tuple[Image.Image | None, str]:
        """Overlay and legend of one layer, counted from 0."""
        if not self.blocks:
            return None, panel.DENSE
        if routing is None:
            return None, panel.EMPTY
        maps = routing.expert_maps[layer], routing.gate_maps[layer]
        painted = overlay(routing.picture, *maps, num_experts=routing.num_experts, opacity=_OPACITY)
        return painted, panel.legend(routing, layer, self.blocks)


def build(chat: Chat, examples_dir: Path | None = None, *, name: str = "") -> gr.Blocks:
    """Builds the page; `launch(app, ...)` serves it.

    Args:
        chat: the model, from `mllm.generate.load`.
        examples_dir: folder whose first pictures, by name, become examples; a NAME.txt beside a picture holds its
            question.
        name: of the model, for the heading.

    Raises:
        FileNotFoundError: if that folder has no pictures.
    """
    demo = Demo(chat)
    with gr.Blocks(title="vision-moe", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as app:
        routing = gr.State(None)
        gr.Markdown(f"## vision-moe {name}".rstrip())
        with gr.Row(equal_height=False):
            chat_column = gr.Column(scale=3, min_width=420)
            with gr.Column(scale=2, min_width=340):
                _routing_panel(demo, routing)
        with chat_column:
            interface = _chat_interface(demo, routing, examples_dir)
            interface.chatbot.clear(lambda: None, outputs=routing, api_visibility="private")
    return app


def _routing_panel(demo: Demo, routing: gr.State) -> None:
    num_layers = len(demo.blocks)
    gr.Markdown("**Experts.** Patches colored by first choice, as the tower sees them.")
    picture = gr.Image(
        show_label=False,
        format="png",
        interactive=False,
        height=320,
        visible=num_layers > 0,
        buttons=["download", "fullscreen"],
    )
    layer = gr.Slider(
        0,
        max(num_layers - 1, 1),
        value=max(num_layers - 1, 0),
        step=1,
        label="Mixture layer, first to last",
        visible=num_layers > 1,
    )
    legend = gr.HTML(demo.show(None, 0)[1])
    gr.on(
        [routing.change, layer.change],
        demo.show,
        [routing, layer],
        [picture, legend],
        show_progress="hidden",
        trigger_mode="always_last",
        api_name="routing",
    )


def _chat_interface(demo: Demo, routing: gr.State, examples_dir: Path | None) -> gr.ChatInterface:
    return gr.ChatInterface(
        demo.respond,
        multimodal=True,
        chatbot=gr.Chatbot(
            placeholder="Send a picture and ask about it. A new picture starts a new conversation.",
            height="calc(100vh - 260px)",
            min_height=380,
            show_label=False,
            buttons=["copy"],
        ),
        textbox=gr.MultimodalTextbox(
            file_types=["image"],
            file_count="single",
            sources=["upload"],
            placeholder="Ask about a picture",
            stop_btn=True,
        ),
        additional_inputs=_settings(demo.max_new_tokens),
        additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
        additional_outputs=[routing],
        examples=None if examples_dir is None else _examples(examples_dir),
        validator=demo.check,
        api_name="chat",
        analytics_enabled=False,
        concurrency_limit=1,
        fill_width=True,
    )


def _settings(max_new_tokens: int) -> list[gr.Slider]:
    """One slider per field of `Settings`, in its order; ChatInterface places them."""
    default = min(256, max_new_tokens)
    return [
        gr.Slider(
            0.0, 1.5, value=0.0, step=0.05, label="Temperature", info="0 takes the likeliest token", render=False
        ),
        gr.Slider(0.05, 1.0, value=1.0, step=0.05, label="Top-p", info="Counts above temperature 0", render=False),
        gr.Slider(1, max_new_tokens, value=default, step=1, label="Answer length, tokens at most", render=False),
    ]


def _examples(folder: Path) -> list[list[Any]]:
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _PICTURES)[:_NUM_EXAMPLES]
    if not pictures:
        raise FileNotFoundError(f"no pictures ({', '.join(_PICTURES)}) in {folder}, the folder of examples")
    examples = []
    for picture in pictures:
        question = picture.with_suffix(".txt")
        text = question.read_text(encoding="utf-8").strip() if question.is_file() else _QUESTION
        # The sliders keep the values the user gave them.
        examples.append([{"text": text, "files": [str(picture)]}, None, None, None])
    return examples


def launch(app: gr.Blocks, *, host: str, port: int | None, examples_dir: Path | None = None, **kwargs: Any) -> Any:
    """Serves the page: no share link, no telemetry, no fonts or scripts from elsewhere.

    Args:
        app: from `build`.
        host: interface to listen on.
        port: port to listen on; None takes the first free one from 7860.
        examples_dir: as given to `build`; its pictures may be read by browsers.
        **kwargs: passed to `gr.Blocks.launch`.
    """
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    return app.launch(
        server_name=host,
        server_port=port,
        share=False,
        show_error=True,
        max_file_size=_MAX_UPLOAD,
        allowed_paths=[] if examples_dir is None else [str(examples_dir)],
        footer_links=[],
        ssr_mode=False,
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=["monospace"]),
        css=panel.CSS,
        **kwargs,
    )


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Chat with a LLaVA and see which expert of its vision tower took which patch.

    Example:
        .venv/bin/python -m demo.app --model outputs/scenes_llava/model --examples outputs/scenes/images/test
    """

    model: str
    """Folder of a model that mllm.train wrote."""
    host: str = "127.0.0.1"
    """Interface to listen on; 0.0.0.0 lets other machines in."""
    port: int = 7860
    """Port to listen on."""
    examples: Path | None = None
    """Folder of example pictures; NAME.txt beside a picture holds its question."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; None keeps the checkpoint's."""
    device: str | None = None
    """Torch device; None takes the GPU if there is one."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Load the language model quantized."""


def main(args: list[str] | None = None) -> None:
    """Entry point of `python -m demo.app`."""
    setup_logging()
    config = parse(DemoConfig, args)
    chat = load(config.model, dtype=config.dtype, device=config.device, quantization=config.quantization)
    app = build(chat, config.examples, name=Path(config.model).name)
    launch(app, host=config.host, port=config.port, examples_dir=config.examples)


if __name__ == "__main__":
    main()
