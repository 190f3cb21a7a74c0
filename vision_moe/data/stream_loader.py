"""Batches of a stream, and the state that says which of them were handed out."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vision_moe.data.stream import CaptionStream, Position, StreamSample
from vision_moe.files import write_json

Batch = dict[str, Tensor]


class StreamLoader(DataLoader[StreamSample]):
    """Loads batches of one rank; each batch is of one worker, and the workers take turns.

    Positions travel with the batches: what the workers have read ahead when a checkpoint is written does not count.

    Args:
        stream: the data.
        collate: makes a batch of samples.
        batch_size: samples of a batch.
        num_workers: processes that read; 0 reads in this one.
        pin_memory: as DataLoader's.
        state: what `state` returned; None begins at the beginning.

    Raises:
        ValueError: a worker would have no shard, or the state is of other data or other processes.
    """

    def __init__(
        self,
        stream: CaptionStream,
        collate: Callable[[Sequence[Any]], Batch],
        *,
        batch_size: int,
        num_workers: int = 0,
        pin_memory: bool = False,
        state: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            stream,
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=_Collator(collate),
        )
        workers = max(1, num_workers)
        self.stream = stream
        self.batches = 0
        self.positions = [Position()] * workers
        if state is not None:
            self._check(state)
            self.batches = state["batches"]
            self.positions = [Position(*position) for position in state["positions"]]
        stream.start(self.positions, self.batches % workers)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            consumer, *position = batch.pop("stream").tolist()
            self.positions[consumer] = Position(*position)
            self.batches += 1
            yield batch

    def state(self) -> dict[str, Any]:
        """Position behind the last batch handed out, as JSON."""
        return {**self._identity(), "batches": self.batches, "positions": [list(at) for at in self.positions]}

    def counts(self) -> Tensor:
        """int64[3]: samples seen, unreadable ones among them, and shards left at a damage, of this rank."""
        return torch.tensor([[at.seen, at.unreadable, at.damaged] for at in self.positions]).sum(0)

    def _identity(self) -> dict[str, Any]:
        """What a state is worth nothing without."""
        return {
            "shards": hashlib.sha256("\n".join(self.stream.reader.shards).encode()).hexdigest()[:16],
            "shuffle_buffer": self.stream.shuffle_buffer,
            "seed": self.stream.seed,
            "rank": self.stream.rank,
            "world_size": self.stream.world_size,
            "workers": len(self.positions),
        }

    def _check(self, state: dict[str, Any]) -> None:
        now = self._identity()
        differing = [f"{name} {state.get(name)} then, {now[name]} now" for name in now if state.get(name) != now[name]]
        if differing:
            raise ValueError(
                f"the checkpoint's place in the stream cannot be taken up: {'; '.join(differing)}; go on with the same "
                "data, processes and num_workers, or delete the checkpoints of this stage to begin it again"
            )


def save_state(loader: StreamLoader, checkpoint: Path) -> None:
    """Writes this rank's state into a checkpoint."""
    write_json(_file(checkpoint, loader.stream.rank), loader.state())


def load_state(checkpoint: Path, rank: int) -> dict[str, Any]:
    """Reads a rank's state.

    Raises:
        FileNotFoundError: the checkpoint has none.
    """
    file = _file(checkpoint, rank)
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: the checkpoint was written without streaming, or by fewer processes; go on as it was "
            "written, or delete it"
        )
    return dict(json.loads(file.read_text(encoding="utf-8")))


class _Collator:
    """Adds consumer and position of a batch's last sample, int64[1 + fields of Position]."""

    def __init__(self, collate: Callable[[Sequence[Any]], Batch]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[StreamSample]) -> Batch:
        last = samples[-1]
        return {**self.collate(samples), "stream": torch.tensor([last["consumer"], *last["position"]])}


def _file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"stream_{rank}.json"
