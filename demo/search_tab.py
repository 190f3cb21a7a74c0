"""Retrieval: type a sentence, see the nearest pictures by each encoder's features."""

from typing import Any

import gradio as gr

from demo import panel
from demo.chat import MAX_CHARACTERS
from demo.chat_tab import MODEL
from demo.service import Service

_EXAMPLES = ("a red circle", "two striped squares", "a small star to the left of a large triangle")
_MISSING = (
    "Start the demo with `--encoder DIR` (a CLIP-MoE), `--dense DIR` (a CLIP to set beside it) and "
    "`--pictures FOLDER`, or without `--model` after a quick start, which brings all three."
)
_NUMBER = 8
_SIDE = 224


class SearchTab:
    """Builds the search inside the tab that is open.

    Args:
        service: what searches.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        if service.search is None:
            gr.Markdown(_MISSING)
            return
        pictures = service.search.pictures
        gr.Markdown(
            f"### Nearest pictures\nAmong {len(pictures)} of {pictures.num_found} pictures in "
            f"`{pictures.folder.name}/`, by the cosine of their features with the sentence's. The first search looks "
            "at all of them once."
        )
        sentence = gr.Textbox(
            placeholder="Describe a picture and press Enter",
            show_label=False,
            max_length=MAX_CHARACTERS,
            elem_id="search",
        )
        found = gr.HTML("", elem_id="found")
        gr.Examples([[text] for text in _EXAMPLES], [sentence], label="Try one", cache_examples=False)
        settings: dict[str, Any] = {"concurrency_id": MODEL, "concurrency_limit": 1, "api_visibility": "private"}
        sentence.submit(self.nearest, sentence, found, **settings)

    def nearest(self, sentence: str) -> str:
        """The found pictures, a column an encoder."""
        if not sentence.strip():
            return panel.note("Type a sentence first.")
        search = self.service.search
        assert search is not None
        columns = []
        for name, hits in search.nearest(sentence[:MAX_CHARACTERS], _NUMBER).items():
            cards = []
            for hit in hits:
                picture = search.pictures[hit.picture]["image"]
                picture.thumbnail((_SIDE, _SIDE))
                cards.append((picture, search.pictures.name(hit.picture), hit.cosine))
            columns.append((name, cards))
        return panel.gallery(columns)
