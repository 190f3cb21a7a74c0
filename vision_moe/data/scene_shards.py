"""Drawing a split of Scenes into WebDataset shards and loose files, shard by shard in a pool of processes."""

import io
import json
import multiprocessing
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from vision_moe.data.scene_cells import cells_in_words
from vision_moe.data.scene_dialogues import Captioned
from vision_moe.data.scene_factors import Only, Scene
from vision_moe.data.scene_layout import sample_scene
from vision_moe.data.scene_render import render
from vision_moe.data.scene_text import SceneText, describe

_JPEG_QUALITY = 93


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard to draw: scenes first to first + count - 1 of a split, into `folder`."""

    folder: Path
    split: str
    number: int
    first: int
    count: int
    seed: int
    image_size: int
    only: Only


def plan_shards(
    folder: Path, split: str, num: int, *, seed: int, image_size: int, shard_size: int, only: Only
) -> list[Shard]:
    """Return the shards of a split of `num` pictures; the last one may be smaller."""
    return [
        Shard(
            folder=folder,
            split=split,
            number=number,
            first=first,
            count=min(shard_size, num - first),
            seed=seed,
            image_size=image_size,
            only=only,
        )
        for number, first in enumerate(range(0, num, shard_size))
    ]


def draw_shards(shards: list[Shard], num_workers: int) -> Iterator[list[Captioned]]:
    """Draw all shards, in this process (num_workers <= 1) or several; yields them in order.

    Every picture depends on its seed, split and index alone, so the files are the same for any number of processes.
    """
    if num_workers <= 1:
        yield from map(draw_shard, shards)
        return
    # Spawned, not forked: the caller may hold threads (torch, tokenizers), which a fork would copy mid-air.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=num_workers, mp_context=context) as pool:
        yield from pool.map(draw_shard, shards)


def draw_shard(shard: Shard) -> list[Captioned]:
    """Write one shard and its loose pictures; return what the questions need."""
    images = shard.folder / "images" / shard.split
    images.mkdir(parents=True, exist_ok=True)
    pictures = []
    with tarfile.open(shard.folder / f"{shard.split}-{shard.number:04d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(shard.first, shard.first + shard.count):
            key = f"{shard.split}{index:06d}"
            scene = sample_scene(shard.seed, shard.split, index, shard.only)
            text = describe(scene)
            jpeg = _encode(scene, shard.image_size)
            (images / f"{key}.jpg").write_bytes(jpeg)
            _add(tar, f"{key}.jpg", jpeg)
            _add(tar, f"{key}.json", json.dumps(_metadata(scene, text, shard.split)).encode())
            image = f"{shard.split}/{key}.jpg"
            pictures.append(
                Captioned(
                    key=key,
                    image=image,
                    factors=scene.factors,
                    short=text.short,
                    long=text.long,
                    cells=cells_in_words(scene),
                )
            )
    return pictures


def _encode(scene: Scene, image_size: int) -> bytes:
    """Return the picture as JPEG with full color resolution: halved chroma would blur stripes of a few pixels."""
    buffer = io.BytesIO()
    render(scene, image_size).save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _metadata(scene: Scene, text: SceneText, split: str) -> dict[str, object]:
    """Return the JSON beside a picture; object coordinates are fractions of the picture side."""
    objects = [
        {name: round(v, 4) if isinstance(v, float) else v for name, v in asdict(thing).items()}
        for thing in scene.objects
    ]
    metadata: dict[str, object] = {
        "captions": text.short,
        "long": text.long,
        "factors": scene.factors.as_dict(),
        "objects": objects,
    }
    return metadata if split == "train" else {**metadata, "variants": text.variants}


def _add(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    """Add a file with no time and no owner, so that equal pictures make equal shards."""
    info = tarfile.TarInfo(name)
    info.size = len(payload)
    tar.addfile(info, io.BytesIO(payload))
