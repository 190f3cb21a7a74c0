"""Reads a data set and says what is wrong with it: `python -m vision_moe.data.check PATH [--split S ...]`.

Ends with status 1 where a training would refuse the data.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers import AutoTokenizer

from vision_moe.assets import find_model
from vision_moe.config import parse
from vision_moe.data.captions import check_field
from vision_moe.data.check_report import CheckReport
from vision_moe.data.collate import stated_length
from vision_moe.data.examine import Finding, examine
from vision_moe.data.hf import stream_hf
from vision_moe.data.read_config import ReadConfig
from vision_moe.data.readable import in_parallel
from vision_moe.data.samples import RawSample
from vision_moe.data.shard_source import ShardSource, find_shards
from vision_moe.data.sources import Source, open_source
from vision_moe.data.stream import ShardReader
from vision_moe.data.tar_shards import TarShards
from vision_moe.data.urls import is_remote
from vision_moe.files import write_json
from vision_moe.tracking import setup_logging


@dataclass(frozen=True, kw_only=True)
class CheckConfig(ReadConfig):
    """Says what is wrong with captioned pictures before a training meets it.

    Example:
        .venv/bin/python -m vision_moe.data.check outputs/scenes --split test
    """

    data: str
    """What data.train of a recipe names (docs/data.md); the first argument may stand for it."""
    split: str = "train"
    """Which shards, or which split of a Hugging Face data set."""
    streaming: bool = False
    """Reads shards in sequence, as a streamed training does; implied for URLs and commands."""
    tokenizer: str | None = None
    """Folder or hub name of a model: captions are counted in its tokens, too, and those too long for it."""
    max_tokens: int | None = None
    """Length at which captions are cut; None takes the tokenizer's."""
    num_workers: int | None = None
    """Processes that read; None takes one a core for more than a thousand pictures, or one where they are streamed."""
    output: Path | None = None
    """JSON file for the whole report, with the name of every picture that cannot be read."""


def main(args: Sequence[str] | None = None) -> int:
    """Entry point; returns the status."""
    setup_logging(logging.ERROR)
    given = list(sys.argv[1:] if args is None else args)
    if given and not given[0].startswith("-") and not given[0].endswith((".yaml", ".yml")):
        given.insert(0, "--data")
    config = parse(CheckConfig, given)
    found = check(config)
    if config.output is not None:
        write_json(config.output, found)
    sys.stdout.write("\n".join(_lines(found)) + "\n")
    return 1 if found["refused"] else 0


def check(config: CheckConfig) -> dict[str, Any]:
    """Reads everything; the JSON report, in which "refused" says why a training would not take the data."""
    report = CheckReport(*_tokens(config))
    refused: list[str] = []
    try:
        _read(config, report, refused)
    except (OSError, ValueError, ImportError) as error:
        refused.append(str(error))
    if report.damaged_shards and config.damaged_shards == "error":
        refused.append(f'{len(report.damaged_shards)} damaged shards; mend them, or set damaged_shards to "skip"')
    if report.unreadable > config.max_unreadable_share * report.total:
        share = (
            f"{report.unreadable} of {report.total} pictures cannot be read ({report.unreadable / report.total:.2%})"
        )
        refused.append(f"{share}; at most {config.max_unreadable_share:.2%} may be (max_unreadable_share)")
    if report.total == report.unreadable and not refused:
        refused.append(f"no picture in {config.data}")
    return {"data": config.data, "split": config.split, **report.summary(), "refused": refused}


class _Indexed(Dataset[Finding]):
    """Findings of a source, by position."""

    def __init__(self, source: Source, config: ReadConfig) -> None:
        self.source = source
        self.config = config

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> Finding:
        name = self.source.name(position)
        try:
            metadata, error = self.source.metadata(position), None
        except ValueError as failure:
            metadata, error = {}, str(failure)
        try:
            picture = self.source.picture(position)
        except FileNotFoundError:
            picture = None
        except OSError as failure:
            return Finding(name, "damaged picture", str(failure))
        return examine(RawSample(name, picture, metadata, error), self.config)


