"""The fields of a LLaVA recipe. Defaults are LLaVA-1.5's published settings (Liu et al. 2023, arXiv:2310.03744)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mllm.deepspeed_setup import PACKAGED, zero_stage
from mllm.stage_recipe import StageConfig
from vision_moe.stage_recipe import Tracker


def _pretrain() -> StageConfig:
    return StageConfig(template="plain", image_aspect_ratio="square", global_batch_size=256, per_device_batch_size=32)


def _finetune() -> StageConfig:
    return StageConfig(llm="full", projector_lr=2e-5, group_by_modality_length=True)


@dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """Trains LLaVA-1.5 with a CLIP or CLIP-MoE as its vision tower: stage pretrain, then stage finetune.

    Example:
        bash scripts/llava_finetune.sh mllm/recipes/scenes.yaml --vision CLIP_MOE_DIR --output outputs/llava
    """

    output: Path
    """Folder of the run; an interrupted run goes on when it is started again with the same recipe."""
    vision: str = "scenes-clip"
    """Vision tower: a folder or hub name of a CLIP, CLIP-MoE or another family (docs/families.md), whole or its image
    half; an open_clip folder; or "scenes-clip"."""
    llm: str = "scenes-llama"
    """Language model: a folder or hub name of a Llama-family model, "smollm2", or "scenes-llama"."""
    image_folder: Path | None = None
    """Folder that picture names in the data are relative to."""
    scenes: int = 0
    """Pictures of the built-in Scenes data to make below the output where a stage names no data; 0 makes none."""
    template: Literal["v1", "llama_2", "chatml", "chat"] = "v1"
    """Conversation template that the finished model talks in."""
    select_layer: int = -2
    """Hidden layer of the tower that the language model sees."""
    projector: str = "mlp2x_gelu"
    """Projector: mlp2x_ and an activation, mlp2x_gelu in LLaVA-1.5."""
    image_aspect_ratio: Literal["square", "pad"] = "pad"
    """How pictures become square: cropped in the middle, or padded with the mean colour."""
    max_length: int = 2048
    """Longest sequence in tokens, image tokens included; text beyond it is cut."""
    bad_samples: Literal["error", "skip"] = "error"
    """A picture that is missing or corrupt, or a dialogue of which max_length leaves no answer or cuts a picture:
    "error" stops the run, "skip" leaves the dialogue out and counts it."""
    pretrain: StageConfig = field(default_factory=_pretrain)
    """Stage 1: the projector learns to speak the language model's tongue."""
    finetune: StageConfig = field(default_factory=_finetune)
    """Stage 2: instruction tuning."""
    deepspeed: str = "zero2"
    """"zero2", "zero3", "zero2_offload" and "zero3_offload" (optimizer, and zero3's weights, in the host's memory),
    "none", or a DeepSpeed JSON."""
    attn_implementation: str = "sdpa"
    """Attention kernel, by transformers' name; "eager" is faster on CPU for short sequences (docs/performance.md)."""
    bf16: bool = True
    """bfloat16 arithmetic."""
    num_workers: int = 0
    """Data loading processes; 0 loads in the training process."""
    logging_steps: int = 1
    """Steps between entries of metrics.jsonl."""
    save_steps: int = 500
    """Steps between checkpoints; a killed stage goes on from the last one, or the one before if that is damaged."""
    report_to: tuple[Tracker, ...] = ()
    """Trackers that get every entry of metrics.jsonl as well: tensorboard, wandb, trackio (docs/training.md)."""
    hang_timeout: int = 1800
    """Seconds without the end of a step after which the stacks of all threads are written to hang_rank*.txt in the
    stage's folder and the process exits; saving a checkpoint, and an evaluation, must fit in. 0 waits for ever."""
    seed: int = 0
    """Seed of everything."""

    def __post_init__(self) -> None:
        if not (self.pretrain.enabled or self.finetune.enabled):
            raise ValueError("both stages are disabled; enable pretrain, finetune, or both")
        if self.hang_timeout < 0:
            raise ValueError(f"hang_timeout must be a number of seconds, or 0 for none, but got {self.hang_timeout}")
        if self.deepspeed not in (*PACKAGED, "none") and not Path(self.deepspeed).is_file():
            raise ValueError(
                f"deepspeed must be {', '.join(PACKAGED)}, none or an existing JSON file, but got {self.deepspeed!r}"
            )
        apart = [name for name, stage in enabled_stages(self) if stage.independent_turns]
        if apart and self.attn_implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"independent_turns (stage {' and '.join(apart)}) needs attn_implementation eager or sdpa, but got "
                f"{self.attn_implementation!r}"
            )
        asked = [name for name, stage in enabled_stages(self) if stage.evaluation.tasks]
        if asked and zero_stage(self.deepspeed) == 3:
            raise ValueError(
                f"stage {' and '.join(asked)} evaluates while it trains, which ZeRO-3's split weights do not allow; "
                f"choose deepspeed zero2 or none, or leave evaluation.tasks empty and evaluate the finished model"
            )
        quantised = [name for name, stage in enabled_stages(self) if stage.quantization is not None]
        if quantised and zero_stage(self.deepspeed) == 3:
            raise ValueError(
                f"stage {' and '.join(quantised)} has quantised weights, which ZeRO-3 cannot split over the processes; "
                f"choose deepspeed zero2 or none, or quantization null"
            )


def enabled_stages(config: LlavaConfig) -> list[tuple[str, StageConfig]]:
    """The stages that a recipe runs, in order.

    A function, since the command line would offer a method of the dataclass as a subcommand.
    """
    return [
        (name, stage) for name, stage in (("pretrain", config.pretrain), ("finetune", config.finetune)) if stage.enabled
    ]
