"""Where the experts look: beside the chat for its picture, and in a tab for a whole folder and for sentences."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from demo import panel
from demo.chat import MAX_CHARACTERS
from demo.chat_tab import MODEL
from demo.routing_view import Routing
from demo.service import Service

_SENTENCES = (
    "A large red circle above a small blue square.",
    "Two striped triangles on a green background.",
    "A photo of a dog beside a bicycle.",
)


class ExpertsPanel:
    """The experts of the current picture, in the column that is open.

    Args:
        service: what routes.
        routing: session state with the routings of the current pictures, a tuple, or None.
    """

    def __init__(self, service: Service, routing: gr.State) -> None:
        self.service = service
        num_layers = len(service.blocks)
        gr.Markdown("### Where the experts look\nPoint at an expert or a patch to see it alone.")
        picture = gr.Radio([], label="Picture", visible=False, type="index")
        layer = gr.Slider(
            1,
            max(num_layers, 2),
            value=max(num_layers, 1),
            step=1,
            label="Mixture layer, first to last",
            visible=num_layers > 1,
            buttons=[],
            elem_id="layer",
        )
        shown = gr.HTML(self.show(None, 0, 1), elem_id="experts")
        private: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
        routing.change(self.choices, routing, picture, **private).then(
            self.show, [routing, picture, layer], shown, trigger_mode="always_last", **private
        )
        gr.on(
            [layer.change, picture.input],
            self.show,
            [routing, picture, layer],
            shown,
            trigger_mode="always_last",
            **private,
        )

    def choices(self, routings: tuple[Routing, ...] | None) -> Any:
        """The choice of a picture, where there are several."""
        names = [str(number) for number in range(1, len(routings or ()) + 1)]
        return gr.Radio(names, value=names[0] if names else None, visible=len(names) > 1)

    def show(self, routings: tuple[Routing, ...] | None, picture: int | None, layer: int) -> str:
        """One layer of one picture's routing; layers are counted from 1."""
        if not self.service.blocks:
            return panel.note(panel.DENSE)
        if not routings:
            return panel.note(panel.EMPTY)
        return panel.view(routings[min(picture or 0, len(routings) - 1)], layer - 1, self.service.blocks)


class ExpertsTab:
    """What each expert takes over a folder of pictures, and the experts of sentences, in the tab that is open.

    Args:
        service: what routes.
        tab: starts to look through the folder when it is opened.
    """

    def __init__(self, service: Service, tab: gr.Tab) -> None:
        self.service = service
        self.num_layers = len(service.blocks)
        self._folder(tab)
        self._sentences()

    def _folder(self, tab: gr.Tab) -> None:
        if not self.service.blocks or self.service.pictures is None:
            text = panel.DENSE if not self.service.blocks else "No folder of pictures: give one with --pictures FOLDER."
            gr.HTML(panel.note(text))
            return
        pictures = self.service.pictures
        gr.Markdown(
            f"### The patches each expert took most surely\nOver {len(pictures)} of {pictures.num_found} pictures in "
            f"`{pictures.folder.name}/`, at most one patch a picture, framed within its surroundings."
        )
        layer = gr.Slider(
            1,
            max(self.num_layers, 2),
            value=self.num_layers,
            step=1,
            label="Mixture layer, first to last",
            visible=self.num_layers > 1,
            buttons=[],
            elem_id="survey_layer",
        )
        shown = gr.HTML(panel.note("Looking through the folder …"), elem_id="survey")
        settings: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        one_at_a_time = {"concurrency_id": MODEL, "concurrency_limit": 1}
        tab.select(self.survey, layer, shown, trigger_mode="once", **settings, **one_at_a_time)
        layer.change(self.surest, layer, shown, queue=False, trigger_mode="always_last", **settings)

    def _sentences(self) -> None:
        gr.Markdown(
            "### The experts of a sentence\nEach token in the color of the expert of the text tower that took it."
        )
        if self.service.encoder is None:
            gr.HTML(panel.note("No dual encoder: give a CLIP-MoE with --encoder DIR."))
            return
        routing = gr.State(None)
        with gr.Row(equal_height=True):
            sentence = gr.Textbox(
                placeholder="Type a caption and press Enter",
                show_label=False,
                max_length=MAX_CHARACTERS,
                scale=3,
                elem_id="sentence",
            )
            layer = gr.Slider(1, 2, value=1, step=1, label="Mixture layer", visible=False, buttons=[], scale=1)
        gr.Examples([[text] for text in _SENTENCES], [sentence], label="Try one", cache_examples=False)
        shown = gr.HTML("", elem_id="tokens")
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        gr.on(
            [sentence.submit, sentence.change],
            self.read,
            sentence,
            [routing, layer],
            trigger_mode="always_last",
            concurrency_id=MODEL,
            concurrency_limit=1,
            **private,
        ).then(self.tokens, [routing, layer], shown, queue=False, **private)
        layer.input(self.tokens, [routing, layer], shown, queue=False, trigger_mode="always_last", **private)

    def survey(self, layer: int) -> Iterator[str]:
        """Looks through the folder, telling how far it is, then shows a layer."""
        for done, total in self.service.survey():
            if done % 8 == 0:
                yield panel.note(f"Looking through the folder: {done} of {total} pictures …")
        yield self.surest(layer)

    def surest(self, layer: int) -> str:
        """One layer, counted from 1."""
        survey = self.service.surveyed()
        if survey is None:
            return panel.note("The folder has not been looked through yet; open this tab again.")
        assert self.service.pictures is not None
        tiles = [
            [
                (
                    self.service.tile(best.picture, best.patch),
                    f"{self.service.pictures.name(best.picture)}, gate {best.gate:.2f}",
                )
                for best in found
            ]
            for found in survey.best(layer - 1)
        ]
        return panel.surest(survey.shares(layer - 1), tiles)

    def read(self, sentence: str) -> tuple[Routing | None, Any]:
        """Routes a sentence and fits the slider to the layers of its tower."""
        assert self.service.encoder is not None
        routing = self.service.encoder.text_routing(sentence[:MAX_CHARACTERS]) if sentence.strip() else None
        layers = 0 if routing is None else len(routing.expert_maps)
        return routing, gr.Slider(maximum=max(layers, 2), visible=layers > 1)

    def tokens(self, routing: Routing | None, layer: int) -> str:
        """One layer of a sentence's routing; layers are counted from 1."""
        if routing is None:
            return ""
        index = min(int(layer), len(routing.expert_maps)) - 1
        return panel.view(routing, index, range(len(routing.expert_maps)))
