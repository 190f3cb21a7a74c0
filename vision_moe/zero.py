"""DeepSpeed's settings for the stages of an encoder: ZeRO-1, 2 or 3 around the float32 weights of the plain trainer."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

_FOLDER = Path(__file__).parent
NAMES = ("zero1", "zero2", "zero3")


def deepspeed_settings(name: str, *, bf16: bool) -> dict[str, Any]:
    """The configuration that a recipe's `deepspeed` stands for.

    DeepSpeed's own bfloat16 would round all weights, the frozen ones too; autocast leaves them float32, as without it.

    Args:
        name: "zero1", "zero2", "zero3", or the path of a JSON file.
        bf16: autocast to bfloat16, unless the file sets `torch_autocast` itself.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: DeepSpeed is not installed.
        ValueError: no launcher has started this process.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ModuleNotFoundError('DeepSpeed is missing: pip install "vision-moe[mllm]", or deepspeed: null') from error
    if "RANK" not in os.environ:
        raise ValueError(
            "DeepSpeed needs a launcher, also for one process: python -m torch.distributed.run --nproc-per-node 1 -m "
            "vision_moe.train ..., or set deepspeed to null"
        )
    if not torch.cuda.is_available():
        # It would first compile an operator for over a minute that only its inference uses. Its table of usable
        # operators is the place where one is switched off.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    file = _FOLDER / "zero.json" if name in NAMES else Path(name)
    if not file.is_file():
        raise FileNotFoundError(f"deepspeed must be one of {', '.join(NAMES)} or a JSON file, but got {name!r}")
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if name in NAMES:
        settings["zero_optimization"]["stage"] = int(name[-1])
    return {"torch_autocast": {"enabled": bf16, "dtype": "bfloat16"}, **settings}


def scalars_as_vectors(model: nn.Module) -> list[str]:
    """Gives the model's own parameters without dimensions, such as `logit_scale`, one of length 1; returns their names.

    DeepSpeed 0.19 cannot send them from rank to rank otherwise.
    """
    names = [name for name, parameter in model.named_parameters(recurse=False) if parameter.dim() == 0]
    for name in names:
        scalar = model.get_parameter(name)
        setattr(model, name, nn.Parameter(scalar.detach().reshape(1), requires_grad=scalar.requires_grad))
    return names
