"""Which parameters a backward pass reaches, seen without keeping a gradient: each is dropped as it comes."""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_NAMES_SHOWN = 5


class GradientProbe:
    """Context in which gradients of trained parameters are measured and dropped.

    Args:
        parts: parameters with their names, by part of the model.
    """

    def __init__(self, parts: Mapping[str, Sequence[tuple[str, nn.Parameter]]]) -> None:
        self.parts = {
            part: [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
            for part, parameters in parts.items()
        }
        self._norms: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "GradientProbe":
        for parameters in self.parts.values():
            for name, parameter in parameters:
                hook = parameter.register_post_accumulate_grad_hook(partial(self._measure, name))
                self._handles.append(hook)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def problems(self, has_pictures: bool) -> list[str]:
        """What is wrong with the gradients of the parts that train.

        Args:
            has_pictures: the batch had some; without, gradients of tower and projector are zero.
        """
        return [text for part in self.parts for text in self._part_problems(part, has_pictures)]

    def _measure(self, name: str, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        self._norms[name] = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        parameter.grad = None

    def _part_problems(self, part: str, has_pictures: bool) -> list[str]:
        names = [name for name, _ in self.parts[part]]
        if not names:
            return []
        unreached = [name for name in names if name not in self._norms]
        norms = {name: self._norms[name].item() for name in names if name in self._norms}
        # A tower's last norm and pooling serve its class token, which LLaVA does not read.
        if unreached and (part != "tower" or not norms):
            return [f"no gradient reaches {part}: {shown(unreached)}"]
        if unreached:
            logger.info("preflight: LLaVA does not use %s of the tower", shown(unreached))
        if broken := [name for name, norm in norms.items() if not math.isfinite(norm)]:
            return [f"gradients of {part} are not finite: {shown(broken)}"]
        if (has_pictures or part == "llm") and not any(norms.values()):
            return [f"all gradients of {part} are zero"]
        return []


def frozen_gradients(model: nn.Module) -> list[str]:
    """Names, as a problem, of frozen parameters that hold a gradient."""
    held = [
        name
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and parameter.grad is not None
    ]
    return [f"frozen parameters have gradients: {shown(held)}"] if held else []


def shown(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
