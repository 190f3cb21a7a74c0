"""Router losses of a step of an unfrozen tower: the same however the step is cut into micro batches."""

import pytest
import torch

from mllm.assemble import build_llava
from mllm.router_step import router_steps

COEFFICIENTS = {
    "router_aux_loss_coef": 0.5,
    "router_z_loss_coef": 0.1,
    "router_importance_loss_coef": 0.3,
    "router_global_entropy_loss_coef": 0.2,
}


@pytest.fixture
def make_llava(make_tower, tiny_llm, tiny_tokenizer):
    def make(**fields):
        return build_llava(make_tower("moe", **COEFFICIENTS, **fields), tiny_llm, tiny_tokenizer)[0].train()

    return make


def make_batch(model, num_samples, seed, pictures=True):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 250, (num_samples, 24), generator=generator)
    if pictures:
        ids[:, 1:17] = model.config.image_token_id
    labels = ids.clone()
    labels[:, :18] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {**batch, "pixel_values": torch.randn(num_samples, 3, 32, 32, generator=generator)} if pictures else batch


def count(model, batches):
    return router_steps(
        model.model.vision_tower, [batch.get("pixel_values") for batch in batches], model.blank_picture()
    )


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_micro_batches_have_the_gradients_of_the_step(make_llava):
    model = make_llava()
    first, text, second = (make_batch(model, 1, 1), make_batch(model, 2, 2, pictures=False), make_batch(model, 3, 3))
    num_items = sum(int((batch["labels"] != -100).sum()) for batch in (first, text, second))

    whole = {name: torch.cat([batch[name] for batch in (first, text, second)]) for name in text}
    whole["pixel_values"] = torch.cat([first["pixel_values"], second["pixel_values"]])
    expected = model(**whole, num_items_in_batch=num_items)
    expected.loss.backward()
    wanted = gradients(model)

    batches = [first, text, second]
    outputs = [
        model(**batch, num_items_in_batch=num_items, router_step=step)
        for batch, step in zip(batches, count(model, batches), strict=True)
    ]
    for output in outputs:
        output.loss.backward()
    got = gradients(model)
    assert outputs[1].aux_loss is None
    for output in (outputs[0], outputs[2]):
        torch.testing.assert_close(output.aux_loss, expected.aux_loss)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    routers = [name for name in wanted if "router" in name]
    assert routers
    assert all(wanted[name].abs().max() > 1e-4 for name in routers)


def test_each_micro_batch_alone_would_have_other_gradients(make_llava):
    model = make_llava()
    batches = [make_batch(model, 1, 1), make_batch(model, 3, 3)]
    for batch, step in zip(batches, count(model, batches), strict=True):
        model(**batch, num_items_in_batch=24, router_step=step).loss.backward()
    of_step = gradients(model)
    for batch in batches:
        model(**batch, num_items_in_batch=24).loss.backward()
    apart = gradients(model)
    name = next(name for name in apart if "router" in name)
    assert (of_step[name] - apart[name]).abs().max() > 1e-3 * apart[name].abs().max()


def test_noise_is_drawn_as_it_was_counted(make_llava):
    model = make_llava(router_noise_std=1.0)
    batch = make_batch(model, 2, 1)
    torch.manual_seed(0)
    expected = model(**batch).aux_loss
    after = torch.rand(1)
    torch.manual_seed(0)
    (step,) = count(model, [batch])
    torch.testing.assert_close(model(**batch, router_step=step).aux_loss, expected)
    assert torch.equal(torch.rand(1), after)
