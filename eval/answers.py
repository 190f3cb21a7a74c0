"""Answers as they come, on disk: a run that was killed goes on without asking the model again.

lmms-eval's own response cache does not serve here: it writes when a whole task is answered, its key has neither the
weights nor the picture in it (a model given as an object is told by its address), and it forgets empty answers.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import vision_moe
from mllm.adapter import is_adapter, read_info
from mllm.blind import pixels_sha256
from mllm.generate import Chat, Question

logger = logging.getLogger(__name__)


class KeptAnswers:
    """A `Chat` that looks its greedy answers up before it asks the model, and keeps new ones.

    The key of an answer is all that it follows from: `origin`, the conversation, the pixels of its pictures and the
    settings. A drawn answer (temperature above 0) is not kept: the same question may get another one.

    Args:
        chat: the model.
        folder: of the files of answers; those of other processes, and of earlier runs, are read, none is changed.
        origin: what tells model and code from others, see `origin_sha256`.
        rank: of this process, which writes to a file of its own.

    Attributes:
        num_asked: questions that the model was asked.
        num_kept: questions answered from the files.
    """

    def __init__(self, chat: Chat, folder: Path, origin: str, *, rank: int = 0) -> None:
        self.chat, self.model, self.processor = chat, chat.model, chat.processor
        self.num_asked = self.num_kept = 0
        self._origin = origin
        self._file = folder / f"rank{rank}.jsonl"
        self._answers = dict(_read(folder))
        folder.mkdir(parents=True, exist_ok=True)
        if self._file.is_file() and not self._file.read_bytes().endswith(b"\n"):
            # Killed in the middle of a line, to which the next answer would be joined.
            with self._file.open("a", encoding="utf-8") as file:
                file.write("\n")
        if self._answers:
            logger.info("%d answers are kept in %s", len(self._answers), folder)

    def generate_batch(self, questions: Sequence[Question], **settings: Any) -> list[str]:
        """As `Chat.generate_batch`."""
        if settings.get("temperature", 0) > 0:
            self.num_asked += len(questions)
            return self.chat.generate_batch(questions, **settings)
        keys = [self._key(question, settings) for question in questions]
        unknown = [index for index, key in enumerate(keys) if key not in self._answers]
        if unknown:
            answers = self.chat.generate_batch([questions[index] for index in unknown], **settings)
            self._keep({keys[index]: answer for index, answer in zip(unknown, answers, strict=True)})
        self.num_asked += len(unknown)
        self.num_kept += len(keys) - len(unknown)
        return [self._answers[key] for key in keys]

    def _key(self, question: Question, settings: dict[str, Any]) -> str:
        messages, images = question
        asked = [self._origin, messages, [pixels_sha256(image) for image in images], sorted(settings.items())]
        return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()

    def _keep(self, new: dict[str, str]) -> None:
        self._answers |= new
        with self._file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps([key, answer]) + "\n" for key, answer in new.items())


def origin_sha256(model: Path, settings: dict[str, Any]) -> str:
    """One hash of a model's folder, of the one that an adapter was trained on, of our code and of `settings`.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not model.is_dir():
        raise FileNotFoundError(f"no model folder at {model}")
    folders = [model, *([Path(read_info(model).base)] if is_adapter(model) else [])]
    code = Path(vision_moe.__file__).parent
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for folder, pattern in [*((folder, "*") for folder in folders), (code, "*.py"), (code.parent / "mllm", "*.py")]:
        for file in sorted(path for path in folder.rglob(pattern) if path.is_file()):
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{file.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()


def _read(folder: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").split("\n"):
            if not line:
                continue
            try:
                key, answer = json.loads(line)
            except ValueError:
                logger.warning("%s has a line that was not written to its end; its question is asked again", file)
                continue
            yield key, answer
