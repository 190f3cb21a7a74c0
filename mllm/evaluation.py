"""Tasks of lmms-eval asked of a model while it trains; what they give is logged with the run as `eval/TASK/METRIC`.

The training goes on as if nothing had been asked: random generators, modes of the modules and what lmms-eval changes in
the process are put back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from PIL import ImageFile
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mllm.generate import Chat
from mllm.preflight import generators_put_back
from mllm.stage_recipe import EvaluationSettings
from mllm.trainer import LlavaTrainer
from vision_moe.distributed import barrier, gather


class TaskEvaluation(TrainerCallback):
    """Asks before the first step, every so many steps, and after the last; all ranks share the questions.

    Args:
        trainer: whose model is asked, and which logs the numbers.
        settings: which tasks, and when.
        make_chat: model -> what asks it.

    Raises:
        ModuleNotFoundError: lmms-eval is not installed.
        ValueError: a name is no task.
    """

    def __init__(
        self, trainer: LlavaTrainer, settings: EvaluationSettings, make_chat: Callable[[nn.Module], Chat]
    ) -> None:
        self._trainer, self._settings, self._make_chat = trainer, settings, make_chat
        self._adapter, self._tasks = _lmms_eval()
        paths = [] if settings.include_path is None else [settings.include_path]
        self._manager = self._tasks.task_manager(settings.tasks, paths)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._evaluate()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._settings.every == 0 or state.global_step == state.max_steps:
            wants_loss = control.should_log
            self._evaluate()
            # The Trainer takes any log for the one of this step's loss.
            control.should_log = wants_loss

    def _evaluate(self) -> None:
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        settings = self._settings
        found: dict[str, float] = {}
        with generators_put_back(), _modes_put_back(model):
            lm = self._adapter.VisionMoeLlava(
                self._make_chat(model), batch_size=settings.batch_size, max_new_tokens=settings.max_new_tokens
            )
            # lmms-eval would make an Accelerator of its own beside the Trainer's.
            lm.accelerator = _Ranks()
            for name in settings.tasks:
                returned = self._tasks.run_task(lm, name, self._manager, limit=settings.limit)
                # Rank 0 alone has results; a group has several tasks.
                for task in returned["samples"] if returned is not None else ():
                    metrics, _ = self._tasks.numbers(task, returned)
                    found |= {f"eval/{task}/{metric}": value for metric, value in metrics.items()}
        self._trainer.log(found)


class _Ranks:
    """What lmms-eval asks of an Accelerator."""

    def gather(self, count: Tensor) -> Tensor:
        return gather(count.reshape(1))

    def wait_for_everyone(self) -> None:
        barrier()


def _lmms_eval() -> tuple[ModuleType, ModuleType]:
    """Our modules that need lmms-eval.

    Importing it lets Pillow fill up truncated pictures, for the whole process and so for the training data.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        from mllm import lmms_adapter, lmms_tasks
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'evaluation.tasks needs lmms-eval: pip install "vision-moe[eval]", or leave it empty'
        ) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
    return lmms_adapter, lmms_tasks


@contextmanager
def _modes_put_back(model: nn.Module) -> Iterator[None]:
    """A chat switches dropout off everywhere; frozen parts may have been without it before."""
    training = [module for module in model.modules() if module.training]
    try:
        yield
    finally:
        for module in training:
            module.training = True
