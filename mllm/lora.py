"""LoRA on the language model inside LLaVA (Hu et al. 2021, arXiv:2106.09685), on whole or on quantised weights.

The adapters are injected into the model, which stays the class that it is: the Trainer, DeepSpeed and the projector,
which trains in full beside them, need no special case.
"""

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from mllm.stage_recipe import LoraSettings


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> None:
    """Puts adapters beside every linear layer of a LLaVA's language model and freezes everything else.

    B starts at 0, so nothing changes yet.
    """
    llm = model.model.language_model
    # Whole names, which the tower's layers cannot share.
    targets = [f"model.language_model.{name}" for name, layer in llm.named_modules() if isinstance(layer, nn.Linear)]
    model.add_adapter(
        LoraConfig(
            r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, bias="none", target_modules=targets
        )
    )
