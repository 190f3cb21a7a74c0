"""transformers' arguments for one LLaVA stage of a recipe."""

import sys
from pathlib import Path

import torch
from transformers import TrainingArguments

from mllm.deepspeed_setup import deepspeed_config
from mllm.recipe import LlavaConfig
from mllm.stage_recipe import StageConfig
from vision_moe.distributed import world_size
from vision_moe.trackers import run_name


def training_arguments(config: LlavaConfig, stage: StageConfig, folder: Path, num_steps: int) -> TrainingArguments:
    """The Trainer's arguments for `num_steps` steps of a stage whose checkpoints lie in `folder`."""
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=num_steps,
        per_device_train_batch_size=stage.per_device_batch_size,
        gradient_accumulation_steps=stage.accumulation(world_size()),
        # The largest; every part's own goes into its parameter groups.
        learning_rate=max(stage.learning_rates.values()),
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        lr_scheduler_type=stage.schedule,
        warmup_steps=stage.warmup,
        activation_checkpointing=stage.gradient_checkpointing,
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        logging_steps=config.logging_steps,
        save_steps=config.save_steps,
        # Two, so that the last complete one is there while the next is being written.
        save_total_limit=2,
        dataloader_num_workers=config.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        # Trackers come as callbacks.
        report_to=[],
        run_name=run_name(folder),
        disable_tqdm=not sys.stderr.isatty(),
        # A tower's last norm serves its class token, which LLaVA does not read.
        ddp_find_unused_parameters=any(stage.modes[part] != "frozen" for part in ("tower", "routers", "experts")),
        deepspeed=deepspeed_config(config.deepspeed),
    )
