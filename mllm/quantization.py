"""The language model's weights in 4 or 8 bits (bitsandbytes): NF4 of QLoRA (Dettmers et al. 2023, arXiv:2305.14314),
LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339). Tower, projector, embeddings and head keep their type.
"""

from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from vision_moe.extras import require

Quantization = Literal["4bit", "8bit"]
# Full names: "vision_tower" alone would match nothing, and the tower would be quantised unnoticed.
_SPARED = ("model.vision_tower", "model.multi_modal_projector", "lm_head")


def quantization_config(quantization: str, compute_dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """What `from_pretrained` takes to quantise the linear layers of a LLaVA's language model, and nothing else.

    Args:
        quantization: "4bit" (NF4, its constants quantised as well) or "8bit".
        compute_dtype: of the products with 4-bit weights.

    Raises:
        ValueError: neither of the two.
        ModuleNotFoundError: bitsandbytes is not installed.
    """
    require("quant", "bitsandbytes")
    if quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            llm_int8_skip_modules=list(_SPARED),
        )
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(_SPARED))
    raise ValueError(f"unknown quantization {quantization!r}; choose one of: 4bit, 8bit")


def accept_own_state(model: nn.Module) -> None:
    """Lets a quantised model take back its own `state_dict()` strictly, as DeepSpeed does when a run goes on.

    bitsandbytes writes the constants of 4-bit weights into the state and then knows them no more; they come with the
    same weights, which do not train. Those of 8-bit weights it takes back only before a first forward, which moves them
    out of the weight.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    def put_constants_back(loading: nn.Module, *_: Any) -> None:
        for layer in loading.modules():
            if isinstance(layer, Linear8bitLt) and layer.weight.SCB is None:
                layer.weight.SCB = layer.state.SCB

    def forget_constants(loaded: nn.Module, incompatible: tuple[list[str], list[str]]) -> None:
        # Now, since adapters that came later have moved the layers.
        prefixes = tuple(f"{name}.weight." for name, layer in loaded.named_modules() if isinstance(layer, Linear4bit))
        _missing, unexpected = incompatible
        unexpected[:] = [key for key in unexpected if not key.startswith(prefixes)]

    model.register_load_state_dict_pre_hook(put_constants_back)
    model.register_load_state_dict_post_hook(forget_constants)