class _Streamed(IterableDataset[Finding]):
    """Findings of shards, one after another; workers share the shards."""

    def __init__(self, reader: ShardReader, config: ReadConfig) -> None:
        self.reader = reader
        self.config = config

    def __iter__(self) -> Iterator[Finding]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for shard in range(first, len(self.reader.shards), step):
            try:
                for raw in self.reader.read(shard):
                    yield examine(raw, self.config)
            except OSError as error:
                yield Finding(self.reader.shards[shard], "damaged shard", str(error))


def _read(config: CheckConfig, report: CheckReport, refused: list[str]) -> None:
    items: Dataset[Finding]
    workers = config.num_workers
    if config.streaming or is_remote(config.data):
        if config.format == "hf":
            reader: ShardReader = stream_hf(config.data, config.split, config)
        else:
            reader = TarShards(find_shards(config.data, config.split), allow_pipe=config.allow_pipe)
        items, total, workers = _Streamed(reader, config), reader.count() or 0, workers or 0
    else:
        source = _open(config, report)
        try:
            check_field(source, config)
        except (ValueError, IndexError) as error:
            refused.append(str(error))
        items, total = _Indexed(source, config), len(source)
    for findings in in_parallel(items, total, workers=workers):
        report.add(findings)


def _open(config: CheckConfig, report: CheckReport) -> Source:
    """The source, with all its damaged shards and not only the first."""
    source = open_source(config.data, config.split, replace(config, damaged_shards="skip"))
    if isinstance(source, ShardSource):
        report.damaged_shards.update(source.damaged)
    return source


def _tokens(config: CheckConfig) -> tuple[Callable[[Sequence[str]], list[int]] | None, int | None]:
    if config.tokenizer is None:
        return None, None
    tokenizer = AutoTokenizer.from_pretrained(find_model(config.tokenizer))
    limit = stated_length(tokenizer) if config.max_tokens is None else config.max_tokens
    # Its warnings about long captions are what is being counted here.
    count: Callable[[Sequence[str]], list[int]] = lambda captions: [  # noqa: E731
        len(ids) for ids in tokenizer(list(captions), verbose=False)["input_ids"]
    ]
    return count, limit


def _lines(found: dict[str, Any]) -> Iterator[str]:
    """The report for a reader."""
    pictures, captions, duplicates = found["pictures"], found["captions"], found["duplicates"]
    yield f"{found['data']} ({found['split']}): {pictures['total']} pictures, {pictures['unreadable']} unreadable"
    for kind, named in found["faults"].items():
        yield f"  {kind}: {len(named)}"
        yield from (f"    {name}: {reason}" for name, reason in list(named.items())[:5])
    yield from (f"  damaged shard {name}: {reason}" for name, reason in found["damaged_shards"].items())
    yield f"captions: {captions['total']}, words {_range(captions['words'])}"
    if captions["tokens"]:
        tokens = captions["tokens"]
        yield f"  tokens {_range(tokens)}; {tokens['cut']} are longer than {tokens['limit']} and would be cut"
    yield f"duplicates: {duplicates['pictures']} pictures, {duplicates['captions']} captions"
    yield from (f"  {' = '.join(names)}" for names in duplicates["picture_examples"])
    yield from (f"  {count} x {text!r:.100}" for text, count in duplicates["caption_examples"].items())
    yield f"fields: {found['fields']}; missing from some: {found['missing_fields'] or 'none'}"
    yield f"modes: {found['modes']}; {found['traits'] or 'none rotated, transparent or animated'}"
    yield f"width {_range(found['width'])}; height {_range(found['height'])}"
    yield from (f"REFUSED: {reason}" for reason in found["refused"])
    if not found["refused"]:
        yield "a training would take these data"


def _range(spread: dict[str, float] | None) -> str:
    if not spread:
        return "unknown"
    return f"{spread['min']:g} to {spread['max']:g}, median {spread['median']:g}, mean {spread['mean']:g}"


if __name__ == "__main__":
    sys.exit(main())
