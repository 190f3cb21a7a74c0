"""Chat: the prompt of training, batches, streaming, routing, errors."""

import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

import vision_moe.kernels.interface
from mllm.assemble import assemble
from mllm.collate import LlavaCollator
from mllm.data import LlavaDataset
from mllm.feature_cache import FeatureCache
from mllm.generate import load

ASK = [{"role": "user", "content": "Is there a dog?"}]
Messages = list[dict[str, str]]


@pytest.mark.parametrize("template", ["v1", "plain", "chat"])
def test_a_model_that_learnt_one_answer_gives_it_and_stops(
    make_chat: Any, write_llava: Any, picture: Image.Image, template: str
) -> None:
    chat = make_chat("dense", template)
    sample = {
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nIs there a dog?"},
            {"from": "gpt", "value": "Yes, red."},
        ],
    }
    path, images = write_llava([sample])
    processor = chat.processor
    data = LlavaDataset(path, images, processor.tokenizer, processor.image_processor, template, 16)
    batch = LlavaCollator(processor.tokenizer.pad_token_id)([data[0]])
    optimizer = torch.optim.AdamW(chat.model.parameters(), lr=1e-2)
    chat.model.train()
    for _ in range(12):
        loss = chat.model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    chat.model.eval()
    assert chat.generate(ASK, [picture], max_new_tokens=30) == "Yes, red."
    assert list(chat.stream(ASK, [picture], max_new_tokens=30))[-1] == "Yes, red."


def test_answers_do_not_depend_on_the_batch(make_chat: Any, picture: Image.Image) -> None:
    chat = make_chat()
    other = picture.rotate(90, expand=True)
    questions: list[tuple[Messages, list[Image.Image]]] = [
        (ASK, [picture]),
        ([{"role": "user", "content": "Describe the picture, please, in many words."}], [other]),
        ([{"role": "user", "content": "Hi"}], []),
    ]
    alone = [chat.generate(messages, images, max_new_tokens=12) for messages, images in questions]
    assert chat.generate_batch(questions, max_new_tokens=12) == alone
    assert len(set(alone)) > 1
    assert chat.generate_batch([]) == []


