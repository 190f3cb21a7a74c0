"""LlavaMoEForConditionalGeneration and its assembly, against transformers' own LLaVA."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import mllm.loss
from mllm.assemble import assemble, build_llava
from mllm.conversation import encode_prompt
from mllm.loss import supervised_loss
from mllm.model import LlavaMoEForConditionalGeneration
from mllm.tower import load_tower
from vision_moe.model import CLIPMoEConfig, CLIPMoEModel

Tower = Callable[..., PreTrainedModel]
KINDS = ["dense", "moe"]


@pytest.fixture
def make_llava(make_tower: Tower, tiny_llm: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Any:
    def make(kind: str = "moe", **fields: Any) -> LlavaMoEForConditionalGeneration:
        return build_llava(make_tower(kind, **fields), tiny_llm, tiny_tokenizer)[0]

    return make


@pytest.fixture
def batch() -> Callable[..., dict[str, Tensor]]:
    """batch(model, pictures=True): two samples of different length, the second padded."""

    def make(model: LlavaMoEForConditionalGeneration, pictures: bool = True, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 250, (2, 24), generator=generator)
        if pictures:
            ids[:, 1:17] = model.config.image_token_id
        labels = ids.clone()
        labels[:, :18] = -100
        labels[1, 20:22] = -100
        mask = torch.ones_like(ids)
        mask[1, 22:] = 0
        labels[1, 22:] = -100
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if pictures:
            inputs["pixel_values"] = torch.randn(2, 3, 32, 32, generator=generator)
        return inputs

    return make


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_items", [None, 11])
def test_loss_and_gradients_are_those_of_the_head_at_all_positions(
    make_llava: Any, batch: Any, kind: str, num_items: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mllm.loss, "_CHUNK", 3)
    coefficient = {"router_aux_loss_coef": 0.0} if kind == "moe" else {}
    model = make_llava(kind, **coefficient)
    kwargs = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    inputs = batch(model)
    expected = LlavaForConditionalGeneration.forward(model.eval(), **inputs, **kwargs).loss
    expected_gradients = gradients(model, expected)
    actual = model.train()(**inputs, **kwargs)
    assert actual.logits is None
    torch.testing.assert_close(actual.loss, expected)
    actual_gradients = gradients(model, actual.loss)
    assert set(expected_gradients) <= set(actual_gradients)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(actual_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_head_runs_once_and_at_supervised_positions_only(make_llava: Any, batch: Any) -> None:
    model = make_llava("dense").train()
    rows = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape))
    model(**batch(model)).loss.backward()
    assert rows == [(6 + 2, 32)]


def test_nothing_supervised_is_a_loss_of_zero_that_still_gives_gradients() -> None:
    head = torch.nn.Linear(8, 5, bias=False)
    hidden = torch.randn(2, 4, 8, requires_grad=True)
    loss, count = supervised_loss(hidden, torch.full((2, 4), -100), head)
    loss.backward()
    assert (loss.item(), count.item()) == (0.0, 0)
    assert head.weight.grad is not None
    assert head.weight.grad.abs().max() == 0


def test_the_float32_logits_exist_in_chunks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mllm.loss, "_CHUNK", 4)
    head = torch.nn.Linear(8, 50, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(1, 41, 8, dtype=torch.bfloat16)
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape) if tensor.dtype == torch.float32 else ())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        supervised_loss(hidden, torch.randint(0, 50, (1, 41)), head)
    assert not any(shape[-1:] == (50,) for shape in saved)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("select_layer", [-2, -1, -3, 2])
def test_the_truncated_tower_ends_in_the_selected_hidden_state(make_tower: Tower, kind: str, select_layer: int) -> None:
    full = make_tower(kind)
    pixel_values = torch.randn(2, 3, 32, 32)
    expected = full(pixel_values, output_hidden_states=True).hidden_states[select_layer]
    tower = load_tower(full, select_layer, torch.float32).eval()
    actual = tower(pixel_values, output_hidden_states=True)
    assert torch.equal(actual.last_hidden_state, expected)
    assert torch.equal(actual.hidden_states[-1], expected)
    assert len(full.encoder.layers) == full.config.num_hidden_layers == 3


def test_truncation_keeps_which_blocks_are_moe(make_tower: Tower) -> None:
    full = make_tower("moe", moe_layers=[1, 2])
    tower = load_tower(full, -2, torch.float32)
    assert tower.config.moe_layers == [1]
    assert full.config.moe_layers == [1, 2]


@pytest.mark.parametrize("select_layer", [0, 4, -4, -5])
def test_a_layer_that_does_not_exist_is_an_error(make_tower: Tower, select_layer: int) -> None:
    with pytest.raises(ValueError, match="select_layer must be in"):
        load_tower(make_tower("dense"), select_layer, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_comes_from_a_whole_clip_given_as_model_or_folder(tmp_path: Path, kind: str) -> None:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision, text = {**size, "image_size": 32, "patch_size": 8}, {**size, "vocab_size": 64}
    model = (
        CLIPModel(CLIPConfig(vision_config=vision, text_config=text))
        if kind == "dense"
        else CLIPMoEModel(CLIPMoEConfig(vision_config=vision, text_config=text))
    ).eval()
    model.save_pretrained(tmp_path / "whole")
    model.vision_model.save_pretrained(tmp_path / "half")
    pixel_values = torch.randn(1, 3, 32, 32)
    expected = model.vision_model(pixel_values).last_hidden_state
    for source in (model, tmp_path / "whole", tmp_path / "half"):
        tower = load_tower(source, -1, torch.float32).eval()
        assert torch.equal(tower(pixel_values).last_hidden_state, expected)


def test_another_kind_of_model_is_no_tower(tiny_llm: LlamaForCausalLM, tmp_path: Path) -> None:
    tiny_llm.save_pretrained(tmp_path)
    for source in (tiny_llm, tmp_path):
        with pytest.raises(ValueError, match="vision tower must be"):
            load_tower(source, -2, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_text_alone_gives_tower_and_projector_gradients_of_zero(make_llava: Any, batch: Any, kind: str) -> None:
    model = make_llava(kind).train()
    with_pictures = gradients(model, model(**batch(model)).loss)
    output = model(**batch(model, pictures=False))
    text_only = gradients(model, output.loss)
    assert set(text_only) == set(with_pictures)
    outside = [name for name in text_only if "vision_tower" in name or "projector" in name]
    assert len(outside) > 20
    assert all(text_only[name].abs().max() == 0 for name in outside)
    assert output.aux_loss is None
    reference = LlavaForConditionalGeneration.forward(model.eval(), **batch(model, pictures=False)).loss
    torch.testing.assert_close(output.loss, reference)


def test_text_alone_goes_backward_through_a_frozen_language_model_as_pictures_do(make_llava: Any, batch: Any) -> None:
    """Ranks that went backward through other weights would wait for each other under ZeRO-3."""
    model = make_llava("dense").requires_grad_(False).train()
    model.model.multi_modal_projector.requires_grad_(True)
    reached: list[bool] = []
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args: reached.append(args[0].requires_grad)
    )
    for pictures in (True, False):
        gradients(model, model(**batch(model, pictures=pictures)).loss)
    assert reached == [True, True]


def test_an_unfrozen_towers_aux_loss_counts_once(make_llava: Any, batch: Any) -> None:
    model = make_llava("moe", router_aux_loss_coef=0.5).train()
    inputs = batch(model)
    output = model(**inputs)
    tower = model.model.vision_tower(inputs["pixel_values"])
    language = LlavaForConditionalGeneration.forward(model.eval(), **inputs).loss
    torch.testing.assert_close(output.aux_loss, tower.aux_loss.detach())
    torch.testing.assert_close(output.loss, language + tower.aux_loss)
    assert output.aux_loss > 0.1


@pytest.mark.parametrize(("coefficient", "wanted"), [(0.01, True), (0.0, False)])
def test_an_unfrozen_tower_without_coefficients_has_no_router_losses(make_llava: Any, coefficient, wanted) -> None:
    assert make_llava("moe", router_aux_loss_coef=coefficient).has_router_losses is wanted


def test_a_frozen_tower_has_no_aux_loss_and_stays_in_evaluation(make_llava: Any, batch: Any) -> None:
    model = make_llava("moe", router_aux_loss_coef=0.5)
    model.model.vision_tower.requires_grad_(False)
    model.train()
    assert not model.model.vision_tower.training
    assert model.model.language_model.training
    inputs = batch(model)
    output = model(**inputs)
    assert output.aux_loss is None
    torch.testing.assert_close(output.loss, LlavaForConditionalGeneration.forward(model.eval(), **inputs).loss)


def test_gradient_checkpointing_changes_neither_loss_nor_gradients(make_llava: Any, batch: Any) -> None:
    model = make_llava("moe", router_aux_loss_coef=0.5).train()
    inputs = batch(model)
    plain = model(**inputs)
    plain_gradients = gradients(model, plain.loss)
    model.activation_checkpointing_enable()
    calls = []
    # Inside a block: its own hooks stay outside the checkpoint.
    model.model.vision_tower.encoder.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    output = model(**inputs)
    checkpointed = gradients(model, output.loss)
    assert len(calls) == 2
    torch.testing.assert_close(output.loss, plain.loss)
    torch.testing.assert_close(output.aux_loss, plain.aux_loss)
    assert checkpointed.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_micro_batches_add_up_to_the_language_loss_and_the_mean_aux_loss(make_llava: Any, batch: Any) -> None:
    model = make_llava("moe", router_aux_loss_coef=0.5).train()
    first, second = batch(model, seed=1), batch(model, seed=2)
    num_items = torch.tensor(16)
    total = sum(model(**inputs, num_items_in_batch=num_items).loss for inputs in (first, second))
    aux = sum(model(**inputs).aux_loss for inputs in (first, second)) / 2
    whole = {name: torch.cat([first[name], second[name]]) for name in first}
    language = LlavaForConditionalGeneration.forward(model.eval(), **whole).loss
    torch.testing.assert_close(total, language + aux)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_stock_transformers_loads_the_folder_and_gives_the_same_logits(
    make_tower: Tower,
    tiny_llm: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    batch: Any,
    tmp_path: Path,
    kind: str,
    tied: bool,
) -> None:
    tiny_llm.config.tie_word_embeddings = tied
    tiny_llm.tie_weights()
    folder = assemble(make_tower(kind), tiny_llm, tiny_tokenizer, tmp_path / "llava")
    ours = LlavaMoEForConditionalGeneration.from_pretrained(folder).eval()
    stock, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = batch(ours)
    assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)
    assert torch.equal(ours(**inputs).loss, stock(**inputs).loss)
    assert (ours.lm_head.weight is ours.model.language_model.embed_tokens.weight) == tied
    assert ours.config.conversation_template == "v1"
    assert ours.config.image_aspect_ratio == "pad"


def test_stock_processors_load_the_folder_and_expand_a_picture_to_the_towers_patches(
    make_tower: Tower, tiny_llm: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, picture: Any
) -> None:
    folder = assemble(make_tower("dense"), tiny_llm, tiny_tokenizer, tmp_path / "llava")
    # What lmms-eval's llava_hf asks of a folder.
    config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    assert config.model_type == "llava"
    question = [{"type": "image"}, {"type": "text", "text": "Is there a dog?"}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
        {"role": "user", "content": "Is it red?"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=picture, text=text, return_tensors="pt")
    turns = [("human", "<image>\nIs there a dog?"), ("gpt", "Yes"), ("human", "Is it red?")]
    trained = encode_prompt([{"from": role, "value": said} for role, said in turns], processor.tokenizer, "v1")
    ids = inputs["input_ids"][0]
    assert ids[ids != config.image_token_id].tolist() == [token_id for token_id in trained if token_id >= 0]
    assert (inputs["input_ids"] == config.image_token_id).sum() == 16
    assert torch.isfinite(model(**inputs).logits).all()


def test_assembled_parts_compute_what_they_did_apart(
    make_tower: Tower, tiny_llm: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tower = make_tower("moe")
    ids = torch.randint(5, 250, (1, 9))
    expected = tiny_llm(ids).logits
    model, _ = build_llava(tower, tiny_llm, tiny_tokenizer)
    torch.testing.assert_close(model(ids).logits[..., : expected.shape[-1]], expected)
    pixel_values = torch.randn(1, 3, 32, 32)
    patches = tower(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
    features = model.get_image_features(pixel_values, return_dict=True).pooler_output
    torch.testing.assert_close(features[0], model.model.multi_modal_projector(patches)[0])


def test_new_tokens_start_as_the_mean_of_the_old_and_the_callers_tokenizer_stays(
    make_tower: Tower, tiny_llm: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    old = tiny_llm.get_input_embeddings().weight.detach().clone()
    model, processor = build_llava(make_tower("dense"), tiny_llm, tiny_tokenizer)
    new = model.get_input_embeddings().weight
    assert new.shape[0] % 64 == 0
    assert torch.equal(new[: len(old)], old)
    torch.testing.assert_close(new[model.config.image_token_id], old.mean(dim=0))
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    assert "<image>" not in tiny_tokenizer.get_vocab()


def test_the_projector_depends_on_the_seed_alone(make_llava: Any) -> None:
    weights = []
    for state in (1, 2):
        torch.manual_seed(state)
        weights.append(make_llava("dense").model.multi_modal_projector.linear_1.weight)
    assert torch.equal(*weights)


def test_half_precision_reaches_every_weight(
    make_tower: Tower, tiny_llm: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, batch: Any, tmp_path: Path
) -> None:
    folder = assemble(make_tower("moe"), tiny_llm, tiny_tokenizer, tmp_path / "m", dtype=torch.bfloat16)
    model = LlavaMoEForConditionalGeneration.from_pretrained(folder, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model.train()(**batch(model)).loss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector": "linear"}, "unknown projector 'linear'"),
        ({"image_aspect_ratio": "anyres"}, "choose one of: square, pad"),
        ({"template": "v7"}, "unknown conversation template"),
        ({"tokenizer": None}, "needs its tokenizer"),
    ],
)
def test_parts_that_do_not_fit_are_a_clear_error(
    make_tower: Tower,
    tiny_llm: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    changes: dict[str, Any],
    message: str,
) -> None:
    settings = {"tokenizer": tiny_tokenizer, **changes}
    with pytest.raises(ValueError, match=message):
        build_llava(make_tower("dense"), tiny_llm, **settings)
