"""A small POPE on plain pictures, in the form of Scenes; a tiny CLIP and a tiny LLaVA in folders."""

import json

import pytest
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from mllm.assemble import assemble
from vision_moe.recipe import ScratchConfig
from vision_moe.scratch import build_clip, train_tokenizer


@pytest.fixture(scope="session")
def pope_folder(tmp_path_factory):
    """Six questions about three pictures, yes and no in turn, in two categories."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "images" / "test").mkdir(parents=True)
    lines = []
    for index, color in enumerate(["red", "green", "blue"]):
        image = f"test/{index}.png"
        Image.new("RGB", (32, 32), color).save(folder / "images" / image)
        for label, asked in (("yes", color), ("no", "white")):
            lines.append(
                {
                    "question_id": len(lines) + 1,
                    "image": image,
                    "text": f"Is there a {asked} wall in the image?",
                    "label": label,
                    "category": "random" if index < 2 else "popular",
                }
            )
    (folder / "pope_test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A CLIP of 2 + 2 layers and width 32 for pictures of 32 pixels, with random weights."""
    config = ScratchConfig(
        image_size=32,
        patch_size=16,
        hidden_size=32,
        num_vision_layers=2,
        num_text_layers=2,
        num_heads=2,
        projection_dim=16,
        max_text_tokens=12,
        vocab_size=300,
    )
    model, processor = build_clip(config, [f"a {color} picture" for color in ("red", "green", "blue", "white")], seed=0)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory):
    """An untrained LLaVA: a CLIP of width 32 for pictures of 32 pixels and a Llama of width 64."""
    texts = ["Is there a red wall in the image? Yes. No.", "Answer the question using a single word or phrase."]
    sizes = ScratchConfig(
        image_size=32, patch_size=16, hidden_size=32, num_vision_layers=2, num_text_layers=1, num_heads=2
    )
    clip, _ = build_clip(sizes, texts, seed=0)
    tokenizer = train_tokenizer(texts, 400, 512)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    return assemble(clip, llama, tokenizer, tmp_path_factory.mktemp("llava") / "model")
