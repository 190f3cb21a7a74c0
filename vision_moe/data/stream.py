"""Captioned pictures read from shards in sequence, shuffled in a buffer, with a position that training resumes from.

A consumer is one worker process of one rank. Each epoch has one order of all shards, which every consumer computes from
(seed, epoch); consumer c of C takes shards c, c + C, ... of it and goes on into the next epoch by itself. The buffer is
filled, emptied in random order, and filled again: so a position is a place in the data and a count, small and exact.
The buffers of `datasets` and `webdataset` are refilled as they empty and would have to be saved whole; `datasets` 5.2
drops its buffer on resumption, and the pictures in it are not seen.
"""

import itertools
import logging
import zlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from vision_moe.data.archive import DamagedShardError
from vision_moe.data.caption_fields import captions_of, draw_caption
from vision_moe.data.captions import CaptionSample
from vision_moe.data.picture import decode
from vision_moe.data.read_config import ReadConfig, all_fields
from vision_moe.data.samples import RawSample

logger = logging.getLogger(__name__)

_NAMES_LOGGED = 20
# The share of unreadable pictures is judged as if at least so many had been read.
_JUDGED_OVER = 1000


class ShardReader(Protocol):
    """Shards that can be read from a sample on: `TarShards` or `HFShards`."""

    shards: list[str]

    def read(self, shard: int, start: int = 0) -> Iterator[RawSample]:
        """Samples of a shard; an OSError where it is damaged."""

    def count(self) -> int | None:
        """Number of samples of all shards, if that can be known without reading them."""


class Position(NamedTuple):
    """How far a consumer is: where its buffer's first sample lies, and what came after."""

    epoch: int = 0
    shard: int = 0
    """Number among the consumer's own shards of the epoch."""
    start: int = 0
    """Sample of that shard."""
    drawn: int = 0
    """Samples taken from the buffer."""
    seen: int = 0
    """Samples taken since the beginning."""
    unreadable: int = 0
    """Those of them that were skipped."""
    damaged: int = 0
    """Shards left at a damage."""
    damaged_before: int = 0
    """Those of them before the buffer."""


class StreamSample(CaptionSample):
    """A sample, and where the stream stands behind it."""

    consumer: int
    """Worker of this rank, in the order of the first start."""
    position: Position


