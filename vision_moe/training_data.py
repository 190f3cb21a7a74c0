"""The training pictures of a run: at random access, as a stream, or both."""

from collections.abc import Iterator
from pathlib import Path

from vision_moe.data.captions import CaptionDataset, open_dataset
from vision_moe.data.hf import stream_hf
from vision_moe.data.shard_source import find_shards, has_splits
from vision_moe.data.stream import CaptionStream, ShardReader
from vision_moe.data.tar_shards import TarShards
from vision_moe.distributed import rank, world_size
from vision_moe.recipe import DataConfig, TrainConfig


class TrainingData:
    """Opens what the methods of a recipe need: MCL draws from anywhere, everything else can stream.

    Args:
        config: the recipe.

    Raises:
        FileNotFoundError: there are no such data.
        ValueError: the data cannot be used so, or the final table would be measured on them.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        data = config.data
        if data.eval is None and not has_splits(data.train, data):
            if not data.streaming and not Path(data.train).exists():
                raise FileNotFoundError(f"no data at {data.train} (data.train); docs/data.md says what it may name")
            raise ValueError(
                f"{data.train} has no splits, so the final table would be measured on the training set: set data.eval"
            )
        self.stream = self._open_stream() if data.streaming else None
        # Opened and counted now, so that a mistake in the recipe does not show after hours.
        self._indexed = self._open_dataset() if self.stream is None or "dmu" in config.methods else None
        self._num_samples = self._count()

    def __len__(self) -> int:
        """Pictures of an epoch."""
        return self._num_samples

    @property
    def dataset(self) -> CaptionDataset:
        """All readable pictures, by index.

        Raises:
            ValueError: they are only streamed.
        """
        if self._indexed is None:
            raise ValueError('random access is needed, but the data are streamed; only the method "dmu" opens both')
        return self._indexed

    def captions(self) -> Iterator[str]:
        """Captions of all pictures."""
        if self._indexed is None:
            assert self.stream is not None
            yield from self.stream.captions()
        else:
            for index in range(len(self._indexed)):
                yield from self._indexed.captions(index)

    def _open_dataset(self) -> CaptionDataset:
        data, check_cache = self.config.data, self.config.output / "readable_train.json"
        return open_dataset(data.train, data, split=data.train_split, seed=self.config.seed, check_cache=check_cache)

    def _open_stream(self) -> CaptionStream:
        data = self.config.data
        return CaptionStream(
            open_shards(data),
            data,
            shuffle_buffer=data.shuffle_buffer,
            seed=self.config.seed,
            rank=rank(),
            world_size=world_size(),
        )

    def _count(self) -> int:
        if self._indexed is not None:
            return len(self._indexed)
        assert self.stream is not None
        counted = self.config.data.num_samples or self.stream.reader.count()
        if counted is None:
            raise ValueError(
                f"the pictures of {self.config.data.train} cannot be counted unless all are read: set data.num_samples"
            )
        return counted


def open_shards(data: DataConfig) -> ShardReader:
    """The shards of the training set.

    Raises:
        FileNotFoundError: there are no such shards.
        ValueError: the data have no shards.
    """
    if data.format == "hf":
        return stream_hf(data.train, data.train_split, data)
    if data.format not in ("auto", "shards"):
        raise ValueError(f'only shards and Hugging Face data sets can be streamed, but the format is "{data.format}"')
    return TarShards(find_shards(data.train, data.train_split), allow_pipe=data.allow_pipe)
