"""One real batch forward and backward before a stage's first step, so that what would go wrong goes wrong at once.

It leaves the training as it finds it: gradients are dropped as they come, random generators are put back, and the
sampler begins anew at every pass. The weights that ZeRO-3 holds in pieces are put together for it, where the device has
the room; where it has not, the batch, the folder and what requires gradients are checked, and nothing is computed.
"""

import logging
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mllm.conversation import IGNORE_INDEX
from mllm.gradient_probe import GradientProbe, frozen_gradients, shown
from mllm.memory import MemoryEstimate, estimate_memory
from mllm.parts import named_parts
from mllm.stage_recipe import StageConfig
from mllm.trainer import LlavaTrainer
from vision_moe.distributed import is_main, sum_over_ranks, world_size

logger = logging.getLogger(__name__)

# Forwards of the plan that are searched for one with answers and pictures.
_FORWARDS = 8

Batch = dict[str, Any]
Result = TypeVar("Result")


class PreflightError(ValueError):
    """What a preflight found; its message lists everything."""


def preflight(trainer: LlavaTrainer, stage: StageConfig, folder: Path) -> None:
    """Checks a stage that is ready to train; all ranks must call it.

    Args:
        trainer: of the stage, before `train`.
        stage: says which parts should train.
        folder: of the stage's checkpoints.

    Raises:
        PreflightError: the stage would train on nothing, on non-finite numbers or other parts than the recipe says, or
            could not write its checkpoints; raised on every rank.
    """
    plugin = trainer.accelerator.state.deepspeed_plugin
    zero_stage = None if plugin is None else int(plugin.zero_stage)
    device = trainer.args.device
    with generators_put_back():
        estimate = estimate_memory(trainer.model, zero_stage, world_size())
        batch = _on_all_ranks(device, lambda: _check(trainer, stage, folder, estimate))
        if zero_stage == 3 and not _all_have_room(device, estimate.weights * world_size()):
            logger.info("preflight: forward and backward are left out: ZeRO-3's weights do not fit in one piece")
            return
        with _whole_weights(trainer.model, zero_stage):
            _on_all_ranks(device, lambda: _raise_if(_run(trainer, batch)))
    logger.info("preflight: forward and backward are as they must be")


def _on_all_ranks(device: torch.device, check: Callable[[], Result]) -> Result:
    """What `check` returns, if it raises on no rank: one that left alone would leave the others waiting for it."""
    error: Exception | None = None
    try:
        result = check()
    except Exception as caught:
        error = caught
    num_failed = int(sum_over_ranks(torch.tensor(error is not None, dtype=torch.int64, device=device)))
    if error is not None:
        raise error
    if num_failed:
        raise PreflightError(f"the preflight failed on {num_failed} other rank(s); see their messages")
    return result


def _check(trainer: LlavaTrainer, stage: StageConfig, folder: Path, estimate: MemoryEstimate) -> Batch:
    """All that needs no forward; a first batch of this rank."""
    logger.info("memory of each process without activations, and of a checkpoint: %s", estimate)
    batch = _first_batch(trainer)
    num_supervised = int(_supervised(batch))
    problems = [*_wrong_parts(trainer.model, stage), *_wrong_image_tokens(trainer.model, batch)]
    if is_main():
        problems += _folder_problems(folder, estimate.checkpoint)
    if not num_supervised:
        problems.append(
            f"nothing is supervised in the first {_FORWARDS} forwards; look at the data with "
            f"`python -m mllm.data.check RECIPE`"
        )
    _raise_if(problems)
    logger.info("preflight: %d supervised tokens in a first batch", num_supervised)
    return batch


def _raise_if(problems: list[str]) -> None:
    if problems:
        raise PreflightError("preflight: " + "; ".join(problems))


def _all_have_room(device: torch.device, size: int) -> bool:
    """Whether every rank's device has twice `size` bytes left, half of it for activations; memory of a host counts."""
    has_room = device.type != "cuda" or 2 * size <= torch.cuda.mem_get_info(device)[0]
    return int(sum_over_ranks(torch.tensor(has_room, dtype=torch.int64, device=device))) == world_size()


