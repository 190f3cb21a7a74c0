"""Hugging Face datasets with a column of pictures: by position, and shard by shard.

The library decodes pictures itself; it is told not to, so that all data sets have the same treatment (see `picture`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vision_moe.data.read_config import ReadConfig
from vision_moe.data.samples import RawSample

# Rows fetched at once while streaming; the reader holds so many encoded pictures beside the shuffle buffer.
_ROWS = 16


class HFSource:
    """A `datasets.Dataset`, by position.

    Args:
        dataset: the data set, one split.
        image_field: column of the pictures.

    Raises:
        ValueError: there is no such column.
    """

    def __init__(self, dataset: Any, image_field: str) -> None:
        _check_column(dataset, image_field)
        self.image_field = image_field
        self._dataset = _undecoded(dataset, image_field)
        self._captions = self._dataset.remove_columns(image_field)

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, position: int) -> str:
        return f"row {position}"

    def picture(self, position: int) -> bytes:
        encoded = _encoded(self._dataset[position][self.image_field])
        if encoded is None:
            raise FileNotFoundError(f"{self.name(position)} has no picture in {self.image_field!r}")
        return encoded

    def metadata(self, position: int) -> dict[str, Any]:
        return dict(self._captions[position])

    def files(self) -> list[Path]:
        return [Path(file["filename"]) for file in self._dataset.cache_files]


class HFShards:
    """A streamed `datasets.IterableDataset`, shard by shard; a shard is a file of the data set.

    Args:
        dataset: the data set, one split.
        image_field: column of the pictures.
        name: of the data set, for messages.

    Attributes:
        shards: names of the shards.

    Raises:
        ValueError: there is no such column.
    """

    def __init__(self, dataset: Any, image_field: str, name: str) -> None:
        _check_column(dataset, image_field)
        self.image_field = image_field
        self._dataset = _undecoded(dataset, image_field)
        self.shards = [f"{name}, file {number}" for number in range(self._dataset.num_shards)]

    def read(self, shard: int, start: int = 0) -> Iterator[RawSample]:
        """Samples of a shard from number `start` on.

        Raises:
            OSError: reading failed, on whatever it failed.
        """
        part = self._dataset.shard(num_shards=len(self.shards), index=shard).skip(start)
        number = start
        try:
            # Not `for row in part`: in a worker process that deals the rows out among the workers a second time.
            for rows in part.iter(batch_size=_ROWS):
                pictures = rows.pop(self.image_field)
                for place, picture in enumerate(pictures):
                    metadata = {column: values[place] for column, values in rows.items()}
                    yield RawSample(f"{self.shards[shard]}/row {number}", _encoded(picture), metadata)
                    number += 1
        except (ValueError, RuntimeError) as error:
            # pyarrow's errors, and those of `datasets` around them.
            raise OSError(f"{type(error).__name__}: {error}") from error

    def count(self) -> int | None:
        """Number of pictures, where the data set states it."""
        splits = self._dataset.info.splits or {}
        found = splits.get(str(self._dataset.split))
        return None if found is None or not found.num_examples else int(found.num_examples)


def open_hf(path: str, split: str, config: ReadConfig) -> HFSource:
    """A data set by name or folder; folders that `save_to_disk` wrote are read where they lie.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: there is no such split or picture column.
    """
    datasets = _library()
    if (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
        found = datasets.load_from_disk(path)
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise ValueError(f"no split {split!r} in {path}; there are: {sorted(found)}")
            found = found[split]
        return HFSource(found, config.image_field)
    return HFSource(datasets.load_dataset(path, config.subset, split=split), config.image_field)


def stream_hf(path: str, split: str, config: ReadConfig) -> HFShards:
    """The same, streamed: nothing is written to the cache.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: there is no such split or picture column, or it was written by `save_to_disk`.
    """
    if (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
        raise ValueError(f"{path} was written by save_to_disk, which lies on local disk: read it without streaming")
    found = _library().load_dataset(path, config.subset, split=split, streaming=True)
    return HFShards(found, config.image_field, f"{path} {split}")


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError('format "hf" needs the package datasets: pip install "vision-moe[data]"') from error
    return datasets


def _check_column(dataset: Any, image_field: str) -> None:
    names = dataset.column_names
    if names is not None and image_field not in names:
        raise ValueError(
            f"no column {image_field!r}; there are {sorted(names)}. Name the column of the pictures by image_field; "
            "where there are only their URLs, fetch them with img2dataset first"
        )


def _undecoded(dataset: Any, image_field: str) -> Any:
    image = _library().Image
    if dataset.features is not None and isinstance(dataset.features[image_field], image):
        return dataset.cast_column(image_field, image(decode=False))
    return dataset


def _encoded(value: Any) -> bytes | None:
    """Bytes of a cell: a struct of bytes and path, as `datasets.Image` is stored, or plain bytes."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return Path(value["path"]).read_bytes()
        value = value.get("bytes")
    if value is not None and not isinstance(value, bytes):
        raise ValueError(f"a picture column must hold encoded pictures, but got {type(value).__name__}: {value!r:.80}")
    return value
