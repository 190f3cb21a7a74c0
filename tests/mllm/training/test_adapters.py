"""LoRA and QLoRA stages: what is quantised, what is written, and that an adapter finds its base and no other."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import mllm.stages
from mllm.adapter import read_info
from mllm.deepspeed_setup import deepspeed_config
from mllm.lora import add_lora
from mllm.merge import main as merge
from mllm.model import LlavaMoEForConditionalGeneration
from mllm.pretrained import load_model, load_processor
from mllm.quantization import accept_own_state, quantization_config
from mllm.stage_recipe import LoraSettings, StageConfig
from mllm.train import run
from vision_moe.files import weights_sha256

LAYERS = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, make_config) -> Path:
    """Folder of a finished run whose second stage trained adapters on whole weights."""
    return run(make_config(tmp_path_factory.mktemp("lora") / "run", finetune={"llm": "lora"})).parent


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """A picture, whose four tokens stand between two of text in `_logits`."""
    torch.manual_seed(0)
    return {"pixel_values": torch.rand(1, 3, 32, 32)}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    image = model.config.image_token_id
    ids = torch.tensor([[5, image, image, image, image, 6]])
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_only_linear_weights_of_the_language_model_are_quantised(lora_run, quantization):
    pytest.importorskip("bitsandbytes")
    folder = lora_run / "pretrain" / "model"
    model = LlavaMoEForConditionalGeneration.from_pretrained(
        folder, device_map={"": "cpu"}, quantization_config=quantization_config(quantization)
    )
    plain = LlavaMoEForConditionalGeneration.from_pretrained(folder)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    for name, module in plain.named_modules():
        inside = name.startswith("model.language_model.layers.") and isinstance(module, nn.Linear)
        assert kinds[name] == (LAYERS[quantization] if inside else type(module).__name__), name
    stored = {"4bit": torch.uint8, "8bit": torch.int8}[quantization]
    for name, parameter in model.named_parameters():
        inside = name.startswith("model.language_model.layers.") and "proj" in name
        assert parameter.dtype == (stored if inside else torch.float32), name
    # 2 layers of 7 matrices.
    assert list(kinds.values()).count(LAYERS[quantization]) == 14


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantised_model_takes_back_its_own_state_and_nothing_else(lora_run, quantization):
    pytest.importorskip("bitsandbytes")
    model = LlavaMoEForConditionalGeneration.from_pretrained(
        lora_run / "model", device_map={"": "cpu"}, quantization_config=quantization_config(quantization)
    )
    accept_own_state(model)
    add_lora(model, LoraSettings(r=2))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*model\.other\.weight"):
        model.load_state_dict({**state, "model.other.weight": torch.zeros(1)})


@pytest.mark.parametrize("quantization", [None, "4bit", "8bit"])
def test_stage_trains_adapters_and_projector_and_merges_into_the_base_that_is_not_quantised(
    make_config, tmp_path, monkeypatch, quantization
):
    if quantization is not None:
        pytest.importorskip("bitsandbytes")
    models = []

    class SpyingTrainer(mllm.stages.LlavaTrainer):
        def __init__(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
            models.append(model)
            super().__init__(*args, model=model, **kwargs)

    monkeypatch.setattr(mllm.stages, "LlavaTrainer", SpyingTrainer)
    config = make_config(tmp_path / "run", finetune={"llm": "lora", "quantization": quantization})
    folder = run(config)
    trained = {name for name, parameter in models[1].named_parameters() if parameter.requires_grad}
    assert len([name for name in trained if ".lora_" in name]) == 28
    assert all(".lora_" in name or "multi_modal_projector" in name for name in trained)
    layer = models[1].model.language_model.layers[0].self_attn.q_proj.get_base_layer()
    assert type(layer).__name__ == ("Linear" if quantization is None else LAYERS[quantization])

    base, merged = _weights(config.output / "pretrain" / "model"), _weights(folder)
    adapter = load_file(config.output / "adapter" / "adapter_model.safetensors")
    assert {name: tensor.dtype for name, tensor in merged.items()} == {n: t.dtype for n, t in base.items()}
    for name, tensor in merged.items():
        full = f"base_model.model.{name}"
        down, up = (adapter.get(f"{full.removesuffix('.weight')}.lora_{part}.weight") for part in "AB")
        if full in adapter:
            assert torch.equal(tensor, adapter[full])
            assert not torch.equal(tensor, base[name])
        elif down is not None:
            # alpha / r = 4 / 2
            torch.testing.assert_close(tensor, base[name] + 2 * up @ down)
            assert not torch.equal(tensor, base[name])
        else:
            assert torch.equal(tensor, base[name])
    assert read_info(config.output / "adapter").quantization == quantization
    assert not any("checkpoint" in str(path) for path in config.output.rglob("*"))


def test_adapter_folder_is_one_that_peft_reads(lora_run, inputs):
    base = LlavaMoEForConditionalGeneration.from_pretrained(lora_run / "pretrain" / "model")
    before = _logits(base, inputs)
    joined = PeftModel.from_pretrained(base, lora_run / "adapter").merge_and_unload()
    expected = _logits(LlavaMoEForConditionalGeneration.from_pretrained(lora_run / "model"), inputs)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(_logits(joined, inputs), expected, rtol=1e-4, atol=1e-5)


def test_adapter_folder_is_loaded_like_the_merged_model(lora_run, inputs):
    joined, merged = (load_model(lora_run / name, device="cpu") for name in ("adapter", "model"))
    torch.testing.assert_close(_logits(joined, inputs), _logits(merged, inputs), rtol=1e-4, atol=1e-5)
    assert type(joined) is type(merged)
    assert joined.config.image_aspect_ratio == merged.config.image_aspect_ratio == "pad"
    assert load_processor(lora_run / "adapter").image_processor.do_pad


def test_adapter_is_loaded_beside_quantised_weights(lora_run, inputs):
    pytest.importorskip("bitsandbytes")
    # As in training: the processor's own packing of 4-bit weights for inference wants wider layers than these.
    model = load_model(lora_run / "adapter", device="cpu", quantization="4bit").train()
    layer = model.model.language_model.layers[0].self_attn.q_proj
    assert type(layer.get_base_layer()).__name__ == "Linear4bit"
    whole = _logits(load_model(lora_run / "model", device="cpu"), inputs)
    base = _logits(load_model(lora_run / "pretrain" / "model", device="cpu"), inputs)
    # Nearer to the trained model than the base is, and not the same.
    assert 0 < (_logits(model, inputs) - whole).norm() < (base - whole).norm()


def test_merge_gives_the_model_of_the_stage(lora_run, tmp_path):
    merge(["--adapter", str(lora_run / "adapter"), "--out", str(tmp_path / "merged")])
    files = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    expected = {path.name: path.read_bytes() for path in (lora_run / "model").iterdir()}
    # The cards name the folder that each lies in.
    assert files.pop("README.md") != expected.pop("README.md")
    assert files == expected
    with pytest.raises(FileExistsError, match="choose another --out"):
        merge(["--adapter", str(lora_run / "adapter"), "--out", str(tmp_path / "merged")])


def test_merge_into_shards_is_the_merge_into_one_file(lora_run, tmp_path):
    base = tmp_path / "base"
    model = LlavaMoEForConditionalGeneration.from_pretrained(lora_run / "pretrain" / "model")
    model.save_pretrained(base, max_shard_size="40KB", save_original_format=False)
    assert len(list(base.glob("*.safetensors"))) > 2
    adapter = tmp_path / "adapter"
    shutil.copytree(lora_run / "adapter", adapter)
    info = json.loads((adapter / "llava_adapter.json").read_text())
    info |= {"base": str(base), "base_fingerprint": weights_sha256(base)}
    (adapter / "llava_adapter.json").write_text(json.dumps(info))
    merge(["--adapter", str(adapter), "--out", str(tmp_path / "merged")])
    got = load_model(tmp_path / "merged", device="cpu").state_dict()
    expected = load_model(lora_run / "model", device="cpu").state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_adapter_is_not_merged_into_another_base(lora_run, tmp_path):
    adapter, base = lora_run / "adapter", tmp_path / "base"
    shutil.copytree(lora_run / "pretrain" / "model", base)
    merge(["--adapter", str(adapter), "--base", str(base), "--out", str(tmp_path / "moved")])
    weights = _weights(base)
    weights["lm_head.weight" if "lm_head.weight" in weights else next(iter(weights))] += 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds other weights"):
        merge(["--adapter", str(adapter), "--base", str(base), "--out", str(tmp_path / "out")])
    with pytest.raises(FileNotFoundError, match="takes --base DIR"):
        merge(["--adapter", str(adapter), "--base", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match=r"is no adapter of mllm\.train"):
        merge(["--adapter", str(base), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_adapter_with_a_foreign_weight_is_refused(lora_run, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(lora_run / "adapter", adapter)
    path = adapter / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.other.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"other\.weight"):
        merge(["--adapter", str(adapter), "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match=r"other\.weight"):
        load_model(adapter, device="cpu")


def test_trained_tower_is_part_of_the_adapter(make_config, tmp_path):
    config = make_config(tmp_path / "run", finetune={"llm": "lora", "tower": "full", "tower_lr": 1e-3})
    merged = _weights(run(config))
    base = _weights(config.output / "pretrain" / "model")
    assert any("vision_tower" in name and not torch.equal(base[name], merged[name]) for name in merged)
    saved = json.loads((config.output / "adapter" / "adapter_config.json").read_text())
    assert saved["modules_to_save"] == ["multi_modal_projector", "vision_tower"]
    joined = load_model(config.output / "adapter", device="cpu").state_dict()
    assert all(torch.equal(joined[name], tensor) for name, tensor in merged.items() if "vision_tower" in name)


@pytest.mark.parametrize("fields", [{"llm": "lora"}, {"llm": "frozen", "routers": "full"}], ids=["llm", "routers"])
def test_tower_trains_adapters_outside_its_mixtures_and_is_merged(make_config, tmp_path, inputs, fields):
    finetune = {"tower": "lora", "tower_lr": 3e-2, **fields}
    config = make_config(tmp_path / "run", finetune=finetune)
    merged = _weights(run(config))
    base = _weights(config.output / "pretrain" / "model")
    changed = {name for name in merged if not torch.equal(base[name], merged[name])}
    in_tower = {name.removeprefix("model.vision_tower.") for name in changed if "vision_tower" in name}
    # 1 block of 2 serves the language model: its attention's matrices and, where they train, its routers.
    assert {name.split(".")[-2] for name in in_tower} == {"q_proj", "k_proj", "v_proj", "out_proj"} | (
        {"router"} if "routers" in fields else set()
    )
    assert any("language_model" in name for name in changed) == (fields["llm"] == "lora")
    # The merged folder and the adapter's are the same model, and both pass the tower's fingerprint.
    joined, whole = (load_model(config.output / name, device="cpu") for name in ("adapter", "model"))
    before = _logits(load_model(config.output / "pretrain" / "model", device="cpu"), inputs)
    torch.testing.assert_close(_logits(joined, inputs), _logits(whole, inputs), rtol=1e-4, atol=1e-5)
    assert (_logits(whole, inputs) - before).abs().max() > 1e-3
    joined.save_pretrained(tmp_path / "again", save_original_format=False)
    LlavaMoEForConditionalGeneration.from_pretrained(tmp_path / "again")


def test_adapters_on_the_tower_alone_beside_a_whole_language_model_are_refused():
    with pytest.raises(ValueError, match="take llm: lora, or tower: full"):
        StageConfig(tower="lora", llm="full")


def test_first_stage_with_lora_keeps_its_base(make_config, tmp_path, inputs):
    config = make_config(tmp_path / "run", finetune={"llm": "lora"})
    folder = run(replace(config, pretrain=replace(config.pretrain, enabled=False)))
    assert read_info(config.output / "adapter").base == str(config.output / "start")
    joined = load_model(config.output / "adapter", device="cpu")
    torch.testing.assert_close(
        _logits(joined, inputs), _logits(load_model(folder, device="cpu"), inputs), rtol=1e-4, atol=1e-5
    )


def test_quantised_weights_that_should_train_are_refused():
    with pytest.raises(ValueError, match="needs llm: lora, but llm is full"):
        StageConfig(llm="full", quantization="4bit")


@pytest.mark.parametrize("deepspeed", ["zero3", deepspeed_config("zero3")])
def test_quantised_weights_under_zero3_are_refused(make_config, tmp_path, deepspeed):
    finetune = {"llm": "lora", "quantization": "4bit"}
    with pytest.raises(ValueError, match="stage finetune has quantised weights, which ZeRO-3 cannot split"):
        make_config(tmp_path, finetune=finetune, deepspeed=deepspeed)
    assert make_config(tmp_path, finetune=finetune, deepspeed="zero2").finetune.quantization == "4bit"
