"""The tower's fingerprint: another tower is found on loading, another precision or folder layout is none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from mllm.assemble import assemble
from mllm.model import LlavaMoEForConditionalGeneration
from mllm.pretrained import load_model
from mllm.tower_fingerprint import FIELD, check_tower, fingerprint, record_tower


@pytest.fixture
def folder(
    make_tower: Callable[..., PreTrainedModel],
    tiny_llm: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> Path:
    return assemble(make_tower("moe"), tiny_llm, tiny_tokenizer, tmp_path / "llava")


def change_tower(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    name = next(name for name in state if "vision_tower" in name and "q_proj.weight" in name)
    state[name] = change(state[name])
    save_file(state, path, metadata={"format": "pt"})


def test_a_tower_that_was_trained_on_is_found(folder: Path) -> None:
    load_model(folder, device="cpu")
    change_tower(folder, lambda weight: weight + 0.01)
    with pytest.raises(ValueError, match="not the one that projector and language model were trained with"):
        load_model(folder, device="cpu")


def test_another_tower_put_into_the_model_and_saved_is_found(
    folder: Path, make_tower: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = load_model(folder, device="cpu")
    other = make_tower("moe")
    torch.nn.init.normal_(other.encoder.layers[0].self_attn.q_proj.weight)
    own = model.model.vision_tower
    own.load_state_dict({name: tensor for name, tensor in other.state_dict().items() if name in own.state_dict()})
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="vision_tower_fingerprint"):
        LlavaMoEForConditionalGeneration.from_pretrained(tmp_path / "other")
    record_tower(model)
    model.save_pretrained(tmp_path / "other")
    LlavaMoEForConditionalGeneration.from_pretrained(tmp_path / "other")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precision_leaves_it_as_it_is(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    # Too small for half precision, which keeps the sign of what it rounds to zero.
    change_tower(folder, lambda weight: weight.abs().clamp(max=1e-9).neg())
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config[FIELD]
    path.write_text(json.dumps(config))
    model = load_model(folder, device="cpu")
    record_tower(model)
    model.to(dtype).save_pretrained(tmp_path / "rounded")
    check_tower(load_model(tmp_path / "rounded", device="cpu"))
    check_tower(load_model(tmp_path / "rounded", dtype=torch.float32, device="cpu"))


def test_one_flipped_sign_in_a_million_changes_it_and_the_order_of_weights_does_not() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(1000, 1000), torch.randn(1000)
    before = fingerprint([first, second])
    assert fingerprint([second, first]) == before
    first[17, 3] *= -1
    assert fingerprint([first, second]) != before
    first[17, 3] *= -1
    assert fingerprint([first.T, second]) != before
    assert fingerprint([first.reshape(500, 2000), second]) != before


def test_folders_without_one_are_loaded(folder: Path) -> None:
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    assert len(config.pop(FIELD)) == 64
    path.write_text(json.dumps(config))
    change_tower(folder, torch.neg)
    load_model(folder, device="cpu")
