"""Tiny parts of a LLaVA: a tokenizer, a language model, dense and MoE towers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mllm.assemble import assemble
from mllm.generate import Chat, load
from mllm.tokenizer import train_tokenizer
from vision_moe.model import CLIPMoEVisionConfig, CLIPMoEVisionModel

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a start token of its own accord, and a ChatML template."""
    tokenizer = train_tokenizer(["Is there a red dog? Yes, there is.", "Describe the picture."] * 4, 320)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def tiny_llm(tiny_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def make_tower() -> Callable[..., PreTrainedModel]:
    """make_tower("dense" | "moe", **fields): a tower of 3 layers, 32 px, 4 x 4 patches."""

    def make(kind: str, **fields: Any) -> PreTrainedModel:
        torch.manual_seed(2)
        size: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        }
        if kind == "dense":
            return CLIPVisionModel(CLIPVisionConfig(**size, **fields)).eval()
        return CLIPMoEVisionModel(CLIPMoEVisionConfig(**size, **fields)).eval()

    return make


@pytest.fixture
def picture() -> Image.Image:
    """A picture of noise, wider than high."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 44, 3), dtype=np.uint8))


@pytest.fixture
def write_llava(tmp_path: Path, picture: Image.Image) -> Callable[..., tuple[Path, Path]]:
    """write_llava(samples) -> (json path, image folder); the folder holds a.png."""

    def write(samples: list[dict[str, Any]], name: str = "data.json") -> tuple[Path, Path]:
        images = tmp_path / "images"
        images.mkdir(exist_ok=True)
        picture.save(images / "a.png")
        path = tmp_path / name
        if path.suffix == ".jsonl":
            path.write_text("\n".join(json.dumps(sample, ensure_ascii=False) for sample in samples), encoding="utf-8")
        else:
            path.write_text(json.dumps(samples), encoding="utf-8")
        return path, images

    return write


@pytest.fixture
def make_chat(
    make_tower: Callable[..., PreTrainedModel],
    tiny_llm: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> Callable[..., Chat]:
    """make_chat(kind, template, **settings of load): a whole LLaVA, saved in tmp_path / "model" and loaded."""

    def make(kind: str = "moe", template: str = "v1", **settings: Any) -> Chat:
        folder = assemble(make_tower(kind), tiny_llm, tiny_tokenizer, tmp_path / "model", template=template)
        return load(folder, device="cpu", **settings)

    return make
