"""Photos with captions as LLaVA data: `python -m mllm.captions_to_conversations --data SHARDS --out DIR`.

Writes `images/{split}/KEY.jpg` (the bytes of the shards), `llava_pretrain.json` and `llava_finetune.json`. Each photo
comes once in each list, with another of its captions where it has more than one. With `matching` there are two more:
`llava_matching.json`, each photo with yes/no questions whether a caption is its own (`mllm.matching`), and
`llava_mixed.json`, each photo's dialogue of the fine-tuning list with these questions behind it.
"""

import logging
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mllm.matching import Turns, matching_turns
from vision_moe.checkpoint import write_folder
from vision_moe.config import parse
from vision_moe.data.caption_fields import captions_of
from vision_moe.data.picture import decode
from vision_moe.data.read_config import ReadConfig
from vision_moe.data.sources import Source, open_source
from vision_moe.files import write_json
from vision_moe.tracking import setup_logging

logger = logging.getLogger(__name__)

_PRETRAIN_QUESTION = "Describe this photo."
_FINETUNE_QUESTIONS = (
    "Describe this photo in one sentence.",
    "What is shown in this photo? Answer in one sentence.",
    "Write a short caption for this photo.",
    "In one sentence, what is going on here?",
)


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """Turns photos with captions into LLaVA conversations.

    Example:
        .venv/bin/python -m mllm.captions_to_conversations --data outputs/scenes --out outputs/conversations
    """

    data: Path
    """Folder of WebDataset shards `{split}-*.tar`, or a .json/.jsonl list of captions."""
    out: Path
    """Folder to write; what was there is replaced."""
    split: str = "train"
    """Shards `{split}-*.tar` are read."""
    caption_field: str = "captions"
    """Field of a photo's JSON: a list of captions or one string."""
    image_dir: Path | None = None
    """Folder that the picture names of a list are relative to."""
    limit: int | None = None
    """Photos to take; all if None."""
    matching: int = 0
    """Yes/no questions about each photo, half of them about another photo's caption; 0 asks none."""
    seed: int = 0
    """Decides captions and questions."""

    def __post_init__(self) -> None:
        if self.matching < 0 or self.matching % 2:
            raise ValueError(f"matching must be an even number, half yes and half no, but got {self.matching}")


def main() -> None:
    """Entry point."""
    setup_logging()
    config = parse(ConversionConfig)
    count = convert(config)
    sys.stdout.write(f"{count} photos; LLaVA data in {config.out}, pictures relative to {config.out / 'images'}\n")


def convert(config: ConversionConfig) -> int:
    """Writes the folder; returns the number of photos.

    Raises:
        ValueError: no photo can be read, or the photos are too few or too alike to be confused.
    """
    source = open_source(config.data, config.split, ReadConfig(image_dir=config.image_dir))
    count = 0

    def write(folder: Path) -> None:
        nonlocal count
        names = _write_images(source, config, folder / "images")
        if not names:
            raise ValueError(f"no readable photo in {config.data}")
        count = len(names)
        captions = {
            position: captions_of(source.metadata(position), config.caption_field, source.name(position))
            for position in names
        }
        for name, dialogues in _dialogues(names, captions, config).items():
            samples = [
                {"id": Path(image).stem, "image": image, "conversations": turns}
                for image, turns in zip(names.values(), dialogues, strict=True)
            ]
            write_json(folder / f"llava_{name}.json", samples)

    write_folder(config.out, write)
    return count


def _write_images(source: Source, config: ConversionConfig, folder: Path) -> dict[int, str]:
    """Copies the readable pictures; returns their names below `folder` by position."""
    names: dict[int, str] = {}
    number = len(source) if config.limit is None else min(config.limit, len(source))
    for position in tqdm(range(number), unit=" photos", disable=not sys.stderr.isatty()):
        try:
            encoded = source.picture(position)
            decode(encoded)
        except (OSError, ValueError) as error:
            logger.warning("left out %s: %s", source.name(position), error)
            continue
        name = f"{config.split}/{Path(source.name(position)).stem}.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded)
        names[position] = name
    if len(names) < number:
        logger.warning("%d of %d photos could not be read and were left out", number - len(names), number)
    return names


def _dialogues(
    names: dict[int, str], captions: dict[int, list[str]], config: ConversionConfig
) -> dict[str, list[Turns]]:
    """The turns about each photo, by list."""
    lists: dict[str, list[Turns]] = {"pretrain": [], "finetune": []}
    rest = []
    for position in names:
        rng = random.Random(f"{config.seed}-{position}")
        own = captions[position]
        first, second = rng.sample(own, 2) if len(own) > 1 else own * 2
        lists["pretrain"].append(_turns(_PRETRAIN_QUESTION, first))
        lists["finetune"].append(_turns(rng.choice(_FINETUNE_QUESTIONS), second))
        # Captions that the other lists give away come last.
        rest.append(sorted(own, key=[first, second].count))
    if config.matching:
        asked = matching_turns(rest, config.matching, config.seed)
        lists["mixed"] = [told + turns for told, turns in zip(lists["finetune"], asked, strict=True)]
        lists["matching"] = [_with_picture(turns) for turns in asked]
    return lists


def _turns(question: str, answer: str) -> Turns:
    return _with_picture([{"from": "human", "value": question}, {"from": "gpt", "value": answer}])


def _with_picture(turns: Turns) -> Turns:
    first, *others = turns
    return [{**first, "value": f"<image>\n{first['value']}"}, *others]


if __name__ == "__main__":
    main()
