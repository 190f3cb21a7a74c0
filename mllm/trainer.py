"""transformers' Trainer for one LLaVA stage: a learning rate for each part, exact global batches, own checkpoints."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from mllm.loss_watch import LossWatch
from mllm.parts import named_parts
from mllm.router_step import router_steps
from mllm.sampler import DialogueBatchSampler
from mllm.training_batch import BatchTally
from vision_moe.distributed import is_main, world_size
from vision_moe.sampled_trainer import SampledTrainer

logger = logging.getLogger(__name__)

_TRAINED = "trained.safetensors"


class LlavaTrainer(SampledTrainer):
    """Trainer whose batches come from a batch sampler that already gives each rank its own indices.

    Args:
        batch_sampler: yields this rank's indices for each forward.
        learning_rates: peak learning rate by part (`mllm.parts.PARTS`).
        step_router_losses: an unfrozen CLIP-MoE tower's router losses are those of the whole step (`mllm.router_step`).
    """

    optimizer: Optimizer | None

    def __init__(
        self,
        *args: Any,
        batch_sampler: DialogueBatchSampler,
        learning_rates: Mapping[str, float],
        step_router_losses: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, batch_sampler=batch_sampler, **kwargs)
        self.learning_rates = learning_rates
        self.step_router_losses = step_router_losses
        self._aux_losses: list[Tensor] = []
        self._tally = BatchTally(self.args.device)
        self._loss_watch = LossWatch(batch_sampler, self.train_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """AdamW over the parameters that train, in groups of one part each, with and without weight decay."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_cls, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_cls(self._parameter_groups(model), **options)
        return self.optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """The micro batches of a step, with what their router losses need of each other."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        if self.step_router_losses and model.has_router_losses and (len(batches) > 1 or world_size() > 1):
            model.train()
            with self.accelerator.autocast():
                steps = router_steps(
                    model.model.vision_tower, [batch.get("pixel_values") for batch in batches], model.blank_picture()
                )
            batches = [{**batch, "router_step": step} for batch, step in zip(batches, steps, strict=True)]
        return batches, num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss; what an unfrozen MoE tower adds to it, and what the batch holds, is logged apart."""
        self._tally.add(inputs.pop("counts"))
        if isinstance(num_items_in_batch, Tensor):
            # A step whose samples were all skipped has a loss of 0, not of 0 / 0.
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._loss_watch.check(loss, self.state.global_step)
        aux_loss = getattr(outputs, "aux_loss", None)
        if aux_loss is not None:
            self._aux_losses.append(aux_loss.detach().float().cpu())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean aux loss since the last log, and what `BatchTally.entry` tells."""
        if "loss" in logs:
            logs.update(self._tally.entry())
        if "loss" in logs and self._aux_losses:
            logs["aux_loss"] = float(sum(self._aux_losses) / len(self._aux_losses))
            self._aux_losses = []
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes a checkpoint's weights: what trains, under its own name; DeepSpeed's engine writes its own instead.

        The Trainer's way would write the folder layout of `save_pretrained`, whose names differ from the model's, and
        load it back with strict=False: the resumed run would silently start from the old weights.
        """
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.is_deepspeed_enabled or not is_main():
            return
        model = self.accelerator.unwrap_model(self.model)
        trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, folder / _TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        trained = load_file(Path(resume_from_checkpoint) / _TRAINED)
        model = self.model if model is None else model
        wanted = {name for name, p in model.named_parameters() if p.requires_grad}
        if trained.keys() != wanted:
            raise ValueError(f"{resume_from_checkpoint} holds other parameters than this stage trains; delete it")
        model.load_state_dict(trained, strict=False)

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        decayed = set(self.get_decay_parameter_names(model))
        groups = []
        for part, parameters in named_parts(model).items():
            for decay in (True, False):
                chosen = [p for name, p in parameters if p.requires_grad and (name in decayed) is decay]
                if chosen:
                    weight_decay = self.args.weight_decay if decay else 0.0
                    groups.append({"params": chosen, "lr": self.learning_rates[part], "weight_decay": weight_decay})
        return groups
