"""What the demo can do, without a page: answers, routings, a comparison, a search, a survey of a folder.

Holds the models and nothing of any user.
"""

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from demo.chat import Settings, Turn, answer, conversation
from demo.encoders import Encoder, Search
from demo.pictures import PictureFolder
from demo.routing_view import Routing, route, seen_picture
from demo.survey import Survey
from demo.uploads import Uploads
from mllm.generate import Chat
from mllm.images import pixels
from vision_moe.moe.router import Router
from vision_moe.patch_sheets import crop

_MAX_NEW_TOKENS = 1024
_KEPT_PATCHES = 8


class Service:
    """The models behind the page.

    Args:
        chat: the model.
        uploads: where users' pictures are.
        compared: another model to set beside it.
        encoder: a dual encoder whose text tower has experts.
        search: nearest pictures of a folder.
        pictures: a folder to see the experts' favorite patches of.
        seconds: time limit of an answer.
    """

    def __init__(
        self,
        chat: Chat,
        uploads: Uploads,
        *,
        compared: Chat | None = None,
        encoder: Encoder | None = None,
        search: Search | None = None,
        pictures: PictureFolder | None = None,
        seconds: float = 120.0,
    ) -> None:
        self.chat = chat
        self.uploads = uploads
        self.compared = compared
        self.encoder = encoder
        self.search = search
        self.pictures = pictures
        self.seconds = seconds
        self.blocks = sorted(getattr(chat.model.config.vision_config, "moe_block_indices", ()))
        context = getattr(chat.model.config.text_config, "max_position_embeddings", _MAX_NEW_TOKENS)
        self.max_new_tokens = min(_MAX_NEW_TOKENS, context)
        self._survey = Survey(_KEPT_PATCHES)

    def prompt(self, turns: Sequence[Turn]) -> tuple[list[dict[str, str]], list[Image.Image]]:
        """See `demo.chat.conversation`."""
        return conversation(turns, self.uploads)

    def answer(
        self, messages: list[dict[str, str]], pictures: Sequence[Image.Image], settings: Settings
    ) -> Generator[str, None, None]:
        """Streams the growing answer, see `demo.chat.answer`."""
        return answer(self.chat, messages, pictures, settings, self.seconds)

    def compare(self, turn: Turn, settings: Settings) -> Iterator[tuple[str, str]]:
        """Streams both models' growing answers to one question, a token of each in turn.

        Raises:
            ValueError: there is no second model.
            TimeoutError: one of them took too long.
        """
        if self.compared is None:
            raise ValueError("There is no second model; start the demo with --compare DIR.")
        messages, pictures = self.prompt([turn])
        streams = [answer(chat, messages, pictures, settings, self.seconds) for chat in (self.chat, self.compared)]
        texts, running = ["", ""], [True, True]
        try:
            while any(running):
                for index, stream in enumerate(streams):
                    if running[index]:
                        text = next(stream, None)
                        running[index] = text is not None
                        texts[index] = texts[index] if text is None else text
                yield texts[0], texts[1]
        finally:
            for stream in streams:
                stream.close()

    def routing(self, picture: Image.Image) -> Routing | None:
        """Routing of a picture through the tower; None for a dense tower."""
        if not self.blocks:
            return None
        router_logits, grid = self.chat.router_logits(picture)
        processor = self.chat.processor.image_processor
        seen = seen_picture(pixels(processor, picture), processor.image_mean, processor.image_std)
        routers = [module for module in self.chat.model.modules() if isinstance(module, Router)]
        return route(router_logits, grid, routers, picture=seen)

    def survey(self) -> Iterator[tuple[int, int]]:
        """Looks through the folder, once for all users; yields (pictures done, of how many).

        Closed before its end, it goes on from there when it is asked again.
        """
        assert self.pictures is not None
        for index in range(self._survey.num_pictures, len(self.pictures)):
            routing = self.routing(self.pictures[index]["image"])
            assert routing is not None
            self._survey.add(routing, index)
            yield index + 1, len(self.pictures)

    def surveyed(self) -> Survey | None:
        """What `survey` found; None until it has been through."""
        done = self.pictures is not None and self._survey.num_pictures == len(self.pictures)
        return self._survey if done else None

    def tile(self, picture: int, patch: int) -> Image.Image:
        """A patch of a picture of the folder with its surroundings, as the tower sees them."""
        assert self.pictures is not None
        processor = self.chat.processor.image_processor
        values = pixels(processor, self.pictures[picture]["image"])
        config = self.chat.model.config.vision_config
        side = config.image_size // config.patch_size
        return crop(seen_picture(values, processor.image_mean, processor.image_std), patch, (side, side))


def tower_name(chat: Chat) -> str:
    """What the page calls a model: its kind of tower."""
    config: Any = chat.model.config.vision_config
    if not getattr(config, "moe_block_indices", ()):
        return "dense tower"
    return f"CLIP-MoE tower, {config.num_experts} experts, {config.num_experts_per_tok} a patch"


def example_paths(folder: Path, number: int) -> list[tuple[Path, str | None]]:
    """The first pictures of a folder by name, and for each the question in the NAME.txt beside it.

    Raises:
        FileNotFoundError: the folder has no pictures.
    """
    found = []
    for path in PictureFolder(folder, limit=10**9).paths[:number]:
        question = path.with_suffix(".txt")
        found.append((path, question.read_text(encoding="utf-8").strip() if question.is_file() else None))
    return found
