"""Side by side: one question to two models, their answers streamed together."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from demo.chat import Settings, read_message
from demo.chat_tab import MODEL, settings_sliders
from demo.service import Service, tower_name
from demo.uploads import SUFFIXES

MISSING = (
    "Start the demo with `--compare DIR`, the folder of a second LLaVA, to ask both the same question. One with the "
    "dense tower beside the quick start's CLIP-MoE:\n"
    "```bash\n"
    "bash scripts/llava_finetune.sh mllm/recipes/scenes.yaml --vision outputs/quickstart/encoder/direct/model \\\n"
    "    --pretrain.data outputs/quickstart/scenes/llava_pretrain.json \\\n"
    "    --finetune.data outputs/quickstart/scenes/llava_finetune.json \\\n"
    "    --image_folder outputs/quickstart/scenes/images --output outputs/llava_dense\n"
    "python -m demo.app --compare outputs/llava_dense/model\n"
    "```"
)


class CompareTab:
    """Builds the comparison inside the tab that is open.

    Args:
        service: what answers.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        if service.compared is None:
            gr.Markdown(MISSING)
            return
        asked = gr.Markdown("The same question, the same picture, the same settings; each model answers for itself.")
        with gr.Row(equal_height=True):
            answers = []
            for number, chat in enumerate((service.chat, service.compared)):
                with gr.Column(variant="panel", min_width=280):
                    gr.Markdown(f"#### {tower_name(chat)[0].upper()}{tower_name(chat)[1:]}")
                    answers.append(gr.Markdown("", elem_classes="answer", elem_id=f"answer_{number}"))
        box = gr.MultimodalTextbox(
            file_types=list(SUFFIXES),
            file_count="multiple",
            placeholder="A picture and a question for both",
            show_label=False,
            stop_btn=False,
            elem_id="compare_box",
        )
        with gr.Accordion("Answer settings", open=False):
            sliders = settings_sliders(min(service.max_new_tokens, 256))
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        busy = box.submit(
            lambda message: (gr.update(submit_btn=False, stop_btn=True), f"**{message['text']}**"),
            box,
            [box, asked],
            queue=False,
            **private,
        )
        run = busy.then(self.answers, [box, *sliders], answers, concurrency_id=MODEL, concurrency_limit=1, **private)
        run.then(self.idle, None, box, queue=False, **private)
        box.stop(self.idle, None, box, cancels=[run], queue=False, **private)

    def answers(
        self, message: dict[str, Any], temperature: float, top_p: float, max_new_tokens: int
    ) -> Iterator[tuple[str, str]]:
        """Streams both answers."""
        yield "…", "…"
        try:
            turn = read_message(message, self.service.uploads)
            yield from self.service.compare(turn, Settings(temperature, top_p, int(max_new_tokens)))
        except (TimeoutError, ValueError) as error:
            raise gr.Error(str(error), title="Not answered", print_exception=False) from error

    def idle(self) -> Any:
        """The textbox when nothing is being answered."""
        return gr.update(submit_btn=True, stop_btn=False)
