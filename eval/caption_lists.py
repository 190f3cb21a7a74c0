"""Captioned pictures in the files that COCO and Flickr30k come with, as sources for `CaptionDataset`."""

import json
from pathlib import Path
from typing import Any


class CaptionList:
    """Pictures in a folder with their captions: a `vision_moe.data.sources.Source`.

    Args:
        path: the file that lists them.
        image_dir: folder that the names are relative to.
        captions: captions by the picture's name, in the order of the pictures.

    Raises:
        FileNotFoundError: a picture is not there.
    """

    def __init__(self, path: Path, image_dir: Path, captions: dict[str, list[str]]) -> None:
        self.path = path
        self.image_dir = image_dir
        self._names = list(captions)
        self._captions = captions
        missing = [name for name in self._names if not (image_dir / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(self._names)} pictures of {path} are not in {image_dir}, first {missing[0]}; "
                "set --image-dir to the folder that these names are relative to"
            )

    def __len__(self) -> int:
        return len(self._names)

    def name(self, position: int) -> str:
        return self._names[position]

    def picture(self, position: int) -> bytes:
        return (self.image_dir / self._names[position]).read_bytes()

    def metadata(self, position: int) -> dict[str, Any]:
        return {"captions": self._captions[self._names[position]]}

    def files(self) -> list[Path]:
        return [self.path, *(self.image_dir / name for name in self._names)]


def read_json(path: Path) -> Any:
    """The file's content.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def karpathy_captions(path: Path, content: dict[str, Any], splits: tuple[str, ...]) -> dict[str, list[str]]:
    """Captions by picture of splits of Karpathy's dataset_coco.json or dataset_flickr30k.json.

    Raises:
        ValueError: no picture is of these splits, or the file has another form.
    """
    try:
        found = {
            str(Path(image.get("filepath", "")) / image["filename"]): [
                sentence["raw"] for sentence in image["sentences"]
            ]
            for image in content["images"]
            if image["split"] in splits
        }
        known = sorted({image["split"] for image in content["images"]})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path} must hold {{"images": [{{"filename", "split", "sentences": [{{"raw"}}]}}]}}, but: {error!r}'
        ) from error
    if not found:
        raise ValueError(f"{path} has no picture of split {' or '.join(splits)}; its splits are {', '.join(known)}")
    return found


def coco_captions(path: Path, content: dict[str, Any]) -> dict[str, list[str]]:
    """Captions by picture of COCO's captions_val2017.json: pictures by id, captions as they stand in the file.

    Raises:
        ValueError: the file has another form.
    """
    try:
        names = {image["id"]: image["file_name"] for image in sorted(content["images"], key=lambda image: image["id"])}
        found: dict[str, list[str]] = {name: [] for name in names.values()}
        for annotation in content["annotations"]:
            found[names[annotation["image_id"]]].append(annotation["caption"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f'{path} must hold {{"images": [{{"id", "file_name"}}], "annotations": [{{"image_id", "caption"}}]}}, '
            f"but: {error!r}"
        ) from error
    return found


def token_captions(path: Path) -> dict[str, list[str]]:
    """Captions by picture of Flickr30k's results_20130124.token: lines "NAME.jpg#0<tab>caption".

    Raises:
        ValueError: a line has another form.
    """
    found: dict[str, list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        key, tab, caption = line.partition("\t")
        name, mark, _ = key.rpartition("#")
        if not (tab and mark):
            raise ValueError(f'{path}:{number} must be "NAME.jpg#0<tab>caption", but is {line[:60]!r}')
        found.setdefault(name, []).append(caption)
    return found
