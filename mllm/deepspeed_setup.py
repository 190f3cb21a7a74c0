"""Readies DeepSpeed before a model is built, on GPUs and on processors without one."""

import json
import os
import socket
from pathlib import Path

import torch
from torch import nn

from vision_moe.moe.layer import MoEMLP
from vision_moe.zero import skip_inference_operator

_FOLDER = Path(__file__).parent
PACKAGED = ("zero2", "zero3", "zero2_offload", "zero3_offload")
"""Names of the JSON files that ship with the package; offload keeps optimizer and, in stage 3, weights in the host."""


def deepspeed_config(name: str) -> str | None:
    """The JSON of a recipe's `deepspeed`: one of `PACKAGED`, or a path; None for "none"."""
    if name == "none":
        return None
    return str(_FOLDER / f"{name}.json") if name in PACKAGED else name


def zero_stage(name: str) -> int:
    """ZeRO's stage in a recipe's `deepspeed`; 0 for "none" and for a JSON that names none."""
    path = deepspeed_config(name)
    if path is None:
        return 0
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def init_deepspeed() -> None:
    """Makes the process group through DeepSpeed, which on CPU ranks must happen before ZeRO-3 builds a model.

    A process that no launcher started becomes a world of one.

    Raises:
        ModuleNotFoundError: DeepSpeed is not installed.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ModuleNotFoundError('DeepSpeed is missing: pip install "vision-moe[mllm]", or deepspeed: none') from error
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))
    if torch.cuda.is_available():
        deepspeed.init_distributed()
        return
    skip_inference_operator()
    deepspeed.init_distributed("gloo")


def keep_blocks_whole(model: nn.Module) -> None:
    """Lets ZeRO-3 fetch the router and the experts of a block of the tower together, and count them as one module.

    It learns the order in which modules run from the first step; what runs within a block depends on the tokens.
    """
    if any(isinstance(module, MoEMLP) for module in model.modules()):
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, [MoEMLP])


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
