"""Questions that do not see each other: each is computed as if asked alone, in one pass over the picture."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import mllm.data.dataset
from mllm.assemble import build_llava
from mllm.collate import BranchedCollator, LlavaCollator
from mllm.conversation import encode
from mllm.data import LlavaDataset
from mllm.recipe import LlavaConfig
from mllm.stage_recipe import StageConfig

QUESTIONS = (("Is there a red dog?", "No."), ("Is it?", "Yes, there is."), ("What is it?", "A red dog."))


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def total_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> float:
    """Summed over supervised tokens."""
    return (model(**batch).loss * (batch["labels"] != -100).sum()).item()


@pytest.fixture
def dialogue_and_parts(
    write_llava: Callable[..., tuple[Path, Path]],
    make_tower: Callable[..., PreTrainedModel],
    tiny_llm: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> tuple[Callable[..., LlavaDataset], PreTrainedModel]:
    """Data of a dialogue with a picture, its questions alone, and text; and a LLaVA."""
    (first, answer), *others = QUESTIONS
    dialogue = turns(f"{first}\n<image>", answer, *(text for pair in others for text in pair))
    alone = [turns(f"<image>\n{question}", answer) for question, answer in QUESTIONS]
    records = [
        *({"image": "a.png", "conversations": conversations} for conversations in (dialogue, *alone)),
        {"conversations": turns("Red?", "No.", "Is it?", "Yes.")},
    ]
    path, images = write_llava(records)
    model, processor = build_llava(make_tower("moe", router_aux_loss_coef=0.0), tiny_llm, tiny_tokenizer)

    def data(**options: object) -> LlavaDataset:
        parts = (processor.tokenizer, processor.image_processor, "v1", model.config.image_seq_length)
        return LlavaDataset(path, images, *parts, **options)

    return data, model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_question_has_the_loss_and_gradients_of_being_asked_alone(
    dialogue_and_parts: tuple[Callable[..., LlavaDataset], PreTrainedModel], attention: str
) -> None:
    data, model = dialogue_and_parts
    model.set_attn_implementation(attention)
    samples = [data(independent_turns=True)[number] for number in range(5)]
    collate = BranchedCollator(0, additive_mask=attention == "eager")
    # Beside the text, which is shorter and stays a dialogue.
    together = collate([samples[0], samples[4]])
    model.eval()
    expected = sum(total_loss(model, LlavaCollator(0)([data()[number]])) for number in range(1, 5))
    assert total_loss(model, together) == pytest.approx(expected, rel=1e-5)
    assert abs(total_loss(model, LlavaCollator(0)([data()[0], data()[4]])) - expected) > 1e-3

    model.train()
    gradients = []
    for batch in (collate([samples[0]]), LlavaCollator(0)([data()[number] for number in (1, 2, 3)])):
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_picture_comes_once_and_branches_count_on_from_it(
    dialogue_and_parts: tuple[Callable[..., LlavaDataset], PreTrainedModel],
) -> None:
    data, model = dialogue_and_parts
    sample = data(independent_turns=True)[0]
    image = model.config.image_token_index
    assert sample["input_ids"].count(image) == model.config.image_seq_length
    assert sorted(set(sample["segments"])) == [0, 1, 2, 3]
    trunk = sample["segments"].count(0)
    starts = [sample["segments"].index(number) for number in (1, 2, 3)]
    assert [sample["position_ids"][start] for start in starts] == [trunk] * 3
    assert set(sample["labels"][:trunk]) == {-100}
    cut = data(independent_turns=True, max_length=starts[1] + 1)[0]
    assert {len(cut[name]) for name in ("input_ids", "labels", "position_ids", "segments")} == {starts[1] + 1}


def test_every_question_is_tokenised_once(
    dialogue_and_parts: tuple[Callable[..., LlavaDataset], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = dialogue_and_parts
    calls = []
    monkeypatch.setattr(mllm.data.dataset, "encode", lambda *args, **kw: calls.append(args) or encode(*args, **kw))
    assert len(data(independent_turns=True)[0]["labels"]) > 0
    assert len(calls) == len(QUESTIONS)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("<image>\nRed?", "Yes.", "Blue?"), "ends with a human turn"),
        (("Red?", "Yes."), "<image> in 0 questions"),
        (("<image>\nRed?", "Yes.", "<image>\nBlue?", "No."), "<image> in 2 questions"),
        (("<image>\nRed?", "<image> Yes."), "an answer contains <image>"),
        (("<image>\nRed?", "", "Blue?", ""), "every answer is empty"),
    ],
)
def test_a_dialogue_that_has_no_place_for_its_picture_is_an_error(
    dialogue_and_parts: tuple[Callable[..., LlavaDataset], PreTrainedModel],
    write_llava: Callable[..., tuple[Path, Path]],
    texts: tuple[str, ...],
    message: str,
) -> None:
    data, _ = dialogue_and_parts
    write_llava([{"id": "x", "image": "a.png", "conversations": turns(*texts)}])
    with pytest.raises(ValueError, match=f"sample 'x'.*{message}"):
        data(independent_turns=True)[0]


def test_a_question_without_an_answer_is_left_out(
    dialogue_and_parts: tuple[Callable[..., LlavaDataset], PreTrainedModel],
    write_llava: Callable[..., tuple[Path, Path]],
) -> None:
    data, _ = dialogue_and_parts
    dialogue = turns("<image>\nIs there a red dog?", "No.", "What is it?", "", "Is it?", "Yes.")
    write_llava([{"image": "a.png", "conversations": part} for part in (dialogue, [*dialogue[:2], *dialogue[4:]])])
    samples = data(independent_turns=True)
    assert samples[0]["input_ids"] == samples[1]["input_ids"]


@pytest.mark.parametrize(
    ("attention", "packing", "message"),
    [("flash_attention_2", False, "eager or sdpa, but got 'flash_attention_2'"), ("sdpa", True, "cannot be combined")],
)
def test_what_cannot_keep_questions_apart_is_refused(attention: str, packing: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlavaConfig(
            vision="scenes-clip",
            llm="scenes-llama",
            output=Path("out"),
            attn_implementation=attention,
            finetune=StageConfig(independent_turns=True, packing=packing),
        )
