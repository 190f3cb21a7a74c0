"""The fields of one stage of a LLaVA recipe: what trains, on what, how fast."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mllm.quantization import Quantization

TrainMode = Literal["frozen", "full", "lora"]


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters: on the language model's linear layers but its head, on the tower's outside its mixtures."""

    r: int = 128
    """Rank."""
    alpha: int = 256
    """Scale; the update is multiplied by alpha / r."""
    dropout: float = 0.05
    """Dropout before the adapter."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Tasks of lmms-eval that the model is asked while it trains."""

    tasks: tuple[str, ...] = ()
    """Their names; none evaluates nothing."""
    include_path: Path | None = None
    """Folder of more task YAML files, such as the checkout's eval/tasks with pope_scenes."""
    every: int = 500
    """Steps between evaluations; there is one before the first step too, and one after the last."""
    limit: int | None = 100
    """The first so many questions of each task; None asks all."""
    batch_size: int = 8
    """Questions answered together."""
    max_new_tokens: int = 16
    """Cap on what the tasks ask for."""

    def __post_init__(self) -> None:
        for name in ("every", "batch_size", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"evaluation.{name} must be at least 1, but got {value}")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of training: what trains, on what, how fast. Used for `pretrain` and for `finetune`."""

    enabled: bool = True
    """Run the stage; without `pretrain` the projector starts from random weights."""
    data: Path | None = None
    """LLaVA JSON; required unless the recipe makes its own Scenes."""
    image_folder: Path | None = None
    """Folder of this stage's pictures; the recipe's image_folder if None."""
    template: Literal["v1", "plain", "llama_2", "chatml", "chat"] | None = None
    """Conversation template of this stage; the recipe's template if None. "plain" drops the question."""
    image_aspect_ratio: Literal["square", "pad"] | None = None
    """How this stage's pictures become square; the recipe's image_aspect_ratio if None."""
    tower: TrainMode = "frozen"
    """Vision tower: frozen, all of its weights, or LoRA; lora not beside llm: full."""
    routers: Literal["frozen", "full"] | None = None
    """Routers of the tower's experts; as the tower if None, and frozen under LoRA."""
    experts: Literal["frozen", "full"] | None = None
    """The tower's experts; as the tower if None, and frozen under LoRA."""
    step_router_losses: bool = True
    """Router losses of an unfrozen CLIP-MoE tower over the pictures of the whole step, on all ranks and in all micro
    batches, for one more forward of the tower without gradients; false takes each micro batch's own."""
    projector: Literal["frozen", "full"] = "full"
    """Projector: frozen, or all of its weights."""
    llm: TrainMode = "frozen"
    """Language model: frozen, all of its weights, or LoRA."""
    tower_lr: float = 2e-6
    """Peak learning rate of the vision tower."""
    router_lr: float | None = None
    """Peak learning rate of the routers; the tower's if None."""
    expert_lr: float | None = None
    """Peak learning rate of the experts; the tower's if None."""
    projector_lr: float = 1e-3
    """Peak learning rate of the projector."""
    llm_lr: float = 2e-5
    """Peak learning rate of the language model or its adapters."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Adapters for llm: lora and tower: lora."""
    quantization: Quantization | None = None
    """Bits that hold the language model's weights under llm: lora: 4bit is QLoRA's NF4, 8bit is LLM.int8(); not under
    ZeRO-3. The finished model is not quantised."""
    epochs: float = 1.0
    """Passes over the data when samples is None."""
    samples: int | None = None
    """Dialogues seen."""
    global_batch_size: int = 128
    """Dialogues per step over all processes; gradient accumulation is derived from it."""
    per_device_batch_size: int = 16
    """Dialogues per forward in one process."""
    warmup: float = 0.03
    """Linear warm-up: steps, or a share of all steps when below 1."""
    schedule: str = "cosine"
    """A transformers scheduler name; cosine decays to 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay; none on biases and norms."""
    max_grad_norm: float = 1.0
    """Gradient clipping by global norm; 0 is off."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    group_by_modality_length: bool = False
    """Batches of one modality and of similar length, as LLaVA-1.5's fine-tuning has them."""
    packing: bool = False
    """Several dialogues in a row instead of padding, each seeing itself only; the losses stay the same."""
    independent_turns: bool = False
    """Every question about a picture sees the picture, but no question and answer before it; not with packing."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """What is asked while the stage trains; not under ZeRO-3."""

    def __post_init__(self) -> None:
        if not self.enabled:
            return
        if set(self.modes.values()) == {"frozen"}:
            raise ValueError(f"a stage must train something, but {', '.join(self.modes)} are all frozen")
        if self.independent_turns and self.packing:
            raise ValueError("independent_turns and packing cannot be combined; switch one of them off")
        if self.tower == "lora" and self.llm == "full":
            raise ValueError(
                "tower: lora beside llm: full would make an adapter that holds the whole language model; "
                "take llm: lora, or tower: full"
            )
        if self.quantization is not None and self.llm != "lora":
            raise ValueError(
                f"quantised weights cannot train: quantization {self.quantization} needs llm: lora, "
                f"but llm is {self.llm}"
            )
        if self.global_batch_size < 1 or self.per_device_batch_size < 1:
            raise ValueError(
                f"batch sizes must be positive, but got global_batch_size={self.global_batch_size} "
                f"and per_device_batch_size={self.per_device_batch_size}"
            )

    @property
    def modes(self) -> dict[str, TrainMode]:
        """How each part of `mllm.parts` trains."""
        mixtures: TrainMode = "frozen" if self.tower == "lora" else self.tower
        return {
            "projector": self.projector,
            "llm": self.llm,
            "tower": self.tower,
            "routers": self.routers or mixtures,
            "experts": self.experts or mixtures,
        }

    @property
    def has_lora(self) -> bool:
        """Whether the stage trains adapters, and so leaves one."""
        return "lora" in self.modes.values()

    @property
    def learning_rates(self) -> dict[str, float]:
        """Peak learning rate of each part, whether it trains or not."""
        return {
            "projector": self.projector_lr,
            "llm": self.llm_lr,
            "tower": self.tower_lr,
            "routers": self.tower_lr if self.router_lr is None else self.router_lr,
            "experts": self.tower_lr if self.expert_lr is None else self.expert_lr,
        }

    def accumulation(self, world_size: int) -> int:
        """Forwards per step and process.

        Raises:
            ValueError: the global batch is no multiple of what all processes take in one forward.
        """
        together = self.per_device_batch_size * world_size
        if self.global_batch_size % together:
            raise ValueError(
                f"global_batch_size must be a multiple of per_device_batch_size x processes = "
                f"{self.per_device_batch_size} x {world_size} = {together}, but got {self.global_batch_size}"
            )
        return self.global_batch_size // together
