"""A tiny tower, a tiny Llama and a few pictures with dialogues: all that a LLaVA run needs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, LlamaConfig, LlamaForCausalLM

from mllm.recipe import LlavaConfig
from mllm.stage_recipe import LoraSettings, StageConfig
from mllm.tokenizer import train_tokenizer
from vision_moe.model import CLIPMoEVisionConfig, CLIPMoEVisionModel

_COLOURS = ("red", "green", "blue", "white", "black", "yellow")


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a CLIP-MoE vision tower (32 px, 4 patches) and of a Llama, both of random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("parts")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = CLIPMoEVisionConfig(
        **sizes, image_size=32, patch_size=16, num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5
    )
    CLIPMoEVisionModel(tower).save_pretrained(folder / "tower")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "tower"
    )
    tokenizer = train_tokenizer([f"Is it {colour}? Yes No a picture" for colour in _COLOURS], vocab_size=300)
    llama = LlamaConfig(
        **sizes,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(llama).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    return {"vision": str(folder / "tower"), "llm": str(folder / "llm")}


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LLaVA's JSON about six pictures in one colour each, for both stages, and one dialogue without a picture."""
    folder = tmp_path_factory.mktemp("dialogues")
    captions, questions = [], []
    for index, colour in enumerate(_COLOURS):
        name = f"{index}.png"
        Image.new("RGB", (32, 32), colour).save(folder / name)
        captions.append(_sample(index, name, "<image>\nDescribe it.", f"a {colour} picture"))
        questions.append(_sample(index, name, f"<image>\nIs it {colour}?", "Yes" if index % 2 else "No"))
    questions.append({"id": "text", "conversations": _turns("Is it red?", "No")})
    (folder / "pretrain.json").write_text(json.dumps(captions))
    (folder / "finetune.json").write_text(json.dumps(questions))
    return {"pretrain": folder / "pretrain.json", "finetune": folder / "finetune.json", "images": folder}


@pytest.fixture(scope="session")
def make_config(tiny_parts: dict[str, str], dialogues: dict[str, Path]) -> Callable[..., LlavaConfig]:
    """Makes the recipe of a run of 3 + 3 steps of 4 dialogues, in float32 without DeepSpeed unless told otherwise."""

    def make(output: Path, finetune: dict[str, Any] | None = None, **fields: Any) -> LlavaConfig:
        stage = StageConfig(
            data=dialogues["pretrain"], samples=12, global_batch_size=4, per_device_batch_size=1, projector_lr=1e-2
        )
        tuning = {"data": dialogues["finetune"], "llm": "full", "llm_lr": 1e-3, "lora": LoraSettings(r=2, alpha=4)}
        settings: dict[str, Any] = {
            **tiny_parts,
            "image_folder": dialogues["images"],
            "pretrain": replace(stage, template="plain"),
            "finetune": replace(stage, **{**tuning, **(finetune or {})}),
            "deepspeed": "none",
            "bf16": False,
            "save_steps": 1,
            **fields,
        }
        return LlavaConfig(output=output, **settings)

    return make


def _sample(index: int, image: str, question: str, answer: str) -> dict[str, Any]:
    return {"id": str(index), "image": image, "conversations": _turns(question, answer)}


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
