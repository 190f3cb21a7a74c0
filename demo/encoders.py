"""The dual encoders of the demo: nearest pictures to a sentence, and the experts that its tokens go to."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel

import vision_moe.model  # noqa: F401  # registers the model types
from demo.pictures import PictureFolder
from demo.routing_view import Routing, route
from vision_moe.assets import resolve_model
from vision_moe.embedding import embed_images, embed_texts
from vision_moe.moe.router import Router
from vision_moe.processor import load_processor


class Hit(NamedTuple):
    """A picture's position in the folder, and the cosine of its embedding with the sentence's."""

    picture: int
    cosine: float


class Encoder:
    """A dual encoder, loaded when it is first asked.

    Args:
        folder: folder, hub name or packaged model.
        device: torch device; None = a GPU if there is one, else the CPU.
    """

    def __init__(self, folder: str, device: str | None = None) -> None:
        self.folder = folder
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        folder = resolve_model(self.folder)
        model = AutoModel.from_pretrained(folder)
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise ValueError(f"{self.folder} holds a {type(model).__name__}; a dual encoder is needed, as a CLIPModel")
        return model.to(self.device).eval(), load_processor(folder)

    @torch.inference_mode()
    def text_routing(self, sentence: str) -> Routing | None:
        """Which expert of the text tower took which token; None for a dense tower."""
        model, processor = self._loaded
        tower = getattr(model, "text_model", model)
        routers = [module for module in tower.modules() if isinstance(module, Router)]
        if not routers:
            return None
        limit = model.config.get_text_config().max_position_embeddings
        tokens = processor.tokenizer([sentence], truncation=True, max_length=limit, return_tensors="pt")
        output = model.get_text_features(**tokens.to(model.device), output_router_logits=True)
        words = tuple(processor.tokenizer.decode([token]).strip() for token in tokens["input_ids"][0].tolist())
        logits = [logits_BSE[0] for logits_BSE in output.router_logits]
        return route(logits, (1, len(words)), routers, words=words)

    def embed(self, pictures: PictureFolder) -> NDArray[np.float32]:
        """Unit embeddings, float32[N, D]."""
        model, processor = self._loaded
        return embed_images(model, processor, pictures, batch_size=32)

    def embed_sentence(self, sentence: str) -> NDArray[np.float32]:
        """Unit embedding, float32[D]."""
        return embed_texts(*self._loaded, [sentence])[0]


class Search:
    """Nearest pictures by the features of several encoders; the folder is embedded once, at the first question.

    Args:
        encoders: by the name that the page shows.
        pictures: what is searched.
    """

    def __init__(self, encoders: Mapping[str, Encoder], pictures: PictureFolder) -> None:
        self.encoders = dict(encoders)
        self.pictures = pictures

    @cached_property
    def _embeddings(self) -> dict[str, NDArray[np.float32]]:
        return {name: encoder.embed(self.pictures) for name, encoder in self.encoders.items()}

    def nearest(self, sentence: str, number: int) -> dict[str, list[Hit]]:
        """By encoder, the nearest pictures, nearest first."""
        found = {}
        for name, encoder in self.encoders.items():
            cosines_N = self._embeddings[name] @ encoder.embed_sentence(sentence)
            order = np.argsort(-cosines_N, kind="stable")[:number]
            found[name] = [Hit(int(index), float(cosines_N[index])) for index in order]
        return found
