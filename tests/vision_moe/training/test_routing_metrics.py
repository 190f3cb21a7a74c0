"""Routing in metrics.jsonl: hand-worked numbers, and their names in a run."""

from types import SimpleNamespace

import pytest
import torch

from vision_moe.routing_metrics import RoutingMetrics


def outputs(vision, text=None):
    def tower(values):
        if values is None:
            return SimpleNamespace(last_hidden_state=None)
        tokens, dropped = values
        return SimpleNamespace(tokens_per_expert=torch.tensor(tokens), dropped_fraction=torch.tensor(dropped))

    return SimpleNamespace(vision_model_output=tower(vision), text_model_output=tower(text))


CONFIG = SimpleNamespace(
    vision_config=SimpleNamespace(moe_block_indices=(1, 3)), text_config=SimpleNamespace(moe_block_indices=(0,))
)


def test_counts_are_summed_and_drops_averaged_until_they_are_logged():
    metrics = RoutingMetrics()
    metrics.add(outputs(([[4, 0], [1, 3]], [0.5, 0.0]), ([[2, 2]], [0.0])))
    metrics.add(outputs(([[2, 2], [1, 3]], [0.0, 0.25]), ([[0, 4]], [0.5])))
    # Vision, block 1: 6 and 2 tokens, mean 4, so 6 / 4 - 1; block 3: 2 and 6. Text: 2 and 6.
    assert metrics.pop(CONFIG) == pytest.approx(
        {
            "moe/vision/layer1/max_violation": 0.5,
            "moe/vision/layer1/dropped_fraction": 0.25,
            "moe/vision/layer3/max_violation": 0.5,
            "moe/vision/layer3/dropped_fraction": 0.125,
            "moe/text/layer0/max_violation": 0.5,
            "moe/text/layer0/dropped_fraction": 0.25,
        }
    )
    assert metrics.pop(CONFIG) == {}


@pytest.mark.parametrize(("tokens", "expected"), [([5, 5, 5, 5], 0.0), ([20, 0, 0, 0], 3.0), ([10, 10, 0, 0], 1.0)])
def test_violation_is_0_when_balanced_and_e_over_k_less_1_when_collapsed(tokens, expected):
    metrics = RoutingMetrics()
    metrics.add(outputs(None, ([tokens], [0.0])))
    assert metrics.pop(CONFIG)["moe/text/layer0/max_violation"] == pytest.approx(expected)


def test_a_dense_model_has_none():
    metrics = RoutingMetrics()
    metrics.add(outputs(None))
    assert metrics.pop(CONFIG) == {}
