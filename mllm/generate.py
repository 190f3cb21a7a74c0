"""Asks a LLaVA: the one way from messages and pictures to an answer, used by evaluation and demo alike."""

import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlavaProcessor,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm.conversation import IMAGE_TOKEN, IMAGE_TOKEN_ID, Template, encode_prompt, stop_token_ids
from mllm.feature_cache import FeatureCache
from mllm.images import pixels
from mllm.messages import Messages, to_conversation
from mllm.model import LlavaMoEForConditionalGeneration
from mllm.pretrained import load_model, load_processor
from mllm.quantization import Quantization
from mllm.streaming import Generation, StopOnEvent

# A picture, or what `Chat.image_features` made of it.
Picture: TypeAlias = Image.Image | Tensor
Question = tuple[Messages, Sequence[Picture]]
_DEFAULT_NEW_TOKENS = 512


class Chat:
    """A model with the processor and the template it was trained with.

    Messages are {"role": "user" | "assistant", "content": text}, ending with the user's. Each `<image>` in them stands
    for one picture, in order; if there is none, the pictures go to the head of the first message. A conversation of
    several turns runs the tower once for each picture: the features of the last ones are kept.

    Args:
        model: the LLaVA.
        processor: its tokenizer and image processor.
        template: see `mllm.conversation.encode`.
    """

    def __init__(self, model: LlavaMoEForConditionalGeneration, processor: LlavaProcessor, template: Template) -> None:
        self.model = model.eval()
        self.processor = processor
        self.template: Template = template
        self._features_of = FeatureCache(self.image_features)
        self._stop_ids = stop_token_ids(processor.tokenizer, template)

    def generate(
        self,
        messages: Messages,
        images: Sequence[Picture] = (),
        max_new_tokens: int = _DEFAULT_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        num_beams: int = 1,
    ) -> str:
        """The answer; greedy at temperature 0.

        Raises:
            ValueError: malformed messages, as many pictures as placeholders is not the case, or a bad setting.
        """
        return self.generate_batch([(messages, images)], max_new_tokens, temperature, top_p, num_beams)[0]

    def generate_batch(
        self,
        questions: Sequence[Question],
        max_new_tokens: int = _DEFAULT_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        num_beams: int = 1,
    ) -> list[str]:
        """The answers to several (messages, images), computed together; arguments as in `generate`."""
        if not questions:
            return []
        settings = self._settings(max_new_tokens, temperature, top_p, num_beams)
        inputs = self._inputs(questions)
        output_ids = self.model.generate(**inputs, generation_config=settings)
        return [self._decode(row) for row in output_ids[:, inputs["input_ids"].shape[1] :].tolist()]

    def stream(
        self,
        messages: Messages,
        images: Sequence[Picture] = (),
        max_new_tokens: int = _DEFAULT_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: threading.Event | None = None,
    ) -> Generator[str, None, None]:
        """The answer as it grows: each item is all of it so far. Ends early when `stop` is set or it is closed.

        Args:
            messages: as in `generate`.
            images: as in `generate`.
            max_new_tokens: as in `generate`.
            temperature: as in `generate`.
            top_p: as in `generate`.
            stop: setting it from another thread ends the generation at the next token.
        """
        closed = threading.Event()
        stops = [closed] if stop is None else [closed, stop]
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        run = Generation(
            self.model,
            streamer,
            {
                **self._inputs([(messages, images)]),
                "generation_config": self._settings(max_new_tokens, temperature, top_p, 1),
                "stopping_criteria": StoppingCriteriaList([StopOnEvent(stops)]),
            },
        )
        run.start()
        try:
            text = ""
            for piece in streamer:
                text += piece
                if piece and text.strip():
                    yield text.strip()
        finally:
            closed.set()
            run.join()
        if run.error is not None:
            raise run.error

    @torch.inference_mode()
    def image_features(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """What the language model reads of each picture, float[P, D]: a row for each of its P image tokens."""
        batch = torch.stack([pixels(self.processor.image_processor, image) for image in images])
        features: list[Tensor] = self.model.get_image_features(
            batch.to(self.model.device), return_dict=True
        ).pooler_output
        return features

    @torch.inference_mode()
    def router_logits(self, image: Image.Image) -> tuple[list[Tensor], tuple[int, int]]:
        """How the tower routes a picture.

        Returns:
            float32[S, E] for each MoE block, the class token first, none for a dense tower; and the grid (h, w) of the
            S - 1 patches, row by row.
        """
        config = self.model.config.vision_config
        side = config.image_size // config.patch_size
        if not getattr(config, "moe_block_indices", ()):
            return [], (side, side)
        batch = pixels(self.processor.image_processor, image)[None].to(self.model.device)
        outputs = self.model.model.vision_tower(batch, output_router_logits=True)
        return [logits[0].float().cpu() for logits in outputs.router_logits], (side, side)

    def _inputs(self, questions: Sequence[Question]) -> dict[str, Any]:
        """Left-padded batch for `model.generate`."""
        rows = [self._prompt_ids(messages, len(images)) for messages, images in questions]
        length = max(len(row) for row in rows)
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if limit is not None and length >= limit:
            raise ValueError(f"the conversation takes {length} tokens, but the model reads at most {limit}; shorten it")
        pad = self.processor.tokenizer.pad_token_id
        device = self.model.device
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device),
        }
        pictures = [image for _, images in questions for image in images]
        if pictures:
            # Features, since generate would give every beam the pixels in an order that mixes up several pictures.
            features = BaseModelOutputWithPooling(pooler_output=self._features(pictures))
            inputs["mm_encoder_outputs"] = {"image": features}
        return inputs

    def _features(self, pictures: Sequence[Picture]) -> list[Tensor]:
        unread = [picture for picture in pictures if isinstance(picture, Image.Image)]
        read = iter(self._features_of(unread) if unread else [])
        return [next(read) if isinstance(picture, Image.Image) else picture for picture in pictures]

    def _prompt_ids(self, messages: Messages, num_images: int) -> list[int]:
        ids = encode_prompt(to_conversation(messages, num_images), self.processor.tokenizer, self.template)
        if ids.count(IMAGE_TOKEN_ID) != num_images:
            raise ValueError(
                f"{num_images} picture(s) for {ids.count(IMAGE_TOKEN_ID)} {IMAGE_TOKEN} placeholder(s) in the "
                f"messages; give one picture for each"
            )
        config = self.model.config
        image_tokens = [config.image_token_id] * config.image_seq_length
        return [token for id_ in ids for token in (image_tokens if id_ == IMAGE_TOKEN_ID else [id_])]

    def _settings(self, max_new_tokens: int, temperature: float, top_p: float, num_beams: int) -> GenerationConfig:
        if max_new_tokens < 1 or num_beams < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"max_new_tokens and num_beams must be at least 1, temperature at least 0 and top_p in (0, 1], but got "
                f"max_new_tokens={max_new_tokens}, num_beams={num_beams}, temperature={temperature}, top_p={top_p}"
            )
        sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p} if temperature > 0 else {}
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            num_beams=num_beams,
            eos_token_id=self._stop_ids,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            # An answer in the middle of which a picture is announced would be nonsense.
            suppress_tokens=[self.model.config.image_token_id],
            **sampling,
        )

    def _decode(self, ids: list[int]) -> str:
        end = next((index for index, id_ in enumerate(ids) if id_ in self._stop_ids), len(ids))
        return self.processor.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()


def load(
    folder: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantization: Quantization | None = None,
    template: Template | None = None,
) -> Chat:
    """Loads a model that `mllm.assemble` or `mllm.train` wrote.

    Args:
        folder: the model, or an adapter that `mllm.train` wrote, whose base model is loaded with it.
        dtype: of the weights; None = as saved.
        device: None = a GPU if there is one, else the CPU.
        quantization: "4bit" or "8bit" holds the language model's weights in fewer bits (bitsandbytes).
        template: None = the one in the model's config.

    Raises:
        FileNotFoundError: an adapter's base model is not where it was.
        ValueError: no template is known, an unknown quantization, the folder lacks weights, or an adapter's base model
            has changed.
    """
    model = load_model(folder, dtype, device, quantization)
    template = template or getattr(model.config, "conversation_template", None)
    if template is None:
        raise ValueError(f"the config of {folder} names no conversation_template; say which it was trained with")
    return Chat(model, load_processor(folder), template)
