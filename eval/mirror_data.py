"""Data of a local mirror: rows to parquet, and where in a folder the data of a split is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from PIL import Image, UnidentifiedImageError

from eval.published_forms import FORMS
from vision_moe.files import replacing

# Questions that are written together; few where they hold pictures.
_GROUP = {False: 10_000, True: 100}
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}


def write_rows(
    rows: Sequence[dict[str, Any]], features: Features, images: Path, path: Path, *, embed: bool = False
) -> int:
    """Writes questions as parquet.

    Args:
        rows: the questions; "image" is a name in `images`.
        features: their columns.
        images: folder of pictures.
        path: file to write.
        embed: put the pictures into the file, for each question anew, instead of their absolute paths.

    Returns:
        Number of questions.

    Raises:
        FileNotFoundError: pictures are not there.
        ValueError: there is no question, or a file is no picture.
    """
    if not rows:
        raise ValueError("the files hold no question")
    _check_pictures(sorted({row["image"] for row in rows}), images)
    folder = images.resolve()

    def cell(name: str) -> dict[str, Any]:
        file = folder / name
        return {"bytes": file.read_bytes(), "path": name} if embed else {"bytes": None, "path": str(file)}

    schema = features.arrow_schema
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for start in range(0, len(rows), _GROUP[embed]):
            group = [{**row, "image": cell(row["image"])} for row in rows[start : start + _GROUP[embed]]]
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
    return len(rows)


def _check_pictures(names: Sequence[str], images: Path) -> None:
    missing = [name for name in names if not (images / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} pictures are not in {images}, first {missing[0]}; set --images to the "
            "folder that these names are relative to"
        )
    for name in names:
        try:
            # Reads the head of the file only.
            Image.open(images / name).close()
        except UnidentifiedImageError as error:
            raise ValueError(f"{images / name} is no picture") from error


def find_data(data: Path, split: str, subset: str | None) -> dict[str, Any]:
    """Data of a split, as fields of a task's YAML file.

    Args:
        data: a parquet or arrow file, which is the split; a folder that `save_to_disk` wrote; or a folder with parquet
            files named as on the Hub, "test-00000-of-00002.parquet" or "test.parquet", at any depth.
        split: its name.
        subset: of the data set; narrows a folder that has a folder of this name.

    Returns:
        {"dataset_path", "dataset_kwargs"}.

    Raises:
        FileNotFoundError: there is nothing of this split.
        ValueError: the file is of another kind.
    """
    if data.is_file():
        if data.suffix not in _BUILDERS:
            raise ValueError(f"{data} must be a .parquet or .arrow file, or a folder")
        return _files(_BUILDERS[data.suffix], split, [data])
    if (data / "dataset_dict.json").is_file():
        if not (data / split).is_dir():
            raise FileNotFoundError(f"no split {split!r} in {data}, which `save_to_disk` wrote")
        return {"dataset_path": str(data), "dataset_kwargs": {"load_from_disk": True}}
    if (data / "state.json").is_file():
        raise ValueError(f"{data} holds one split without its name; save a DatasetDict with the split {split!r}")
    root = data / subset if subset and (data / subset).is_dir() else data
    for suffix, builder in _BUILDERS.items():
        found = sorted(file for pattern in (f"{split}{suffix}", f"{split}-*{suffix}") for file in root.rglob(pattern))
        if found:
            return _files(builder, split, found)
    there = sorted(file.name for suffix in _BUILDERS for file in root.rglob(f"*{suffix}"))
    raise FileNotFoundError(
        f"no {split}.parquet or {split}-*.parquet in {root}; there is {there[:5] or 'no such file'}"
    )


def join_gqa(data: Path, output: Path) -> Path:
    """Puts the questions and the pictures of GQA's Hub data together, the pictures as files.

    Args:
        data: folder with the folders `testdev_balanced_instructions` and `testdev_balanced_images` of parquet files.
        output: folder to write.

    Returns:
        The parquet file of questions.

    Raises:
        FileNotFoundError: `data` is no such folder.
    """
    parts = []
    for part in ("instructions", "images"):
        files = sorted((data / f"testdev_balanced_{part}").glob("*.parquet"))
        if not files:
            raise FileNotFoundError(f"no parquet files in {data / f'testdev_balanced_{part}'}")
        parts.append(files)
    for file in parts[1]:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=100, columns=["id", "image"]):
            for row in batch.to_pylist():
                with replacing(output / "images" / f"{row['id']}.jpg") as temporary:
                    temporary.write_bytes(row["image"]["bytes"])
    table = pa.concat_tables([pq.read_table(file) for file in parts[0]])
    columns = [name for name in ("id", "imageId", "question", "answer", "fullAnswer") if name in table.column_names]
    rows = [{**row, "image": f"{row['imageId']}.jpg"} for row in table.select(columns).to_pylist()]
    write_rows(rows, FORMS["gqa"].features, output / "images", output / "questions.parquet")
    return output / "questions.parquet"


def _files(builder: str, split: str, files: Sequence[Path]) -> dict[str, Any]:
    return {"dataset_path": builder, "dataset_kwargs": {"data_files": {split: [str(file) for file in files]}}}
