"""The language side: a training step of LLaVA against transformers' own, and generation against reading the weights.

A Llama of SmolLM2-135M's sizes behind a small frozen CLIP; random weights, one thread, float32.
"""

from collections.abc import Callable

import torch
from measure import OURS, Row, comparisons, interleave
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mllm.conversation import IGNORE_INDEX
from mllm.model import LlavaMoEForConditionalGeneration

VOCABULARY = 49_152
IMAGE_TOKEN = VOCABULARY - 1
IMAGE_TOKENS = 64


def config(*, tiny: bool) -> LlavaConfig:
    """SmolLM2-135M behind a vision tower of 64 tokens."""
    text = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=1 if tiny else 30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    vision = CLIPVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6, image_size=64, patch_size=8
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)


def batch(rows: int, length: int, supervised: int) -> dict[str, torch.Tensor]:
    """Dialogues of one picture each; the last `supervised` tokens are the answer."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(5, IMAGE_TOKEN, (rows, length), generator=generator)
    input_ids[:, 1 : 1 + IMAGE_TOKENS] = IMAGE_TOKEN
    labels = input_ids.clone()
    labels[:, :-supervised] = IGNORE_INDEX
    pixels = torch.randn(rows, 3, 64, 64, generator=generator)
    mask = torch.ones_like(input_ids)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Forward and backward."""

    def run() -> None:
        model(**inputs).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def training_rows(rounds: int, *, tiny: bool) -> list[Row]:
    """The finetuning step: everything but the tower trains."""
    torch.manual_seed(0)
    theirs = LlavaForConditionalGeneration(config(tiny=tiny))
    ours = LlavaMoEForConditionalGeneration(config(tiny=tiny))
    ours.load_state_dict(theirs.state_dict())
    for model in (theirs, ours):
        model.train()
        model.model.vision_tower.requires_grad_(False)
    inputs = batch(2, 184, 40)
    seconds = interleave({"transformers Llava": step(theirs, inputs), OURS: step(ours, inputs)}, rounds, "LLaVA step")
    case = "SmolLM2-135M, 2 x 184 tokens, 40 supervised each"
    return comparisons(seconds, {"transformers Llava": None}, case=case, work="fp32 LLaVA step")


def generation_rows(rounds: int, *, tiny: bool) -> list[Row]:
    """Seconds a generated token, prompt included, against one pass over the language model's weights."""
    torch.manual_seed(0)
    model = LlavaMoEForConditionalGeneration(config(tiny=tiny)).eval()
    inputs = {name: tensor for name, tensor in batch(1, 100, 1).items() if name != "labels"}
    # The embedding is tied to the head, so each weight is read once a token.
    weights = [parameter.detach() for parameter in model.model.language_model.parameters()]
    num_tokens = 8 if tiny else 32
    settings = {"do_sample": False, "max_new_tokens": num_tokens, "min_new_tokens": num_tokens}

    def read() -> None:
        for _ in range(num_tokens):
            for weight in weights:
                weight.sum()

    with torch.no_grad():
        seconds = interleave(
            {"reading the weights": read, OURS: lambda: model.generate(**inputs, **settings)}, rounds, "generation"
        )
    case = f"SmolLM2-135M, {num_tokens} tokens after 100"
    return comparisons(seconds, {"reading the weights": 2.0}, case=case, work="fp32 generation")


def all_rows(rounds: int, *, tiny: bool) -> list[Row]:
    """The table's rows on the language side."""
    rounds = min(rounds, 3)
    return training_rows(min(rounds, 2), tiny=tiny) + generation_rows(rounds, tiny=tiny)