class CaptionStream(IterableDataset[StreamSample]):
    """Endless stream of readable pictures of all shards, epoch after epoch.

    Args:
        reader: the shards.
        config: captions, largest picture, and what becomes of damaged input.
        shuffle_buffer: samples that are held, undecoded, and drawn from in random order; 1 keeps the shards' order.
        seed: decides every order and caption.
        rank: number of this process.
        world_size: number of processes.

    Attributes:
        positions: where each worker of this rank starts.
        first_worker: which of them gives the first batch.
    """

    def __init__(
        self,
        reader: ShardReader,
        config: ReadConfig,
        *,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be at least 1, but got {shuffle_buffer}")
        self.reader = reader
        self.config = config
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.positions = [Position()]
        self.first_worker = 0

    def start(self, positions: list[Position], first_worker: int = 0) -> None:
        """Sets where each worker begins; there must be as many positions as workers.

        Raises:
            ValueError: a worker would have no shard.
        """
        consumers, shards = len(positions) * self.world_size, len(self.reader.shards)
        if shards < consumers:
            raise ValueError(
                f"{shards} shards cannot feed {self.world_size} processes x {len(positions)} workers: some would read "
                f"nothing. Lower num_workers to at most {shards // self.world_size}, start fewer processes, or cut the "
                "data into more shards"
            )
        self.positions, self.first_worker = positions, first_worker

    def __iter__(self) -> Iterator[StreamSample]:
        info = get_worker_info()
        workers = 1 if info is None else info.num_workers
        if workers != len(self.positions):
            raise ValueError(f"the stream was started for {len(self.positions)} workers, but runs in {workers}")
        worker = (self.first_worker + (0 if info is None else info.id)) % workers
        consumer = self.rank * workers + worker
        for sample, position in self._drawn(self.positions[worker], consumer, workers * self.world_size):
            yield {**sample, "consumer": worker, "position": position}

    def captions(self) -> Iterator[str]:
        """Captions of all pictures of the data, undecoded and in the shards' order."""
        for shard in range(len(self.reader.shards)):
            for raw in self._read(shard, 0, []):
                try:
                    yield from captions_of(raw.metadata, all_fields(self.config), raw.name)
                except ValueError:
                    # Counted, named and judged when the picture is drawn.
                    continue

    def _drawn(self, at: Position, consumer: int, consumers: int) -> Iterator[tuple[CaptionSample, Position]]:
        """A consumer's samples from a position on, each with the position behind it."""
        for epoch in itertools.count(at.epoch):
            order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.reader.shards))
            own = [int(shard) for shard in order[consumer::consumers]]
            is_whole, readable = at[1:4] == (0, 0, 0), 0
            for block in self._blocks(own, at):
                at = at._replace(**block.place)
                turns = np.random.default_rng([self.seed, 1, epoch, own[at.shard], at.start]).permutation(
                    len(block.samples)
                )
                for turn in turns[at.drawn :]:
                    at = at._replace(drawn=at.drawn + 1, seen=at.seen + 1)
                    try:
                        sample = self._sample(block.samples[turn], epoch)
                    except (OSError, ValueError) as error:
                        at = at._replace(unreadable=at.unreadable + 1)
                        self._judge(at, f"{block.samples[turn].name} ({error})")
                        continue
                    readable += 1
                    yield sample, at
                at = at._replace(drawn=0)
            if is_whole and not readable:
                raise ValueError(
                    f"no readable picture in {len(own)} shards, of which {self._name(own[0])} is the first"
                )
            at = Position(epoch + 1, 0, 0, 0, at.seen, at.unreadable, at.damaged, at.damaged)

    def _blocks(self, own: list[int], at: Position) -> Iterator["_Block"]:
        """What fills the buffer from a position on: all but an epoch's last block are of its size."""
        damaged: list[str] = []
        place = {"shard": at.shard, "start": at.start, "damaged_before": at.damaged_before}
        block: list[RawSample] = []
        for shard in range(at.shard, len(own)):
            start = at.start if shard == at.shard else 0
            for number, sample in enumerate(self._read(own[shard], start, damaged), start):
                if not block:
                    place = {"shard": shard, "start": number, "damaged_before": at.damaged_before + len(damaged)}
                block.append(sample)
                if len(block) == self.shuffle_buffer:
                    yield _Block({**place, "damaged": at.damaged_before + len(damaged)}, block)
                    block = []
        # Even if empty: it tells of the damage at the very end.
        yield _Block({**place, "damaged": at.damaged_before + len(damaged)}, block)

    def _read(self, shard: int, start: int, damaged: list[str]) -> Iterator[RawSample]:
        """Samples of a shard; where damage is skipped, the name of a damaged one is added to `damaged`."""
        try:
            yield from self.reader.read(shard, start)
        except PermissionError:
            raise
        except OSError as error:
            if self.config.damaged_shards == "error":
                raise DamagedShardError(
                    f'{self._name(shard)} cannot be read to its end: {error}; set damaged_shards to "skip" to go on '
                    "without the rest of it"
                ) from error
            logger.warning("%s cannot be read to its end, the rest is left out: %s", self._name(shard), error)
            damaged.append(self._name(shard))

    def _sample(self, raw: RawSample, epoch: int) -> CaptionSample:
        # By its name and not by its place: the caption is the same however many processes read.
        number = zlib.crc32(raw.name.encode())
        encoded = raw.encoded()
        caption = draw_caption(raw.metadata, self.config, raw.name, (self.seed, epoch, number))
        return {"image": decode(encoded, self.config.max_pixels), "caption": caption, "index": number}

    def _judge(self, at: Position, what: str) -> None:
        share = at.unreadable / max(at.seen, _JUDGED_OVER)
        if share > self.config.max_unreadable_share:
            raise ValueError(
                f"{at.unreadable} of {at.seen} pictures cannot be read, the last one {what}; at most "
                f"{self.config.max_unreadable_share:.2%} may be: mend the data or raise max_unreadable_share"
            )
        if at.unreadable <= _NAMES_LOGGED:
            logger.warning("skipped: %s", what)

    def _name(self, shard: int) -> str:
        return self.reader.shards[shard]


class _Block(NamedTuple):
    """Samples of one filling of the buffer."""

    place: dict[str, int]
    """Fields of the position of its first sample, and the damage met before and while it was read."""
    samples: list[RawSample]
