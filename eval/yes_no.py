"""Yes/no questions of a LLaVA JSON: `python -m eval.yes_no --model DIR --data JSON --image_folder DIR [--output FILE]`.

For example the `llava_matching.json` of `mllm.captions_to_conversations`. Every question is asked alone, by greedy
decoding, whatever else its dialogue holds; the scores are those of POPE (`eval.metrics.yes_no_scores`).
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from eval.metrics import yes_no_scores
from eval.record import emit, questions_sha256, record
from eval.tables import yes_no_table
from mllm.conversation import IMAGE_TOKEN
from mllm.data.index import SampleIndex, image_names
from mllm.generate import Question, load
from mllm.images import read_image
from vision_moe.config import parse
from vision_moe.tracking import setup_logging

# "Yes" and "No", a full stop and the end, whatever the tokenizer makes of them.
_NEW_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class YesNoConfig:
    """Asks a LLaVA yes/no questions about pictures.

    Example:
        .venv/bin/python -m eval.yes_no --model outputs/llava/model --data llava_matching.json --image_folder images
    """

    model: str
    """Folder of the LLaVA, or of an adapter."""
    data: Path
    """LLaVA JSON; every sample has one picture, and every answer is Yes or No."""
    image_folder: Path
    """Folder that picture names are relative to."""
    output: Path | None = None
    """JSON file to write; the table is printed in any case."""
    limit: int | None = None
    """Pictures to take from the beginning; all if None."""
    batch_size: int = 16
    """Pictures whose questions are asked together."""
    device: str | None = None
    """Torch device; None takes the GPU if there is one."""


class Answers(NamedTuple):
    """What was said to Q questions.

    Attributes:
        said: Q answers of the model.
        truths: Q times "yes" or "no".
        picture_Q: int64[Q], the number of each question's picture.
        questions_sha256: of pictures, questions and truths.
    """

    said: list[str]
    truths: list[str]
    picture_Q: np.ndarray[Any, np.dtype[np.int64]]
    questions_sha256: str

    @property
    def right(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """bool[Q], whether each is right, as `yes_no_scores` has it."""
        return np.array([a.strip().lower() == b for a, b in zip(self.said, self.truths, strict=True)])


def main() -> None:
    """Entry point."""
    setup_logging()
    config = parse(YesNoConfig)
    answers = ask(config)
    result = yes_no_scores(answers.said, answers.truths)
    settings = {"data": str(config.data), "limit": config.limit, "questions_sha256": answers.questions_sha256}
    samples = {"right": answers.right.astype(np.int64), "picture": answers.picture_Q}
    emit(record("yes_no", config.model, settings, result), yes_no_table(result), config.output, samples)


def ask(config: YesNoConfig) -> Answers:
    """Asks all questions.

    Raises:
        ValueError: a sample has not one picture, or an answer is neither yes nor no.
    """
    chat = load(config.model, device=config.device)
    samples = SampleIndex(config.data)
    number = len(samples) if config.limit is None else min(config.limit, len(samples))
    said, truths, pictures, asked = [], [], [], []
    progress = tqdm(total=number, unit=" pictures", disable=not sys.stderr.isatty())
    for first in range(0, number, config.batch_size):
        questions: list[Question] = []
        batch = range(first, min(first + config.batch_size, number))
        for picture in batch:
            sample = samples[picture]
            name, pairs = _picture(sample), list(_pairs(sample))
            image = read_image(config.image_folder / name)
            questions += [([{"role": "user", "content": text}], [image]) for text, _ in pairs]
            truths += [truth for _, truth in pairs]
            asked += [(name, *pair) for pair in pairs]
            pictures += [picture] * len(pairs)
        said += chat.generate_batch(questions, max_new_tokens=_NEW_TOKENS)
        progress.update(len(batch))
    return Answers(said, truths, np.array(pictures), questions_sha256(asked))


def _picture(sample: dict[str, Any]) -> str:
    names = image_names(sample)
    if len(names) != 1:
        raise ValueError(f"sample {sample.get('id')!r} must have one picture, but has {len(names)}")
    return names[0]


def _pairs(sample: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The questions, without placeholders, with "yes" or "no"."""
    turns = sample["conversations"]
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        truth = answer["value"].strip().rstrip(".").lower()
        if truth not in ("yes", "no"):
            raise ValueError(f"sample {sample.get('id')!r}: the answer must be Yes or No, but is {json.dumps(answer)}")
        yield question["value"].replace(IMAGE_TOKEN, "").strip(), truth


if __name__ == "__main__":
    main()
