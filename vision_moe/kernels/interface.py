"""`experts_implementation="vision_moe"` for any transformers model whose experts have the interface's layout.

Importing this module registers it.
"""

from torch import Tensor, nn
from transformers.activations import ACT2CLS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from vision_moe.kernels import ExpertWeights, routed_mlp

NAME = "vision_moe"


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward pass of an experts module; the parameters' names are transformers' interface.

    Args:
        self: the experts.
        hidden_states: float[T, D].
        top_k_index: int64[T, K], experts of each token; a slot of expert E, one past the last, is not computed.
        top_k_weights: float[T, K], their weights.

    Returns:
        float[T, D] in the dtype of `hidden_states`.

    Raises:
        ValueError: where these experts compute something else.
    """
    activation = _activation(self)
    up = "gate_up_proj" if self.has_gate else "up_proj"
    names = (up, f"{up}_bias" if self.has_bias else None, "down_proj", "down_proj_bias" if self.has_bias else None)
    weights = ExpertWeights(*(None if name is None else getattr(self, name) for name in names))
    return routed_mlp(hidden_states, top_k_index, top_k_weights, weights, activation)


def _activation(experts: nn.Module) -> str:
    """Name of the activation in ACT2FN, after a look at what else these experts do."""
    name = getattr(experts.config, "hidden_act", None)
    # A class, or a class and its arguments.
    expected = ACT2CLS.get(name)
    expected = expected[0] if isinstance(expected, tuple) else expected
    obstacles = {
        "their weights are transposed": experts.is_transposed,
        "gate and up rows are interleaved": experts.has_gate and not experts.is_concatenated,
        "they gate in a way of their own": experts.has_gate and type(experts)._apply_gate is not _default_apply_gate,
        "a norm follows them": experts.has_post_expert_norm,
        f"their activation is not the config's hidden_act={name!r}": type(experts.act_fn) is not expected,
        "their activation has parameters": isinstance(experts.act_fn, nn.Module)
        and next(experts.act_fn.parameters(), None) is not None,
    }
    found = [obstacle for obstacle, applies in obstacles.items() if applies]
    if found:
        raise ValueError(
            f"experts_implementation={NAME!r} cannot compute {type(experts).__name__}: {'; '.join(found)}. "
            "Use 'eager' or 'grouped_mm'."
        )
    return str(name)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
