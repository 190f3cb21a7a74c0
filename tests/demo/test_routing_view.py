"""First choices, gates and colors, worked by hand."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from demo.panel import opacity, view
from demo.routing_view import Routing, first_choice, palette, route, seen_picture, shares
from vision_moe.moe.router import Router


def test_class_token_is_left_out_and_patches_stay_row_major() -> None:
    logits_SE = torch.full((7, 3), -10.0)
    # The class token shouts for expert 2; patches choose 0 1 2 / 2 1 0.
    for token, expert in enumerate([2, 0, 1, 2, 2, 1, 0]):
        logits_SE[token, expert] = 10.0
    experts_HW, gates_HW = first_choice(logits_SE, (2, 3))
    assert experts_HW.tolist() == [[0, 1, 2], [2, 1, 0]]
    assert np.allclose(gates_HW, 1.0, atol=1e-6)


def test_gate_is_the_probability_over_all_experts() -> None:
    logits_SE = torch.tensor([[0.0, 0.0], [0.0, np.log(3.0)]])
    experts_HW, gates_HW = first_choice(logits_SE, (1, 1))
    assert experts_HW.tolist() == [[1]]
    assert gates_HW[0, 0] == pytest.approx(0.75)


def test_fewer_tokens_than_patches_is_an_error_that_names_both() -> None:
    with pytest.raises(ValueError, match="3 tokens cannot fill a grid of 2 x 2"):
        first_choice(torch.zeros(3, 4), (2, 2))


def test_palette_is_fixed_and_all_its_colors_differ() -> None:
    assert palette(4) == palette(8)[:4] == ["#0072b2", "#e69f00", "#009e73", "#cc79a7"]
    for num_experts in (8, 16, 32):
        assert len(set(palette(num_experts))) == num_experts


def test_shares_count_patches_and_list_experts_without_any() -> None:
    assert shares(np.array([[0, 0], [2, 0]]), 4).tolist() == [0.75, 0.0, 0.25, 0.0]


def test_seen_picture_undoes_the_normalization() -> None:
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    color = torch.tensor([51, 102, 204])
    pixel_values = ((color / 255 - torch.tensor(mean)) / torch.tensor(std))[:, None, None].expand(3, 4, 4)
    picture = seen_picture(pixel_values, mean, std, min_side=10)
    assert picture.size == (12, 12)
    assert (np.asarray(picture) == (51, 102, 204)).all()


def test_route_keeps_layers_in_order() -> None:
    layers = [torch.eye(4)[[0, 1, 1, 1, 1]] * 9, torch.eye(4)[[0, 3, 2, 1, 0]] * 9]
    routing = route(layers, (2, 2))
    assert [experts.tolist() for experts in routing.expert_maps] == [[[1, 1], [1, 1]], [[3, 2], [1, 0]]]
    assert routing.num_experts == 4


def test_first_choice_and_gate_are_the_routers_own() -> None:
    # Sigmoids of 0 and log 3 are 1/2 and 3/4; a bias on the first makes it the choice and leaves its gate.
    logits_SE = torch.tensor([[0.0, 0.0], [0.0, np.log(3.0)]])
    router = Router(8, 2, 1, scoring_func="sigmoid", choice_bias=True)
    experts_HW, gates_HW = first_choice(logits_SE, (1, 1), router)
    assert (experts_HW.item(), gates_HW.item()) == (1, pytest.approx(0.75))
    router.choice_bias.copy_(torch.tensor([1.0, 0.0]))
    experts_HW, gates_HW = first_choice(logits_SE, (1, 1), router)
    assert (experts_HW.item(), gates_HW.item()) == (0, pytest.approx(0.5))


def test_color_is_faintest_at_chance_and_strongest_at_certainty() -> None:
    assert opacity(0.25, 4) == opacity(0.1, 4) == pytest.approx(0.35)
    assert opacity(0.4375, 4) == pytest.approx(0.6)
    assert opacity(1.0, 4) == opacity(1.0, 1) == pytest.approx(0.85)


def test_view_paints_each_patch_and_counts_each_expert() -> None:
    routing = Routing(
        (np.array([[0, 1], [1, 3]]),), (np.array([[1.0, 0.25], [0.25, 1.0]]),), 4, Image.new("RGB", (8, 8))
    )
    page = view(routing, 0, [6])
    patches = re.findall(r'class="patch e(\d)" x="(\d)" y="(\d)" .*? fill-opacity="([\d.]+)"', page)
    assert patches == [
        ("0", "0", "0", "0.850"),
        ("1", "1", "0", "0.350"),
        ("1", "0", "1", "0.350"),
        ("3", "1", "1", "0.850"),
    ]
    assert re.findall(r"(\d+) %, (gate [\d.]+|unused)", page) == [
        ("25", "gate 1.00"),
        ("50", "gate 0.25"),
        ("0", "unused"),
        ("25", "gate 1.00"),
    ]
    assert "Layer 1, block 6 of the tower" in page


def test_words_are_text_and_not_markup() -> None:
    routing = Routing((np.array([[0]]),), (np.array([[1.0]]),), 1, words=("<b>",))
    assert "&lt;b&gt;" in view(routing, 0, [0])
    assert "<b>" not in view(routing, 0, [0])
