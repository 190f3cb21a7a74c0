"""Several samples to a row: which share one, and that the model computes for each what it computes for it alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from mllm.assemble import build_llava
from mllm.collate import LlavaCollator, PackedCollator
from mllm.data import LlavaDataset
from mllm.packing import pack_rows

QUESTION, ANSWER = "Is there a red dog?", "Yes, there is."


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def test_rows_leave_little_padding() -> None:
    # Longest first to the shortest of two rows: 7 | 5, then 4 to the 5, 3 to the 7, 1 to the 9: two rows of 10.
    # One row of 20 is too long, three (7 | 5 1 | 4 3) take 21 places, four and five take 28 and 35.
    assert pack_rows([3, 7, 1, 5, 4], 12) == [[0, 1], [2, 3, 4]]
    # No two fit together.
    assert pack_rows([6, 6, 6], 9) == [[0], [1], [2]]
    # Without padding either way, short rows are cheaper.
    assert pack_rows([4, 4], 8) == [[0], [1]]
    assert pack_rows([3, 7, 1], None) == [[0, 1, 2]]


@pytest.mark.parametrize("row_length", [10, 17, 100])
def test_every_sample_lies_in_one_row_that_holds_it(row_length: int) -> None:
    lengths = [(7 * number) % 10 + 1 for number in range(23)]
    rows = pack_rows(lengths, row_length)
    assert sorted(number for row in rows for number in row) == list(range(23))
    assert all(sum(lengths[number] for number in row) <= row_length for row in rows)


@pytest.mark.parametrize(("lengths", "message"), [([], "no samples"), ([3, 11], "11 tokens does not fit .*=10")])
def test_what_fits_no_row_is_an_error(lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_rows(lengths, 10)


def test_a_packed_batch_by_hand() -> None:
    red, blue = torch.full((1, 3, 2, 2), 1.0), torch.full((2, 3, 2, 2), 2.0)
    samples = [
        {"input_ids": [1, 2, 3], "labels": [1, -100, 3], "pixel_values": blue},
        {"input_ids": [4, 5, 6, 7], "labels": [-100, 5, 6, 7]},
        {"input_ids": [8, 9], "labels": [8, 9], "pixel_values": red},
    ]
    batch = PackedCollator(pad_token_id=0, row_length=5)(samples)
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7, 0], [1, 2, 3, 8, 9]]
    # The first token of a sample is not predicted, neither from nothing nor from the sample before.
    assert batch["labels"].tolist() == [[-100, 5, 6, 7, -100], [-100, -100, 3, -100, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    assert torch.equal(batch["pixel_values"], torch.cat([blue, red]))
    assert "attention_mask" not in batch


def test_one_row_has_the_borders_that_the_variable_length_kernel_cuts_at() -> None:
    """transformers hands flash attention the beginnings of sequences, which it finds in the positions of one row."""
    samples = [{"input_ids": [1] * length, "labels": [1] * length} for length in (3, 1, 5)]
    batch = PackedCollator(pad_token_id=0, row_length=None)(samples)
    (borders, _), (longest, _) = prepare_fa_kwargs_from_position_ids(batch["position_ids"])
    assert batch["position_ids"].shape == (1, 9)
    assert borders.tolist() == [0, 3, 4, 9]
    assert longest == 5


@pytest.fixture
def samples_and_model(
    write_llava: Callable[..., tuple[Path, Path]],
    make_tower: Callable[..., PreTrainedModel],
    tiny_llm: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> tuple[list[dict[str, Any]], PreTrainedModel]:
    """Six samples of text, of one picture and of two, each picture another; and a LLaVA."""
    records = [
        {"image": "a.png", "conversations": turns(f"<image>\n{QUESTION}", ANSWER)},
        {"conversations": turns(QUESTION, ANSWER, QUESTION, "No.")},
        {"images": ["a.png", "a.png"], "conversations": turns(f"<image><image>{QUESTION}", "No.")},
        {"conversations": turns("Red?", ANSWER)},
        {"image": "a.png", "conversations": turns(f"<image>\n{QUESTION}", ANSWER, QUESTION, ANSWER * 3)},
        {"image": "a.png", "conversations": turns("<image>\n?", "No.")},
    ]
    path, images = write_llava(records)
    model, processor = build_llava(make_tower("moe", router_aux_loss_coef=0.0), tiny_llm, tiny_tokenizer)
    data = LlavaDataset(
        path, images, processor.tokenizer, processor.image_processor, "chat", model.config.image_seq_length
    )
    samples = [data[number] for number in range(len(data))]
    generator = torch.Generator().manual_seed(0)
    for sample in samples:
        if "pixel_values" in sample:
            sample["pixel_values"] = torch.randn(sample["pixel_values"].shape, generator=generator)
    return samples, model


def losses(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Loss of every token, 0 where nothing is supervised."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model.lm_head(model.model(**inputs, use_cache=False).last_hidden_state)
    return cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")


def by_sample(losses_BS: Tensor, lengths: list[int], row_length: int | None) -> dict[int, float]:
    sums = {}
    for row, numbers in enumerate(pack_rows(lengths, row_length)):
        start = 0
        for number in numbers:
            # Loss s is that of token s + 1; the first token of a sample has none.
            sums[number] = losses_BS[row, start : start + lengths[number] - 1].sum().item()
            start += lengths[number]
    return sums


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("row_length", [90, 150, None])
def test_packed_samples_have_the_losses_and_gradients_of_padded_ones(
    samples_and_model: tuple[list[dict[str, Any]], PreTrainedModel], attention: str, row_length: int | None
) -> None:
    samples, model = samples_and_model
    model.set_attn_implementation(attention)
    lengths = [len(sample["input_ids"]) for sample in samples]
    alone = {number: losses(model, LlavaCollator(0)([sample])).sum().item() for number, sample in enumerate(samples)}
    packed = PackedCollator(0, row_length)(samples)
    assert len(packed["input_ids"]) < len(samples)
    together = by_sample(losses(model, packed), lengths, row_length)
    assert together == pytest.approx(alone, rel=1e-5)
    assert len({round(loss, 4) for loss in alone.values()}) == len(samples)

    model.train()
    gradients = []
    for batch in (LlavaCollator(0)(samples), packed):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        gradients.append(
            (loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    (padded_loss, expected), (packed_loss, actual) = gradients
    torch.testing.assert_close(packed_loss, padded_loss)
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_row_of_two_samples_is_not_one_sample(
    samples_and_model: tuple[list[dict[str, Any]], PreTrainedModel],
) -> None:
    """What keeps them apart is the positions: without them, the second sample's loss is another."""
    samples, model = samples_and_model
    batch = PackedCollator(0, None)(samples[:2])
    apart = losses(model, batch)
    del batch["position_ids"]
    first = len(samples[0]["input_ids"])
    joined = losses(model, batch)
    assert torch.allclose(joined[0, : first - 1], apart[0, : first - 1], atol=1e-5)
    assert not torch.allclose(joined[0, first:], apart[0, first:], atol=1e-3)
