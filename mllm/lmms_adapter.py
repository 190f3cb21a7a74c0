"""Our LLaVA as a model of lmms-eval, found by the entry point group `lmms_eval.models` (see pyproject.toml).

`lmms-eval --model vision_moe_llava --model_args pretrained=DIR --tasks A,B`, or `python -m eval.run`, which
fails when a result is missing.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from mllm.blind import Pictures, blank, other_picture
from mllm.generate import Chat, load
from mllm.quantization import Quantization

logger = logging.getLogger(__name__)

# Of a task's generation_kwargs: what Chat.generate_batch takes, and what is seen to here.
_SUPPORTED = frozenset({"max_new_tokens", "temperature", "top_p", "num_beams"})
_HANDLED = frozenset({"until", "do_sample"})
_LOG_EVERY_S = 60


def manifest() -> ModelManifest:
    """What lmms-eval learns from the entry point."""
    return ModelManifest(model_id="vision_moe_llava", simple_class_path="mllm.lmms_adapter.VisionMoeLlava")


class VisionMoeLlava(lmms):
    """Answers lmms-eval's generation requests with `mllm.generate.Chat`.

    A "simple" model in lmms-eval's terms: each request brings a text and the pictures of one document, which
    become one user turn with the pictures in front, in the template that the checkpoint was trained with.

    Args:
        pretrained: folder of a model that mllm.train wrote, or the model itself, which then keeps device and type.
        device: torch device; None lets `mllm.generate.load` choose, or takes the rank's GPU under a launcher.
        dtype: of the weights ("float32", "bfloat16"); None keeps the checkpoint's.
        batch_size: requests that are generated together.
        quantization: as `mllm.generate.load` ("4bit", "8bit"); None for none.
        max_new_tokens: cap on what a task asks for; None for no cap.
        pictures: "own"; or a control in which every picture is replaced, by one of the same size in the image
            processor's mean color ("blank") or by another one of its task ("shuffled"), see `mllm.blind`.
        picture_seed: of "shuffled".
        max_batch_size: what lmms-eval's flag of this name gives; a cap on batch_size.

    Raises:
        ValueError: if a value is out of range.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | Chat,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        quantization: Quantization | None = None,
        max_new_tokens: int | None = None,
        pictures: Pictures = "own",
        picture_seed: int = 0,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, but got {batch_size!r}")
        if pictures not in get_args(Pictures):
            raise ValueError(f"pictures must be one of {', '.join(get_args(Pictures))}, but got {pictures!r}")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, but got {max_new_tokens}")
        self.batch_size = int(batch_size) if max_batch_size is None else min(int(batch_size), max_batch_size)
        local_rank = os.environ.get("LOCAL_RANK")
        if device is None and local_rank is not None and torch.cuda.is_available():
            device = f"cuda:{local_rank}"
        self.chat: Chat = (
            load(pretrained, dtype=dtype, device=device, quantization=quantization)
            if isinstance(pretrained, str)
            else pretrained
        )
        self.max_new_tokens = max_new_tokens
        self.pictures: Pictures = pictures
        self.picture_seed = picture_seed

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers counts over ranks there."""
        return self.chat.model.device

    def clean(self) -> None:
        """Keeps the model, which the next task needs; lmms-eval would free what it holds, a training around it too."""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers all requests, in their order; those of equal settings and similar length run together."""
        answers: dict[int, str] = {}
        ignored = sorted({name for request in requests for name in request.args[1]} - _SUPPORTED - _HANDLED)
        if ignored:
            logger.warning("generation settings without effect here: %s", ", ".join(ignored))
        with self._progress(len(requests)) as advance:
            for batch in _batches(requests, self.batch_size):
                settings = self._settings(requests[batch[0]].args[1])
                conversations = [self._conversation(requests[index]) for index in batch]
                texts = self.chat.generate_batch(conversations, **settings)
                until = _until(requests[batch[0]].args[1])
                answers.update(zip(batch, (_cut(text, until) for text in texts), strict=True))
                advance(len(batch))
        return [answers[index] for index in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("vision_moe_llava answers single questions; choose tasks of type generate_until")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "vision_moe_llava generates answers and gives no likelihoods; choose tasks of type generate_until "
            "(for example seedbench instead of seedbench_ppl)"
        )

    def _conversation(self, request: Instance) -> tuple[list[dict[str, str]], list[Image.Image]]:
        text, _, doc_to_visual, doc_id, task, split = request.args
        visuals = list(doc_to_visual(self.task_dict[task][split][doc_id]) or []) if doc_to_visual else []
        wrong = [type(visual).__name__ for visual in visuals if not isinstance(visual, Image.Image)]
        if wrong:
            raise ValueError(f"task {task} brings {wrong[0]}; vision_moe_llava takes pictures only")
        images = [image.convert("RGB") for image in visuals]
        if self.pictures == "blank":
            images = [blank(image, self._mean_color()) for image in images]
        elif self.pictures == "shuffled":
            documents = self.task_dict[task][split]
            images = [other_picture(image, documents, doc_to_visual, seed=self.picture_seed) for image in images]
        # Some tasks place their pictures themselves.
        unplaced = max(0, len(images) - text.count("<image>"))
        return [{"role": "user", "content": "<image>\n" * unplaced + text}], images

    @contextmanager
    def _progress(self, total: int) -> Iterator[Callable[[int], object]]:
        """A bar on a terminal, else a line of the log a minute; on the first rank."""
        if self.rank == 0 and sys.stderr.isatty():
            with tqdm(total=total, desc="answering") as bar:
                yield bar.update
            return
        began = logged = time.monotonic()
        done = 0

        def advance(count: int) -> None:
            nonlocal done, logged
            done, now = done + count, time.monotonic()
            if now - logged > _LOG_EVERY_S:
                logged = now
                logger.info("answered %d of %d questions, %.2f a second", done, total, done / (now - began))

        yield advance

    def _mean_color(self) -> tuple[int, ...]:
        return tuple(round(255 * mean) for mean in self.chat.processor.image_processor.image_mean)

    def _settings(self, asked: dict[str, Any]) -> dict[str, Any]:
        settings = {name: asked[name] for name in sorted(_SUPPORTED) if asked.get(name) is not None}
        if not asked.get("do_sample", settings.get("temperature", 0) > 0):
            settings["temperature"] = 0.0
            settings.pop("top_p", None)
        if self.max_new_tokens is not None:
            settings["max_new_tokens"] = min(settings.get("max_new_tokens", self.max_new_tokens), self.max_new_tokens)
        return settings


def _batches(requests: Sequence[Instance], batch_size: int) -> list[list[int]]:
    """Indices of requests to run together: equal settings; long texts first, so that memory runs out early."""
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
    batches = []
    for group in groups.values():
        group.sort(key=lambda index: -len(requests[index].args[0]))
        batches += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
    return batches


def _until(asked: dict[str, Any]) -> list[str]:
    until = asked.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    # The blank line is no task's wish but lmms-eval's few-shot delimiter, set wherever a task names no stop. Its
    # own LLaVA backends do not stop there, and a description of two paragraphs must not lose the second.
    return [stop for stop in stops if stop and stop != "\n\n"]


def _cut(text: str, until: Sequence[str]) -> str:
    for stop in until:
        text = text.split(stop)[0]
    return text.strip()
