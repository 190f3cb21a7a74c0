"""LLaVA's own layouts: what is read computes what LLaVA's parts compute, and what is written can be read again."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModel, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from mllm.assemble import assemble
from mllm.convert import from_llava, to_llava
from mllm.pretrained import load_model, load_processor

SETTINGS = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "image_aspect_ratio": "pad",
}


class Parts:
    """A LLaVA's parts as its own code holds them, and what they compute."""

    def __init__(self, tower: CLIPVisionModel, llm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        torch.manual_seed(5)
        self.tower, self.llm, self.tokenizer = tower, llm, tokenizer
        self.projector = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))

    def projector_state(self, prefix: str = "model.mm_projector.") -> dict[str, Tensor]:
        return {f"{prefix}{name}": tensor for name, tensor in self.projector.state_dict().items()}

    def state(self) -> dict[str, Tensor]:
        return {**self.llm.state_dict(), **self.projector_state()}

    def write_llm(self, folder: Path, **fields: Any) -> Path:
        """The language model with config and tokenizer, as Vicuna lies on the hub."""
        self.llm.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return folder

    def write_tower(self, folder: Path) -> str:
        self.tower.save_pretrained(folder)
        CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]
        ).save_pretrained(folder)
        return str(folder)

    @torch.no_grad()
    def logits(self, pixel_values: Tensor, ids: Tensor) -> Tensor:
        """One picture, then text."""
        features = self.tower(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        embeds = torch.cat([self.projector(features), self.llm.get_input_embeddings()(ids)], dim=1)
        return self.llm(inputs_embeds=embeds).logits


@pytest.fixture
def parts(
    make_tower: Callable[..., PreTrainedModel], tiny_llm: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> Parts:
    return Parts(make_tower("dense"), tiny_llm, tiny_tokenizer)


@pytest.fixture
def whole(parts: Parts, tmp_path: Path) -> Path:
    """A `llava_llama` folder whose .bin shards hold LLaVA's names."""
    folder = parts.write_llm(
        tmp_path / "llava", **SETTINGS, model_type="llava_llama", mm_vision_tower=parts.write_tower(tmp_path / "clip")
    )
    (folder / "model.safetensors").unlink()
    state = parts.state()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    names = sorted(state)
    shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, chosen in shards.items():
        torch.save({name: state[name] for name in chosen}, folder / file)
    index = {"weight_map": {name: file for file, chosen in shards.items() for name in chosen}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@torch.no_grad()
def our_logits(folder: Path, pixel_values: Tensor, ids: Tensor) -> Tensor:
    model = load_model(folder, device="cpu").eval()
    picture = torch.full((1, 16), model.config.image_token_id)
    logits = model(input_ids=torch.cat([picture, ids], dim=1), pixel_values=pixel_values).logits
    # <image> and padding lie behind the vocabulary that LLaVA has.
    return logits[..., : ids.max() + 200]


def assert_same(folder: Path, parts: Parts) -> None:
    pixel_values, ids = torch.randn(1, 3, 32, 32), torch.randint(5, 100, (1, 9))
    expected, got = parts.logits(pixel_values, ids), our_logits(folder, pixel_values, ids)
    width = min(expected.shape[-1], got.shape[-1])
    assert width > 200
    assert (expected[..., :width] - got[..., :width]).abs().max() == 0.0


def test_a_whole_folder_gives_the_logits_of_llavas_parts(parts: Parts, whole: Path, tmp_path: Path) -> None:
    from_llava.main(["--llava", str(whole), "--out", str(tmp_path / "ours")])
    assert_same(tmp_path / "ours", parts)
    config = load_model(tmp_path / "ours", device="cpu").config
    assert (config.image_aspect_ratio, config.conversation_template) == ("pad", "v1")
    assert not any(name.startswith("mm_") for name in config.text_config.to_dict())
    assert tuple(load_processor(tmp_path / "ours").image_processor.image_mean) == (0.1, 0.2, 0.3)


def test_a_projector_alone_goes_onto_its_language_model(parts: Parts, tmp_path: Path) -> None:
    llm, tower = parts.write_llm(tmp_path / "llm"), parts.write_tower(tmp_path / "clip")
    torch.save(parts.projector_state(), tmp_path / "mm_projector.bin")
    projector = str(tmp_path / "mm_projector.bin")
    from_llava.main(["--llava", str(llm), "--projector", projector, "--vision", tower, "--out", str(tmp_path / "ours")])
    assert_same(tmp_path / "ours", parts)


def test_an_adapter_is_merged_and_what_trained_beside_it_taken(parts: Parts, tmp_path: Path) -> None:
    llm, tower = parts.write_llm(tmp_path / "llm"), parts.write_tower(tmp_path / "clip")
    folder = tmp_path / "lora"
    adapted = get_peft_model(
        parts.llm, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    adapted.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(SETTINGS | {"mm_vision_tower": tower}))
    torch.save(parts.projector_state("base_model.model.model.mm_projector."), folder / "non_lora_trainables.bin")
    plain = load_file(llm / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    low = load_file(folder / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.mlp.down_proj"
    by_hand = plain + 4 / 2 * low[f"{stem}.lora_B.weight"] @ low[f"{stem}.lora_A.weight"]
    parts.llm = adapted.merge_and_unload()
    from_llava.main(["--llava", str(llm), "--lora", str(folder), "--out", str(tmp_path / "ours")])
    assert_same(tmp_path / "ours", parts)
    merged = load_model(tmp_path / "ours", device="cpu").model.language_model.layers[1].mlp.down_proj.weight
    torch.testing.assert_close(merged, by_hand)


def test_a_tower_within_the_checkpoint_is_taken(parts: Parts, whole: Path, tmp_path: Path, caplog: Any) -> None:
    torch.manual_seed(6)
    for parameter in parts.tower.parameters():
        nn.init.normal_(parameter, std=0.1)
    inner = {f"model.vision_tower.vision_tower.vision_model.{n}": t for n, t in parts.tower.state_dict().items()}
    for path in whole.glob("pytorch_model*"):
        path.unlink()
    save_file({**parts.state(), **inner}, whole / "model.safetensors")
    with caplog.at_level(logging.INFO):
        from_llava.from_llava(from_llava.LlavaSource(llava=whole), tmp_path / "ours")
    assert_same(tmp_path / "ours", parts)
    assert "39 of 39 tensors differ from those of --vision" in caplog.text


@pytest.mark.parametrize("copied", [True, False])
def test_a_model_written_as_llavas_and_read_again_is_equal_in_every_logit(
    parts: Parts, tmp_path: Path, copied: bool
) -> None:
    ours, theirs, back = tmp_path / "ours", tmp_path / "theirs", tmp_path / "back"
    tower = parts.write_tower(tmp_path / "clip")
    assemble(tower, parts.llm, parts.tokenizer, ours)
    to_llava.main(["--model", str(ours), "--out", str(theirs), *([] if copied else ["--vision", tower])])
    config = json.loads((theirs / "config.json").read_text())
    assert config["mm_vision_select_layer"] == (-1 if copied else -2)
    assert config["mm_vision_tower"] == (str(theirs / "vision_tower") if copied else tower)
    from_llava.main(["--llava", str(theirs), "--out", str(back)])
    pixel_values, ids = torch.randn(1, 3, 32, 32), torch.randint(5, 100, (1, 9))
    assert (our_logits(ours, pixel_values, ids) - our_logits(back, pixel_values, ids)).abs().max() == 0.0
    assert tuple(load_processor(back).image_processor.image_mean) == (0.1, 0.2, 0.3)
    before, after = load_file(ours / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_written_has_llavas_names_and_fields(parts: Parts, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assemble(parts.write_tower(tmp_path / "clip"), parts.llm, parts.tokenizer, ours)
    to_llava.main(["--model", str(ours), "--out", str(theirs)])
    assert load_file(theirs / "model.safetensors").keys() == parts.state().keys()
    config = json.loads((theirs / "config.json").read_text())
    expected = {
        **SETTINGS,
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_hidden_size": 32,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
    }
    assert {name: config[name] for name in expected} == expected | {"mm_vision_select_layer": -1}
    tower = load_file(theirs / "vision_tower" / "model.safetensors")
    assert "vision_model.encoder.layers.1.mlp.fc1.weight" in tower
    loaded, report = CLIPVisionModel.from_pretrained(theirs / "vision_tower", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.num_hidden_layers == 2


def test_scaled_rotary_positions_survive_under_their_old_name(parts: Parts, tmp_path: Path) -> None:
    ours, theirs, back = tmp_path / "ours", tmp_path / "theirs", tmp_path / "back"
    parts.llm.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    assemble(parts.write_tower(tmp_path / "clip"), parts.llm, parts.tokenizer, ours)
    to_llava.main(["--model", str(ours), "--out", str(theirs)])
    config = json.loads((theirs / "config.json").read_text())
    assert "rope_parameters" not in config
    assert (config["rope_theta"], config["rope_scaling"]) == (500.0, {"type": "linear", "factor": 2.0})
    from_llava.main(["--llava", str(theirs), "--out", str(back)])
    rope = load_model(back, device="cpu").config.text_config.rope_parameters
    assert {name: rope[name] for name in ("rope_type", "factor", "rope_theta")} == parts.llm.config.rope_parameters


def test_the_projector_alone_is_written_on_request(parts: Parts, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assemble(parts.write_tower(tmp_path / "clip"), parts.llm, parts.tokenizer, ours)
    to_llava.main(["--model", str(ours), "--out", str(theirs), "--projector-only"])
    assert {path.name for path in theirs.iterdir()} == {"mm_projector.bin", "config.json"}
    state = torch.load(theirs / "mm_projector.bin", weights_only=True)
    assert state.keys() == parts.projector_state().keys()


def test_another_tower_than_the_models_is_not_named(parts: Parts, tmp_path: Path) -> None:
    tower = parts.write_tower(tmp_path / "clip")
    assemble(tower, parts.llm, parts.tokenizer, tmp_path / "ours")
    nn.init.ones_(parts.tower.encoder.layers[0].mlp.fc1.weight)
    parts.write_tower(tmp_path / "clip")
    with pytest.raises(ValueError, match="is not the tower of the model"):
        to_llava.main(["--model", str(tmp_path / "ours"), "--out", str(tmp_path / "theirs"), "--vision", tower])
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.mm_projector.2.bias": None}, "projector do not fit. missing: linear_2.bias"),
        ({"model.mm_projector.4.weight": torch.ones(2)}, "projector do not fit. unexpected: 4.weight"),
        ({"model.mm_projector.0.weight": torch.ones(32, 8)}, r"linear_1.weight \(32, 8\) in place of \(32, 32\)"),
        ({"model.norm.weight": None}, "language model do not fit. missing: model.norm.weight"),
        ({"model.image_newline": torch.ones(32)}, "language model do not fit. unexpected: model.image_newline"),
        ({"lm_head.weight": torch.ones(9, 32)}, "language model do not fit. of another shape: .*lm_head.weight"),
    ],
)
def test_weights_that_do_not_fit_are_listed(
    parts: Parts, whole: Path, tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    state = parts.state() | change
    for path in whole.glob("pytorch_model*"):
        path.unlink()
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, whole / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        from_llava.main(["--llava", str(whole), "--out", str(tmp_path / "ours")])
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is set"),
        ({"mm_projector_type": "linear"}, "unknown projector 'linear'"),
        ({"mm_vision_select_feature": "cls_patch"}, "only 'patch' is supported"),
        ({"image_aspect_ratio": "anyres"}, "choose one of: square, pad"),
        ({"model_type": "llava_mpt"}, "must be a Llama"),
        ({"mm_vision_tower": None}, "give --vision"),
    ],
)
def test_a_llava_that_ours_cannot_be_is_a_clear_error(
    whole: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    path = whole / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        from_llava.main(["--llava", str(whole), "--out", str(tmp_path / "ours")])


def test_a_pickle_that_is_more_than_tensors_is_not_opened(parts: Parts, tmp_path: Path) -> None:
    llm, tower = parts.write_llm(tmp_path / "llm"), parts.write_tower(tmp_path / "clip")
    torch.save({"model.mm_projector.0.weight": Path("x")}, tmp_path / "mm_projector.bin")
    projector = str(tmp_path / "mm_projector.bin")
    flags = ["--llava", str(llm), "--projector", projector, "--vision", tower, "--out", str(tmp_path / "ours")]
    with pytest.raises(ValueError, match="a pickle can run any code"):
        from_llava.main(flags)