def _whole_weights(model: nn.Module, zero_stage: int | None) -> AbstractContextManager[Any]:
    """A block in which no weight is in pieces; all ranks must enter and leave it."""
    if zero_stage != 3:
        return nullcontext()
    import deepspeed

    # With a rank that hands them back they are freed at the end.
    return deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)


def _first_batch(trainer: LlavaTrainer) -> Batch:
    """The first forward of this rank with answers and pictures, or else with answers, or else the very first."""
    best: Batch = {}
    assert trainer.batch_sampler is not None, "LlavaTrainer always has one"
    for indices in islice(iter(trainer.batch_sampler), _FORWARDS):
        batch = trainer.data_collator([trainer.train_dataset[index] for index in indices])
        batch.pop("counts")
        if not best or (_supervised(batch) and not _supervised(best)):
            best = batch
        if _supervised(batch) and "pixel_values" in batch:
            return batch
    return best


def _supervised(batch: Batch) -> Tensor:
    return (batch["labels"][:, 1:] != IGNORE_INDEX).sum()


def _wrong_parts(model: nn.Module, stage: StageConfig) -> list[str]:
    """Parts that train otherwise than the recipe says."""
    problems = []
    for part, parameters in named_parts(model).items():
        mode, trains = stage.modes[part], [parameter.requires_grad for _, parameter in parameters]
        as_said = {"full": all(trains), "frozen": not any(trains)}.get(mode, any(trains))
        if not as_said:
            problems.append(f"{part} should be {mode!r}, but {sum(trains)} of its {len(trains)} parameters train")
    return problems


def _wrong_image_tokens(model: nn.Module, batch: Batch) -> list[str]:
    pictures = batch.get("pixel_values", ())
    found = int((batch["input_ids"] == model.config.image_token_id).sum())
    wanted = len(pictures) * model.config.image_seq_length
    if found == wanted:
        return []
    return [
        f"{found} image tokens for {len(pictures)} pictures, but {wanted} are wanted (the config's image_seq_length is "
        f"{model.config.image_seq_length})"
    ]


def _folder_problems(folder: Path, checkpoint_bytes: int) -> list[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"preflight")
    except OSError as error:
        return [f"checkpoints cannot be written to {folder} ({error})"]
    free = shutil.disk_usage(folder).free
    if free < checkpoint_bytes:
        return [f"{folder} has {free / 1e9:.1f} GB left, but a checkpoint takes about {checkpoint_bytes / 1e9:.1f} GB"]
    return []


def _run(trainer: LlavaTrainer, batch: Batch) -> list[str]:
    """Forward and backward as a training step has them, and what is wrong with them."""
    model = trainer.model
    if model.device != trainer.args.device:
        # Where DeepSpeed will put it as well.
        model.to(trainer.args.device)
    if trainer.args.activation_checkpointing:
        model.activation_checkpointing_enable()
    was_training = model.training
    model.train()
    try:
        with GradientProbe(named_parts(model)) as probe, trainer.accelerator.autocast():
            inputs = trainer._prepare_inputs(batch)
            if problems := _wrong_features(model, inputs):
                return problems
            loss = model(**inputs).loss
            if not torch.isfinite(loss):
                return [f"the loss is {loss.item()}{_non_finite_weights(model)}"]
            loss.backward()
        return probe.problems(has_pictures="pixel_values" in batch) + frozen_gradients(model)
    finally:
        model.train(was_training)


@torch.no_grad()
def _wrong_features(model: nn.Module, inputs: Batch) -> list[str]:
    if "pixel_values" not in inputs:
        return []
    images = model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    num_features = sum(features.shape[-2] for features in images.pooler_output)
    num_tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    if num_features == num_tokens:
        return []
    return [f"the tower gives {num_features} features for {num_tokens} image tokens"]


def _non_finite_weights(model: nn.Module) -> str:
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not torch.isfinite(parameter).all()
    ]
    if not names:
        return " although all weights are finite; try another dtype, or look at the pictures' values"
    return f", and not all weights are finite: {shown(names)}"


@contextmanager
def generators_put_back() -> Iterator[None]:
    """What is drawn in the block does not change what is drawn after it."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
