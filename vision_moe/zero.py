"""DeepSpeed's settings for the stages of an encoder: ZeRO-1, 2 or 3 around the float32 weights of the plain trainer."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vision_moe.stage_recipe import StageConfig

if TYPE_CHECKING:
    from transformers import Trainer

_FOLDER = Path(__file__).parent
NAMES = ("zero1", "zero2", "zero3")


def check_recipe(config: Any) -> None:
    """Refuses what DeepSpeed cannot do.

    Args:
        config: a `vision_moe.recipe.TrainConfig`.

    Raises:
        ValueError: a stage that runs has averaged weights, a gradient cache or Muon.
    """
    stages = {name: stage for name, stage in vars(config).items() if isinstance(stage, StageConfig)}
    found = [
        f"{name}.{field}"
        for name, stage in stages.items()
        for field in ("ema_decay", "grad_cache_batch_size")
        if getattr(stage, field) is not None
    ]
    if found:
        raise ValueError(
            f"{', '.join(found)} cannot run under DeepSpeed, which spreads the weights over the processes and "
            "steps after every backward pass; set them to null, or deepspeed to null"
        )
    parts = {"dmu": ("mcl", "router")}
    has_start = config.model is None and set(config.methods) != {"limoe"}
    run = {"align", "dense"} if has_start else set()
    run |= {part for method in config.methods for part in parts.get(method, (method,))}
    muon = [f"{name}.optimizer" for name, stage in stages.items() if name in run and stage.optimizer == "muon"]
    if muon:
        raise ValueError(
            f"Muon needs whole matrices, which DeepSpeed spreads over the processes: set {', '.join(muon)} to adamw, "
            "or deepspeed to null"
        )


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
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError('DeepSpeed is missing: pip install "vision-moe[mllm]", or deepspeed: null') from error
    if "RANK" not in os.environ:
        raise ValueError(
            "DeepSpeed needs a launcher, also for one process: python -m torch.distributed.run --nproc-per-node 1 -m "
            "vision_moe.train ..., or set deepspeed to null"
        )
    if not torch.cuda.is_available():
        skip_inference_operator()
    file = _FOLDER / "zero.json" if name in NAMES else Path(name)
    if not file.is_file():
        raise FileNotFoundError(f"deepspeed must be one of {', '.join(NAMES)} or a JSON file, but got {name!r}")
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if name in NAMES:
        settings["zero_optimization"]["stage"] = int(name[-1])
    return {"torch_autocast": {"enabled": bf16, "dtype": "bfloat16"}, **settings}


def skip_inference_operator() -> None:
    """Keeps DeepSpeed on CPU ranks from compiling, for over a minute, an operator that only its inference uses."""
    import deepspeed

    # Its table of usable operators is the place where one is switched off.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def scalars_as_vectors(model: nn.Module) -> list[str]:
    """Gives the model's own parameters without dimensions, such as `logit_scale`, one of length 1; returns their names.

    DeepSpeed 0.19 cannot send them from rank to rank otherwise.
    """
    names = [name for name, parameter in model.named_parameters(recurse=False) if parameter.dim() == 0]
    for name in names:
        scalar = model.get_parameter(name)
        setattr(model, name, nn.Parameter(scalar.detach().reshape(1), requires_grad=scalar.requires_grad))
    return names


def gathered_state(trainer: "Trainer", scalars: list[str]) -> dict[str, Tensor] | None:
    """All weights of a model that DeepSpeed trains, on rank 0; every rank must call it, as ZeRO-3 gathers them.

    Args:
        trainer: after its training.
        scalars: names that `scalars_as_vectors` gave.
    """
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return state and {name: x.reshape(()) if name in scalars else x for name, x in state.items()}
