"""Averaged weights: an exponential moving average over the steps of a stage, which the finished model has."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vision_moe.distributed import is_main

_FILE = "ema.safetensors"
_COUNT = "num_averaged"


class EMACallback(TrainerCallback):
    """Averages the weights that train, and leaves the average in the model when the training ends.

    The average is the weights themselves after the first step, and decay * average + (1 - decay) * weights after each
    later one (torch.optim.swa_utils). Buffers, such as the routers' choice bias, stay those of the last step. The
    training itself goes on with the weights; checkpoints hold both. Every process must hold all weights, so not with
    DeepSpeed.

    Args:
        decay: in [0, 1); about 1 / (1 - decay) last steps count.
        checkpoint: the checkpoint that training resumes from, if it does.
    """

    def __init__(self, decay: float, checkpoint: str | None = None) -> None:
        self.decay = decay
        self.checkpoint = checkpoint

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Starts the average, or takes it up from the checkpoint.

        Raises:
            ValueError: the checkpoint's average is of other weights.
        """
        assert model is not None
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._names = list(trained)
        self._weights = nn.ParameterList(trained.values())
        self._average = AveragedModel(self._weights, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        if self.checkpoint is not None:
            self._load(Path(self.checkpoint) / _FILE)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Takes in the weights after an optimizer step."""
        self._average.update_parameters(self._weights)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the average into the checkpoint; all ranks hold the same."""
        if is_main():
            averages = {name: average.detach().contiguous() for name, average in self._averages().items()}
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_file({**averages, _COUNT: self._average.n_averaged}, folder / _FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Puts the average into the model."""
        self._copy(self._averages(), dict(zip(self._names, self._weights, strict=True)))

    def _averages(self) -> dict[str, Tensor]:
        return dict(zip(self._names, self._average.module, strict=True))

    def _load(self, file: Path) -> None:
        saved = load_file(file)
        self._average.n_averaged.copy_(saved.pop(_COUNT))
        if set(saved) != set(self._names):
            raise ValueError(f"{file} averages other weights than this stage trains; delete the stage's checkpoints")
        self._copy(saved, self._averages())

    @torch.no_grad()
    def _copy(self, source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
        for name, tensor in target.items():
            tensor.copy_(source[name])
