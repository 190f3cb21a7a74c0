"""The endpoints that Gradio's clients call; each is stateless, and its docstring is its documentation."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from demo.chat import MAX_CHARACTERS, Settings, read_history, read_message
from demo.chat_tab import MODEL
from demo.routing_view import Routing
from demo.service import Service


class Api:
    """Registers the endpoints in the Blocks that are open.

    Args:
        service: what answers.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        for endpoint in (self.chat, self.compare, self.routing, self.text_routing, self.search):
            gr.api(endpoint, api_name=endpoint.__name__, concurrency_id=MODEL, concurrency_limit=1)

    def chat(
        self,
        question: str,
        pictures: list[dict[str, Any]] = [],  # noqa: B006  # Gradio reads the default; nothing changes it
        history: list[dict[str, Any]] = [],  # noqa: B006
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new_tokens: int = 256,
    ) -> Iterator[str]:
        """Streams the answer to a question: each item is all of it so far. `pictures` are files (`handle_file`);
        `history` holds the messages before, {"role", "content"} each, content a text or a list of texts and files."""
        try:
            turn = read_message({"text": question, "files": pictures}, self.service.uploads)
            messages, images = self.service.prompt([*read_history(history), turn])
            settings = Settings(temperature, top_p, min(int(max_new_tokens), self.service.max_new_tokens))
            yield from self.service.answer(messages, images, settings)
        except (ValueError, KeyError, TypeError, TimeoutError) as error:
            raise _refusal(error) from error

    def compare(
        self,
        question: str,
        pictures: list[dict[str, Any]] = [],  # noqa: B006
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new_tokens: int = 256,
    ) -> Iterator[list[str]]:
        """Streams the answers of the model and of the one it is compared with (`--compare`), as a list of two."""
        try:
            turn = read_message({"text": question, "files": pictures}, self.service.uploads)
            settings = Settings(temperature, top_p, min(int(max_new_tokens), self.service.max_new_tokens))
            for texts in self.service.compare(turn, settings):
                yield list(texts)
        except (ValueError, KeyError, TypeError, TimeoutError) as error:
            raise _refusal(error) from error

    def routing(self, picture: dict[str, Any]) -> dict[str, Any]:
        """Which expert took which patch of a picture: {"blocks", "num_experts", "experts", "gates"}; experts and gates
        are lists [block][row][column] of first choices and of their gates. Empty lists for a dense tower."""
        try:
            routing = self.service.routing(self.service.uploads.read(Path(picture["path"])))
        except (ValueError, KeyError, TypeError) as error:
            raise _refusal(error) from error
        return _plain(routing, self.service.blocks)

    def text_routing(self, sentence: str) -> dict[str, Any]:
        """Which expert of the dual encoder's text tower took which token: {"tokens", "blocks", "num_experts",
        "experts", "gates"}; experts and gates are lists [block][token]."""
        try:
            if self.service.encoder is None:
                raise ValueError("There is no dual encoder; start the demo with --encoder DIR.")
            routing = self.service.encoder.text_routing(_sentence(sentence))
        except ValueError as error:
            raise _refusal(error) from error
        plain = _plain(routing, range(0 if routing is None else len(routing.expert_maps)))
        rows = {name: [block[0] for block in plain[name]] for name in ("experts", "gates")}
        return {"tokens": [] if routing is None else list(routing.words), **plain, **rows}

    def search(self, sentence: str, number: int = 8) -> dict[str, Any]:
        """The nearest pictures of the folder by each encoder, nearest first: {encoder: [{"picture", "cosine"}]}."""
        try:
            search = self.service.search
            if search is None:
                raise ValueError("There is no search; start the demo with --encoder DIR and --pictures FOLDER.")
            found = search.nearest(_sentence(sentence), max(1, min(int(number), len(search.pictures))))
        except ValueError as error:
            raise _refusal(error) from error
        return {
            name: [{"picture": search.pictures.name(hit.picture), "cosine": hit.cosine} for hit in hits]
            for name, hits in found.items()
        }


def _sentence(text: str) -> str:
    if not text.strip() or len(text) > MAX_CHARACTERS:
        raise ValueError(f"The sentence has {len(text):,} characters; 1 to {MAX_CHARACTERS:,} are allowed.")
    return text


def _refusal(error: Exception) -> gr.Error:
    text = str(error) if isinstance(error, ValueError | TimeoutError) else f"malformed request: {error!r}"
    return gr.Error(text, title="Not answered", print_exception=False)


def _plain(routing: Routing | None, blocks: Any) -> dict[str, Any]:
    if routing is None:
        return {"blocks": [], "num_experts": 0, "experts": [], "gates": []}
    return {
        "blocks": list(blocks),
        "num_experts": routing.num_experts,
        "experts": [experts.tolist() for experts in routing.expert_maps],
        "gates": [np.round(gates.astype(float), 6).tolist() for gates in routing.gate_maps],
    }