def test_generation_is_the_greedy_choice_of_the_model(make_chat: Any, picture: Image.Image) -> None:
    chat = make_chat()
    inputs = chat._inputs([(ASK, [picture])])
    ids = inputs["input_ids"]
    for _ in range(6):
        logits = chat.model(input_ids=ids, mm_encoder_outputs=inputs["mm_encoder_outputs"]).logits[:, -1]
        logits[:, chat.model.config.image_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    expected = chat._decode(ids[0, inputs["input_ids"].shape[1] :].tolist())
    assert chat.generate(ASK, [picture], max_new_tokens=6) == expected


def test_the_picture_changes_what_the_model_reads(make_chat: Any, picture: Image.Image) -> None:
    chat = make_chat()
    logits = [
        chat.model(**chat._inputs([(ASK, [image])])).logits[0, -1] for image in (picture, Image.new("RGB", (40, 40)))
    ]
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_placeholders_in_later_turns_take_the_pictures_in_order(make_chat: Any, picture: Image.Image) -> None:
    chat = make_chat()
    messages = [
        {"role": "user", "content": "<image>\nA"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C <image>"},
    ]
    inputs = chat._inputs([(messages, [picture, picture.rotate(180)])])
    assert inputs["input_ids"].tolist()[0].count(chat.model.config.image_token_id) == 32
    assert len(inputs["mm_encoder_outputs"]["image"].pooler_output) == 2
    assert isinstance(chat.generate(messages, [picture, picture], max_new_tokens=2), str)


def test_stream_grows_to_the_answer_of_generate(make_chat: Any, picture: Image.Image) -> None:
    chat = make_chat()
    texts = list(chat.stream(ASK, [picture], max_new_tokens=20))
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert texts[-1] == chat.generate(ASK, [picture], max_new_tokens=20)


def test_a_stop_event_ends_the_stream_and_closing_ends_the_thread(make_chat: Any, picture: Image.Image) -> None:
    chat = make_chat()
    stop = threading.Event()
    stop.set()
    steps = []
    chat.model.model.language_model.register_forward_pre_hook(lambda *_: steps.append(1))
    list(chat.stream(ASK, [picture], max_new_tokens=200, stop=stop))
    assert len(steps) == 1

    before = threading.active_count()
    stream = chat.stream(ASK, [picture], max_new_tokens=200)
    next(stream)
    stream.close()
    assert threading.active_count() == before
    assert len(steps) < 200


def test_an_error_in_generation_reaches_the_reader_of_the_stream(
    make_chat: Any, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = make_chat()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(chat.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(chat.stream(ASK, [picture]))


def test_sampling_follows_the_seed_and_its_settings(make_chat: Any, picture: Image.Image) -> None:
    chat = make_chat()
    answers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        answers.append(chat.generate(ASK, [picture], max_new_tokens=12, temperature=5.0))
    assert answers[0] == answers[1] != answers[2]
    assert chat.generate(ASK, [picture], max_new_tokens=12, temperature=5.0, top_p=1e-6) == chat.generate(
        ASK, [picture], max_new_tokens=12
    )


def test_features_of_a_picture_stand_for_the_picture(make_chat: Any, picture: Image.Image) -> None:
    chat = make_chat()
    other = picture.rotate(180)
    messages = [{"role": "user", "content": "<image> or <image>?"}]
    expected = chat.generate(messages, [picture, other], max_new_tokens=8)
    assert chat.generate(messages, [other, picture], max_new_tokens=8) != expected
    passes: list[int] = []
    chat.model.model.vision_tower.register_forward_pre_hook(lambda *_: passes.append(1))
    features = chat.image_features([picture, other])
    assert [tuple(one.shape) for one in features] == [(16, 32)] * 2
    for images in ([features[0], other], features):
        assert chat.generate(messages, images, max_new_tokens=8) == expected
    # The other picture is one that was asked about already.
    assert len(passes) == 1


def test_the_tower_sees_each_picture_of_a_conversation_once(make_chat: Any, picture: Image.Image) -> None:
    chat = make_chat()
    seen = []
    chat.model.model.vision_tower.register_forward_hook(lambda module, inputs, output: seen.append(len(output[0])))
    first = chat.generate(ASK, [picture], max_new_tokens=4)
    later = [*ASK, {"role": "assistant", "content": first}, {"role": "user", "content": "Is it red?"}]
    answer = chat.generate(later, [picture.copy()], max_new_tokens=4)
    assert list(chat.stream(later, [picture], max_new_tokens=4))[-1:] == ([answer] if answer else [])
    assert seen == [1]
    others = [picture.rotate(angle) for angle in (90, 180)]
    chat.generate_batch([(ASK, [p]) for p in (picture, *others, others[0])], max_new_tokens=1)
    assert seen == [1, 2]


def test_only_the_last_pictures_are_kept() -> None:
    asked: list[int] = []
    pictures = [Image.new("RGB", (2, 2), (number, 0, 0)) for number in range(3)]

    def compute(unknown: Any) -> list[torch.Tensor]:
        asked.extend(picture.getpixel((0, 0))[0] for picture in unknown)
        return [torch.tensor(picture.getpixel((0, 0))[0]) for picture in unknown]

    cache = FeatureCache(compute, size=2)
    assert [int(value) for value in cache([pictures[0], pictures[1], pictures[0]])] == [0, 1, 0]
    # Asking for 1 again makes it the newest, so that 2 throws out 0.
    for number in (1, 2, 1, 0):
        assert [int(value) for value in cache([pictures[number]])] == [number]
    assert asked == [0, 1, 2, 0]


def test_every_beam_reads_several_pictures_in_their_order(make_chat: Any, picture: Image.Image) -> None:
    chat = make_chat()
    read = []
    chat.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    question = ([{"role": "user", "content": "<image> or <image>?"}], [picture, picture.rotate(180)])
    chat.generate(*question, max_new_tokens=1)
    chat.generate(*question, max_new_tokens=1, num_beams=3)
    assert read[1].shape[0] == 3
    assert all(torch.equal(beam, read[0][0]) for beam in read[1])


def test_beam_search_runs(make_chat: Any, picture: Image.Image) -> None:
    assert isinstance(make_chat().generate(ASK, [picture], max_new_tokens=3, num_beams=2), str)


def test_router_logits_are_those_of_the_tower(make_chat: Any, picture: Image.Image) -> None:
    chat = make_chat("moe")
    logits, grid = chat.router_logits(picture)
    assert grid == (4, 4)
    assert [tuple(layer.shape) for layer in logits] == [(17, 4)] * 2
    pixel_values = chat.processor.image_processor(images=picture, return_tensors="pt")["pixel_values"]
    outputs = chat.model.model.vision_tower(pixel_values, output_router_logits=True)
    assert all(torch.equal(a, b[0]) for a, b in zip(logits, outputs.router_logits, strict=True))


def test_the_tower_computes_its_experts_by_the_kernels(make_chat: Any, picture: Image.Image, monkeypatch: Any) -> None:
    chat = make_chat("moe")
    calls = []
    routed_mlp = vision_moe.kernels.interface.routed_mlp
    monkeypatch.setattr(
        vision_moe.kernels.interface, "routed_mlp", lambda *args, **kw: calls.append(1) or routed_mlp(*args, **kw)
    )
    chat.image_features([picture])
    assert len(calls) == len(chat.model.config.vision_config.moe_block_indices)


def test_a_dense_tower_has_no_router_logits(make_chat: Any, picture: Image.Image) -> None:
    assert make_chat("dense").router_logits(picture) == ([], (4, 4))


def test_the_loaded_processor_is_the_one_of_training(make_chat: Any) -> None:
    processor = make_chat().processor
    assert type(processor.image_processor).__name__ == "LlavaImageProcessorPil"
    assert processor.image_processor.do_pad
    assert processor.num_additional_image_tokens == 1
    assert processor.tokenizer.chat_template is not None


@pytest.mark.parametrize(
    ("messages", "count", "settings", "message"),
    [
        ([{"role": "user", "content": "<image> and <image>"}], 1, {}, r"1 picture\(s\) for 2 <image>"),
        ([{"role": "user", "content": "<image>"}], 0, {}, r"0 picture\(s\) for 1 <image>"),
        ([*ASK, {"role": "assistant", "content": "Yes"}], 0, {}, "must end with a human turn"),
        ([{"role": "system", "content": "x"}], 0, {}, "role 'system'"),
        (ASK, 0, {"max_new_tokens": 0}, "max_new_tokens=0"),
        (ASK, 0, {"top_p": 0.0}, r"top_p=0\.0"),
        (ASK, 0, {"temperature": -1.0}, r"temperature=-1\.0"),
        ([{"role": "user", "content": "word " * 600}], 0, {}, "reads at most 512"),
    ],
)
def test_what_cannot_be_asked_is_a_clear_error(
    make_chat: Any, picture: Image.Image, messages: Messages, count: int, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_chat().generate(messages, [picture] * count, **settings)


def test_an_unknown_quantization_is_an_error(make_chat: Any) -> None:
    with pytest.raises(ValueError, match="choose one of: 4bit, 8bit"):
        make_chat(quantization="2bit")


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "layer"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_quantisation_reaches_the_language_model_alone(
    make_tower: Any, tiny_tokenizer: Any, picture: Image.Image, tmp_path: Path, quantization: Any, layer: str
) -> None:
    pytest.importorskip("bitsandbytes")
    # bitsandbytes packs blocks of 64 weights, so this model is a little wider.
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    folder = assemble(make_tower("moe"), LlamaForCausalLM(config), tiny_tokenizer, tmp_path / "model")
    chat = load(folder, dtype="bfloat16", device="cpu", quantization=quantization)
    parts = chat.model.model
    assert type(parts.language_model.layers[0].self_attn.q_proj).__name__ == layer
    spared = (
        parts.vision_tower.encoder.layers[0].self_attn.q_proj,
        parts.multi_modal_projector.linear_1,
        chat.model.lm_head,
    )
    assert all(module.weight.is_floating_point() for module in spared)
    assert isinstance(chat.generate(ASK, [picture], max_new_tokens=3), str)
