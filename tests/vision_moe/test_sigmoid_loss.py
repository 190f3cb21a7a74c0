"""The pairwise sigmoid loss by hand, against transformers' SigLIP, and under groups."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from vision_moe.contrastive import sigmoid_loss


@pytest.fixture
def embeds():
    generator = torch.Generator().manual_seed(0)
    return tuple(normalize(torch.randn(6, 5, generator=generator), dim=-1).requires_grad_() for _ in range(2))


def test_two_pairs_by_hand():
    # Images e1, e2; texts e1, -e2; scale 2, bias -1. Logits: [[1, -1], [-1, -3]].
    # Pairs cost log(1 + e^-1) and log(1 + e^3), the others log(1 + e^-1) each; the sum over 2 images.
    loss = sigmoid_loss(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, -1.0]]), torch.tensor(2.0), torch.tensor(-1.0))
    expected = (3 * math.log1p(math.exp(-1)) + math.log1p(math.exp(3))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert loss.shape == ()


def test_it_is_the_loss_of_transformers_siglip(make_family, family_batch):
    model = make_family("siglip")
    with torch.no_grad():
        output = model(**family_batch("siglip"), return_loss=True)
        loss = sigmoid_loss(output.image_embeds, output.text_embeds, model.logit_scale.exp(), model.logit_bias)
    torch.testing.assert_close(loss, output.loss)


def test_groups_are_separate_losses_weighted_by_size(embeds):
    image_BD, text_BD = embeds
    groups_B = torch.tensor([4, 9, 4, 4, 9, 4])
    scale, bias = torch.tensor(20.0), torch.tensor(-5.0)
    whole = sigmoid_loss(image_BD, text_BD, scale, bias, groups_B=groups_B)
    parts = [
        sigmoid_loss(image_BD[own], text_BD[own], scale, bias) * own.sum() / 6 for own in (groups_B == 4, groups_B == 9)
    ]
    torch.testing.assert_close(whole, parts[0] + parts[1])
    torch.testing.assert_close(torch.autograd.grad(whole, embeds), torch.autograd.grad(parts[0] + parts[1], embeds))


@pytest.mark.parametrize("groups", [None, [4, 9, 4, 4, 9, 7]], ids=["plain", "groups"])
def test_tiles_give_the_same_loss_and_gradients(embeds, groups):
    inputs = [*embeds, torch.tensor(20.0, requires_grad=True), torch.tensor(-5.0, requires_grad=True)]
    groups_B = None if groups is None else torch.tensor(groups)
    results = []
    for tile in (None, 1, 4, 100):
        loss = sigmoid_loss(*inputs, groups_B=groups_B, tile=tile)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    for tiled in results[1:]:
        torch.testing.assert_close(tiled, results[0], rtol=1e-5, atol=1e-6)


def test_logits_are_float32_under_autocast(embeds):
    scale, bias = torch.tensor(100.0), torch.tensor(-10.0)
    expected = sigmoid_loss(*embeds, scale, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sigmoid_loss(*embeds, scale, bias), expected)


def test_misfits_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(3, 3\)"):
        sigmoid_loss(torch.ones(4, 3), torch.ones(3, 3), torch.tensor(1.0), torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"groups_B must have shape \[4\]"):
        sigmoid_loss(torch.ones(4, 3), torch.ones(4, 3), torch.tensor(1.0), torch.tensor(0.0), groups_B=torch.zeros(3))
