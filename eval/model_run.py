"""One model on a list of tasks: what it got is on disk after every task."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from eval.answers import KeptAnswers, origin_sha256
from eval.asked import Asked
from eval.record import record
from eval.task_results import summarize
from mllm.adapter import is_adapter, read_info
from mllm.blind import Pictures
from mllm.generate import Chat
from mllm.lmms_adapter import VisionMoeLlava
from mllm.lmms_tasks import run_task
from vision_moe.distributed import barrier, from_main, is_main, rank, world_size
from vision_moe.files import replacing, write_json
from vision_moe.tracking import environment

logger = logging.getLogger(__name__)


class ModelRun:
    """A loaded model, its answers on disk.

    Args:
        lm: the model.
        name: that reports give it.
        folder: it was loaded from.
        asked: the tasks.
    """

    def __init__(self, lm: VisionMoeLlava, name: str, folder: str, asked: Asked) -> None:
        self.lm, self.asked = lm, asked
        self.chat: Chat = lm.chat
        self._record: dict[str, Any] = {}
        identity = {"model": str(self.chat.model.dtype), "device": lm.device.type, **environment()["packages"]}
        identity["quantization"] = asked.settings["quantization"]
        self._origin = from_main(origin_sha256(Path(folder), identity) if is_main() else "")
        if is_main():
            self._record = record("lmms_eval", folder, {}, {})
            self._record["model"] |= {"name": name, **_base(Path(folder)), **describe(self.chat)}

    def run(self, pictures: Pictures, output: Path, *, resume: bool) -> dict[str, str]:
        """Runs each task apart, so that one that fails takes no other's result with it.

        Several processes stop at the first failure instead: the others may wait for the one that failed.

        Args:
            pictures: what is shown.
            output: folder for results.json, samples.jsonl and answers/.
            resume: take the answers that are in answers/ already.

        Returns:
            Reasons of failure by task.
        """
        self.lm.pictures, self.lm.picture_seed = pictures, self.asked.seed
        answers = output / "answers"
        if is_main() and not resume:
            for file in answers.glob("*.jsonl"):
                file.unlink()
        barrier()
        kept = KeptAnswers(self.chat, answers, self._origin, rank=rank())
        # Nobody writes before all have read.
        barrier()
        self.lm.chat = kept
        results: dict[str, Any] = {}
        lines: list[dict[str, Any]] = []
        failed: dict[str, str] = {}
        for number, name in enumerate(self.asked.tasks, start=1):
            logger.info("task %d of %d: %s, %s pictures", number, len(self.asked.tasks), name, pictures)
            try:
                new, new_lines = self._ask(name, kept)
            except Exception as error:  # reported at the end, as a non-zero exit, once the other tasks have run
                if world_size() > 1:
                    raise
                logger.exception("task %s failed", name)
                failed[name] = f"{type(error).__name__}: {error}"
            else:
                results |= new
                lines += new_lines
            if is_main():
                self._write(output, pictures, results, failed, lines)
        return failed

    def _ask(self, name: str, kept: KeptAnswers) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What `summarize` gives for a task or group, with what it cost; nothing on other ranks than the first."""
        asked, began, before = self.asked, time.monotonic(), (kept.num_asked, kept.num_kept)
        found = run_task(self.lm, asked.task(name), asked.manager, limit=asked.limit, seed=asked.seed)
        if found is None:
            return {}, []
        results, lines = summarize(found, seed=asked.seed)
        cost = {
            "seconds": round(time.monotonic() - began, 1),
            "asked": kept.num_asked - before[0],
            "from_answers": kept.num_kept - before[1],
        }
        return {task: {**entry, "cost": cost} for task, entry in results.items()}, lines

    def _write(
        self,
        output: Path,
        pictures: Pictures,
        results: dict[str, Any],
        failed: dict[str, str],
        lines: list[dict[str, Any]],
    ) -> None:
        with replacing(output / "samples.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
        settings = {**self.asked.settings, "pictures": pictures}
        write_json(output / "results.json", {**self._record, "settings": settings, "result": results, "failed": failed})


def describe(chat: Chat) -> dict[str, Any]:
    """What kind of model it is, as far as numbers of two models depend on it."""
    config = chat.model.config
    return {
        "tower": config.vision_config.model_type,
        "image_size": config.vision_config.image_size,
        "image_tokens": config.image_seq_length,
        "llm": config.text_config.model_type,
        "template": chat.template,
        "dtype": str(chat.model.dtype).removeprefix("torch."),
    }


def _base(folder: Path) -> dict[str, Any]:
    """What an adapter was trained on; its own weights do not tell."""
    if not is_adapter(folder):
        return {}
    info = read_info(folder)
    return {"base": {"path": info.base, "weights_sha256": info.base_fingerprint}}
