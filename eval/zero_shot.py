"""Zero-shot classification of an encoder: `python -m eval.zero_shot --model DIR --data CLASS_FOLDERS`.

The classifier of a class is the mean of the unit embeddings of its prompts, made unit again (Radford et al.
2021, section 3.1.4). Shapes: N pictures, C classes, P templates, D embedding dim.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.encoder import load_encoder
from eval.metrics import share, top_k_hits
from eval.record import emit, record
from eval.report import zero_shot_table
from vision_moe.embedding import embed_images, embed_texts
from vision_moe.tracking import setup_logging

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
TEMPLATES = ("a photo of a {}.",)


class ClassFolders:
    """Pictures in folders named after their class ("_" stands for a space), in the order of the names.

    Raises:
        ValueError: if there are fewer than two classes with pictures.
    """

    def __init__(self, folder: Path) -> None:
        folders = sorted(path for path in folder.iterdir() if path.is_dir())
        pictures = [sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES) for path in folders]
        empty = [path.name for path, files in zip(folders, pictures, strict=True) if not files]
        if empty or len(folders) < 2:
            raise ValueError(f"{folder} needs at least two class folders, each with pictures; empty: {empty[:5]}")
        self.classes = [path.name.replace("_", " ") for path in folders]
        self.files = [file for files in pictures for file in files]
        self.labels_N = np.repeat(np.arange(len(folders)), [len(files) for files in pictures])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with Image.open(self.files[index]) as image:
            return {"image": image.convert("RGB")}

    def captions(self, index: int) -> list[str]:
        """The picture's class, as its one caption."""
        return [self.classes[self.labels_N[index]]]

    def metadata(self, index: int) -> dict[str, Any]:
        """The picture's file."""
        return {"file": str(self.files[index])}


def read_templates(file: Path) -> tuple[str, ...]:
    """One template a line, each with one "{}" for the class.

    Raises:
        ValueError: if a line has not exactly one "{}", or there is none.
    """
    lines = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    wrong = [line for line in lines if line.count("{}") != 1]
    if wrong or not lines:
        raise ValueError(f'{file} must hold one template a line, each with one "{{}}"; wrong: {wrong[:3]}')
    return lines


def zero_shot(
    model: Any,
    processor: Any,
    dataset: ClassFolders,
    templates: Sequence[str] = TEMPLATES,
    *,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy.

    Returns:
        {"accuracy": {"top-1": {"value", "n", "interval"}, "top-5": ...}, "num_classes", "chance"}; top-5 only
        where there are more than five classes.
    """
    num_classes = len(dataset.classes)
    prompts = [template.format(name) for name in dataset.classes for template in templates]
    text_CPD = embed_texts(model, processor, prompts).reshape(num_classes, len(templates), -1)
    class_CD = text_CPD.mean(axis=1)
    class_CD /= np.linalg.norm(class_CD, axis=-1, keepdims=True)
    scores_NC = embed_images(model, processor, dataset, batch_size=batch_size) @ class_CD.T
    ks = [k for k in (1, 5) if k < num_classes]
    hits = {f"top-{k}": share(top_k_hits(scores_NC, dataset.labels_N, k), len(dataset)) for k in ks}
    return {"accuracy": hits, "num_classes": num_classes, "chance": 1 / num_classes}


def main(args: Sequence[str] | None = None) -> None:
    """Top-1 and top-5 accuracy with n and 95 % intervals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a CLIPModel or CLIPMoEModel, or scenes-clip")
    parser.add_argument("--data", required=True, type=Path, help="folder of folders of pictures, named by class")
    parser.add_argument("--templates", type=Path, help='text file, one prompt a line with "{}" for the class')
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", help="default: cuda if there is one")
    options = parser.parse_args(args)
    setup_logging()
    templates = read_templates(options.templates) if options.templates else TEMPLATES
    dataset = ClassFolders(options.data)
    model, processor = load_encoder(options.model, options.device)
    result = zero_shot(model, processor, dataset, templates, batch_size=options.batch_size)
    settings = {"data": str(options.data), "templates": list(templates)}
    emit(record("zero_shot", options.model, settings, result), zero_shot_table(result), options.output)


if __name__ == "__main__":
    main()
