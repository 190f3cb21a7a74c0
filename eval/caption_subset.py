"""Splits captioned pictures by what their captions name: a narrow part to fine-tune on, and the rest.

    python -m eval.caption_subset --data FOLDER --split train --words dog dogs --holdout 200 --out outputs/dogs
    python -m eval.caption_subset --data FOLDER --split val --words dog dogs --out outputs/dogs

writes shards of the same form: `{split}-0000.tar` with the pictures that the words name, `other_{split}-0000.tar` with
the others, and with --holdout `held_{split}-0000.tar` with so many of the first, which are then left out of it.
"""

import io
import json
import re
import sys
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from vision_moe.command_help import CommandParser
from vision_moe.data.caption_fields import captions_of
from vision_moe.data.read_config import ReadConfig
from vision_moe.data.sources import Source, open_source
from vision_moe.files import replacing


def names_any(captions: Sequence[str], words: Sequence[str], at_least: int) -> bool:
    """Whether at least so many of the captions hold one of the words."""
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, words))})\b", re.IGNORECASE)
    return sum(bool(pattern.search(caption)) for caption in captions) >= at_least


def split_pictures(source: Source, words: Sequence[str], at_least: int) -> tuple[list[int], list[int]]:
    """Positions of the pictures that the words name, and of the others.

    Raises:
        ValueError: one of the two is empty.
    """
    named, others = [], []
    for position in range(len(source)):
        captions = captions_of(source.metadata(position), "captions", source.name(position))
        (named if names_any(captions, words, at_least) else others).append(position)
    if not named or not others:
        raise ValueError(
            f"{len(named)} of {len(source)} pictures have {at_least} captions with {', '.join(words)}; a subset needs "
            "some and not all: name other words"
        )
    return named, others


def write_shard(source: Source, positions: Iterable[int], file: Path) -> None:
    """Writes pictures as they are, and their JSON, as one shard."""
    with replacing(file) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for position in positions:
            metadata = json.dumps(source.metadata(position)).encode()
            for suffix, content in (("jpg", source.picture(position)), ("json", metadata)):
                info = tarfile.TarInfo(f"{Path(source.name(position)).name}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def main(args: Sequence[str] | None = None) -> None:
    """Writes the shards and says how many pictures each has."""
    parser = CommandParser(
        __doc__, ".venv/bin/python -m eval.caption_subset --data flickr8k --words dog dogs puppy --out outputs/dogs"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of shards")
    parser.add_argument("--split", default="train", help="shards {split}-*.tar are read")
    parser.add_argument("--words", nargs="+", required=True, help="whole words, in any case")
    parser.add_argument("--at-least", type=int, default=2, help="captions of a picture that must hold one (default: 2)")
    parser.add_argument("--holdout", type=int, default=0, help="pictures to hold out of those that the words name")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args(args)
    source = open_source(options.data, options.split, ReadConfig())
    named, others = split_pictures(source, options.words, options.at_least)
    if not 0 <= options.holdout < len(named):
        parser.error(
            f"--holdout must be in [0, {len(named)}), the pictures that the words name, but is {options.holdout}"
        )
    held = sorted(np.random.default_rng(options.seed).permutation(named)[: options.holdout].tolist())
    parts = {options.split: sorted(set(named) - set(held)), f"other_{options.split}": others}
    for name, positions in {**parts, **({f"held_{options.split}": held} if held else {})}.items():
        file = options.out / f"{name}-0000.tar"
        write_shard(source, positions, file)
        sys.stdout.write(f"{file}: {len(positions)} pictures\n")


if __name__ == "__main__":
    main()
