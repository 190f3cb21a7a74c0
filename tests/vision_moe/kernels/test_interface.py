"""`experts_implementation="vision_moe"` on transformers' own mixtures, and a clear error where it does not fit."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import use_experts_implementation

from vision_moe.kernels import interface

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def test_a_gated_mixture_of_transformers_runs_on_our_kernels():
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES))
    ids = torch.randint(0, 50, (2, 7))
    results = []
    for name in ("eager", interface.NAME):
        model.set_experts_implementation(name)
        model.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        experts = model.model.layers[0].mlp.experts
        results.append((out.logits, experts.gate_up_proj.grad.clone(), experts.down_proj.grad.clone()))
    for mine, truth in zip(*results, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-6)


def make_experts(act=torch.nn.ReLU, hidden_act="relu", **layout):
    @use_experts_implementation(**{"has_gate": False, **layout})
    class OddExperts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.act_fn = act()
            self.up_proj = torch.nn.Parameter(torch.ones(2, 3, 4))
            self.down_proj = torch.nn.Parameter(torch.ones(2, 4, 3))

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise NotImplementedError

    config = MixtralConfig(hidden_act=hidden_act)
    config._experts_implementation_internal = interface.NAME
    return OddExperts(config)


def run(experts):
    return experts(torch.ones(1, 4), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))


def test_experts_without_gate_and_bias_run():
    """Three hidden units of 4, each."""
    assert run(make_experts()).tolist() == [[12.0] * 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_transposed": True}, "OddExperts: their weights are transposed. Use 'eager'"),
        ({"is_concatenated": False, "has_gate": True}, "gate and up rows are interleaved"),
        ({"has_post_expert_norm": True}, "a norm follows them"),
        ({"act": torch.nn.Tanh}, "their activation is not the config's hidden_act='relu'"),
        ({"act": torch.nn.PReLU, "hidden_act": "prelu"}, "their activation has parameters"),
    ],
    ids=str,
)
def test_experts_that_compute_something_else_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        run(make_experts(**changes))


def test_a_gate_of_their_own_is_refused():
    experts = make_experts(has_gate=True)
    type(experts)._apply_gate = lambda self, gate_up: gate_up
    with pytest.raises(ValueError, match="they gate in a way of their own"):
        run(experts)
