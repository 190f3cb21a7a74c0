"""LoRA on the language model inside LLaVA (Hu et al. 2021, arXiv:2106.09685), and its merge into plain weights.

The adapters are injected into the model, which stays the class that it is: the Trainer, DeepSpeed and the projector,
which trains in full beside them, need no special case. A finished stage is merged, so that what it leaves loads without
PEFT.
"""

from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from mllm.recipe import LoraSettings

_DOWN, _UP, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."


def add_lora(language_model: nn.Module, settings: LoraSettings) -> None:
    """Puts trainable adapters beside every linear layer of `language_model`; B starts at 0, so nothing changes yet."""
    targets = [name for name, module in language_model.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, bias="none", target_modules=targets
    )
    inject_adapter_in_model(config, language_model)


def merge_lora(state: dict[str, Tensor], settings: LoraSettings) -> dict[str, Tensor]:
    """The state dict of a model with adapters as one without: W + (alpha / r) B A, added in float32.

    Args:
        state: names as `model.state_dict()` gives them; adapters [r, in] and [out, r], weights [out, in].
        settings: that the adapters were added with.
    """
    merged = {}
    for name, tensor in state.items():
        if name.endswith((_DOWN, _UP)):
            continue
        plain = name.replace(_BASE, ".")
        stem = plain.removesuffix(".weight")
        if _BASE in name and plain.endswith(".weight"):
            update = state[stem + _UP].float() @ state[stem + _DOWN].float()
            tensor = (tensor.float() + settings.alpha / settings.r * update).to(tensor.dtype)
        merged[plain] = tensor
    return merged
