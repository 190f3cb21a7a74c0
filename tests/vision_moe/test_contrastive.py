"""InfoNCE by hand, and against its own definition under groups and label smoothing."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from vision_moe.contrastive import contrastive_loss
from vision_moe.testing import assert_close


@pytest.fixture
def embeds():
    generator = torch.Generator().manual_seed(0)
    return tuple(normalize(torch.randn(6, 5, generator=generator), dim=-1).requires_grad_() for _ in range(2))


def test_two_pairs_by_hand():
    # Images e1, e2; texts e1, (e1 + e2)/sqrt(2); scale 2. Logits: [[2, r], [0, r]] with r = sqrt(2).
    # Image to text: log(1 + e^(r-2)), log(1 + e^(-r)); text to image: log(1 + e^(-2)), log 2.
    r = math.sqrt(2.0)
    image_BD = torch.eye(2)
    text_BD = torch.tensor([[1.0, 0.0], [1 / r, 1 / r]])
    to_text = (math.log1p(math.exp(r - 2)) + math.log1p(math.exp(-r))) / 2
    to_image = (math.log1p(math.exp(-2)) + math.log(2)) / 2
    loss = contrastive_loss(image_BD, text_BD, torch.tensor(2.0))
    assert loss.item() == pytest.approx((to_text + to_image) / 2, rel=1e-6)
    assert loss.shape == ()


def test_alone_in_its_group_a_pair_costs_nothing(embeds):
    image_BD, text_BD = embeds
    loss = contrastive_loss(image_BD, text_BD, torch.tensor(20.0), groups_B=torch.arange(6), label_smoothing=0.1)
    loss.backward()
    assert loss.item() == 0.0
    assert not image_BD.grad.any()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_one_group_is_plain_cross_entropy(embeds, label_smoothing):
    image_BD, text_BD = embeds
    logits_BB = 20.0 * image_BD @ text_BD.T
    expected = sum(
        cross_entropy(logits, torch.arange(6), label_smoothing=label_smoothing) for logits in (logits_BB, logits_BB.T)
    )
    for groups_B in (None, torch.full((6,), 7)):
        loss = contrastive_loss(
            image_BD, text_BD, torch.tensor(20.0), groups_B=groups_B, label_smoothing=label_smoothing
        )
        torch.testing.assert_close(loss, expected / 2)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_groups_are_separate_losses_weighted_by_size(embeds, label_smoothing):
    image_BD, text_BD = embeds
    groups_B = torch.tensor([4, 9, 4, 4, 9, 4])
    scale = torch.tensor(20.0)
    whole = contrastive_loss(image_BD, text_BD, scale, groups_B=groups_B, label_smoothing=label_smoothing)
    parts = [
        contrastive_loss(image_BD[own], text_BD[own], scale, label_smoothing=label_smoothing) * own.sum() / 6
        for own in (groups_B == 4, groups_B == 9)
    ]
    torch.testing.assert_close(whole, parts[0] + parts[1])
    grads = torch.autograd.grad(whole, embeds)
    expected = torch.autograd.grad(parts[0] + parts[1], embeds)
    torch.testing.assert_close(grads, expected)


def test_gradient_is_that_of_finite_differences():
    generator = torch.Generator().manual_seed(1)
    image_BD, text_BD = (normalize(torch.randn(3, 2, generator=generator), dim=-1) for _ in range(2))
    log_scale = torch.tensor(1.0, requires_grad=True)
    groups_B = torch.tensor([0, 0, 1])

    def loss_at(value):
        return contrastive_loss(image_BD, text_BD, value.exp(), groups_B=groups_B, label_smoothing=0.1)

    loss_at(log_scale).backward()
    step = 1e-2
    slope = (loss_at(log_scale.detach() + step) - loss_at(log_scale.detach() - step)) / (2 * step)
    assert log_scale.grad.item() == pytest.approx(slope.item(), rel=1e-2)


@pytest.mark.parametrize("tile", [1, 4, 6, 100])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("groups", [None, [4, 9, 4, 4, 9, 7]], ids=["plain", "groups"])
def test_tiles_give_the_same_loss_and_gradients(embeds, groups, label_smoothing, tile):
    scale = torch.tensor(100.0, requires_grad=True)
    groups_B = None if groups is None else torch.tensor(groups)
    results = []
    for rows in (None, tile):
        loss = contrastive_loss(*embeds, scale, groups_B=groups_B, label_smoothing=label_smoothing, tile=rows)
        results.append([loss.detach(), *torch.autograd.grad(loss * 3, [*embeds, scale])])
    for name, plain, tiled in zip(("loss", "images", "texts", "scale"), *results, strict=True):
        assert_close(name, tiled, plain, 1e-5)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_tiles_give_each_gradient_alone(embeds, trained):
    results = []
    for tile in (None, 4):
        inputs = [tensor.detach().clone() for tensor in (*embeds, torch.tensor(20.0))]
        inputs[trained].requires_grad_()
        contrastive_loss(*inputs, tile=tile).backward()
        results.append(inputs[trained].grad)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_tiles_keep_no_matrix_of_logits_for_the_backward_pass():
    image_BD, text_BD = (normalize(torch.randn(256, 4), dim=-1).requires_grad_() for _ in range(2))
    kept = {}
    for tile in (None, 32):
        sizes = kept.setdefault(tile, [])
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            contrastive_loss(image_BD, text_BD, torch.tensor(20.0), tile=tile)
    assert max(kept[None]) == 256 * 256
    assert max(kept[32]) == 256 * 4


def test_logits_are_float32_under_autocast(embeds):
    image_BD, text_BD = embeds
    expected = contrastive_loss(image_BD, text_BD, torch.tensor(100.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(image_BD, text_BD, torch.tensor(100.0)), expected)
    low = contrastive_loss(image_BD.bfloat16(), text_BD.bfloat16(), torch.tensor(100.0, dtype=torch.bfloat16))
    assert low.dtype == torch.float32


@pytest.mark.parametrize(
    ("shapes", "kwargs", "message"),
    [
        (((4, 3), (3, 3)), {}, r"\(4, 3\) and \(3, 3\)"),
        (((0, 3), (0, 3)), {}, "B > 0"),
        (((4, 3), (4, 3)), {"groups_B": torch.zeros(3)}, r"groups_B must have shape \[4\]"),
        (((4, 3), (4, 3)), {"label_smoothing": 1.0}, "label_smoothing"),
        (((4, 3), (4, 3)), {"tile": 0}, "tile must be positive"),
    ],
)
def test_misfits_are_refused(shapes, kwargs, message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(torch.ones(shapes[0]), torch.ones(shapes[1]), torch.tensor(1.0), **kwargs)
