"""Zero-shot classification of an encoder: `python -m eval.zero_shot --model DIR --data FOLDER --dataset imagenet`.

The classifier of a class is the mean of the unit embeddings of its prompts, made unit again (Radford et al.
2021, section 3.1.4). Shapes: N pictures, C classes, P templates, D embedding dim.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.class_shards import ClassShards
from eval.encoder import load_encoder
from eval.imagenet import SETS, numbered_folders, objectnet, wnid_folders
from eval.labelled import LabelledPictures, class_folders
from eval.metrics import label_ranks, mean_per_class, share
from eval.record import emit, questions_sha256, record
from eval.tables import zero_shot_table
from eval.templates import templates
from vision_moe.command_help import CommandParser
from vision_moe.embedding_cache import CachedEncoder
from vision_moe.tracking import setup_logging

DATASETS = ("folders", *SETS, "imagenet-v2", "objectnet", "cifar10", "cifar100", "webdataset")


def open_labelled(name: str, data: Path, *, mappings: Path | None = None, split: str = "test") -> LabelledPictures:
    """Opens a data set of `DATASETS`.

    Args:
        name: of the data set.
        data: its folder.
        mappings: ObjectNet's own folder of that name.
        split: of a WebDataset folder.

    Raises:
        FileNotFoundError, ValueError: the folder does not hold that data set.
    """
    if (mappings is None) == (name == "objectnet"):
        raise ValueError("--mappings, ObjectNet's own folder of that name, goes with --dataset objectnet and no other")
    if name in SETS:
        return wnid_folders(data, SETS[name].num_classes)
    if mappings is not None:
        return objectnet(data, mappings)
    if name in ("cifar10", "cifar100"):
        # torchvision belongs to an extra, and class folders do without.
        from eval.cifar import Cifar

        return Cifar(data, int(name.removeprefix("cifar")))
    if name == "webdataset":
        return ClassShards(data, split)
    return {"folders": class_folders, "imagenet-v2": numbered_folders}[name](data)


def classifier(encoder: CachedEncoder, classes: Sequence[str], prompts: Sequence[str]) -> NDArray[np.float32]:
    """A unit vector a class, float32[C, D], from templates with "{}" for its name."""
    text = encoder.texts([template.format(name) for name in classes for template in prompts])
    class_CD = text.reshape(len(classes), len(prompts), -1).mean(axis=1)
    unit_CD: NDArray[np.float32] = class_CD / np.linalg.norm(class_CD, axis=-1, keepdims=True)
    return unit_CD


def zero_shot(
    encoder: CachedEncoder, dataset: LabelledPictures, prompts: Sequence[str], *, seed: int = 0
) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """Top-1, top-5 and mean per class accuracy.

    Args:
        encoder: the model.
        dataset: the pictures.
        prompts: templates.
        seed: of the bootstrap.

    Returns:
        {"accuracy": {"top-1": {"value", "n", "interval"}, "top-5": ..., "mean per class": ...}, "num_classes",
        "num_templates", "chance"}, top-5 only where there are more than five classes; and int64[N], how many classes
        stand before the right one.
    """
    num_classes = len(dataset.classes)
    class_CD = classifier(encoder, dataset.classes, prompts)
    ranks_N = label_ranks(encoder.images(dataset, dataset.fingerprint) @ class_CD.T, dataset.labels_N)
    ks = [k for k in (1, 5) if k < num_classes]
    accuracy = {f"top-{k}": share(int((ranks_N < k).sum()), len(ranks_N)) for k in ks}
    accuracy["mean per class"] = mean_per_class(ranks_N == 0, dataset.labels_N, seed=seed)
    result = {
        "accuracy": accuracy,
        "num_classes": num_classes,
        "num_templates": len(prompts),
        "chance": 1 / num_classes,
    }
    return result, ranks_N


def main(args: Sequence[str] | None = None) -> None:
    """Top-1, top-5 and mean per class accuracy with n and 95 % intervals."""
    options = _parser().parse_args(args)
    setup_logging()
    dataset = open_labelled(options.dataset, options.data, mappings=options.mappings, split=options.split)
    if options.templates is not None:
        prompts = templates(options.templates)
    elif isinstance(dataset, ClassShards):
        prompts = dataset.templates
    else:
        prompts = templates("photo" if options.dataset == "folders" else "openai")
    model, processor = load_encoder(options.model, options.device)
    encoder = CachedEncoder(model, processor, options.cache, batch_size=options.batch_size)
    result, ranks_N = zero_shot(encoder, dataset, prompts, seed=options.seed)
    settings = {
        "dataset": options.dataset,
        "data": str(options.data),
        "split": options.split,
        "templates": list(prompts),
        "seed": options.seed,
    }
    content = record("zero_shot", options.model, settings, result)
    questions = ([dataset.name(i), dataset.classes[label]] for i, label in enumerate(dataset.labels_N))
    content["questions_sha256"] = questions_sha256([dataset.classes, *questions])
    samples = {"rank": ranks_N, "label": dataset.labels_N}
    emit(content, zero_shot_table(result), options.output, samples)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        __doc__,
        ".venv/bin/python -m eval.zero_shot --model scenes-clip --data imagenet/val --dataset imagenet --output b.json",
    )
    parser.add_argument("--model", required=True, help="folder of a CLIPModel or CLIPMoEModel, or scenes-clip")
    parser.add_argument("--data", required=True, type=Path, help="folder of the data set")
    parser.add_argument(
        "--dataset",
        default="folders",
        choices=DATASETS,
        help="folders: a folder a class, named by it; webdataset: a folder of CLIP_benchmark's; cifar*: the folder "
        "that the python version was unpacked in; ImageNet-O is no classification: see eval.imagenet_o",
    )
    parser.add_argument("--mappings", type=Path, help="ObjectNet's folder of that name")
    parser.add_argument("--split", default="test", help="of a WebDataset folder")
    parser.add_argument(
        "--templates",
        help='photo, simple, openai, or a text file, one prompt a line with "{}" for the class; default: photo for '
        "folders, the folder's own for webdataset, openai otherwise",
    )
    parser.add_argument("--output", type=Path, help="JSON file to write, with the rank of every label beside it")
    parser.add_argument("--cache", type=Path, help="folder that keeps embeddings: a killed run goes on from it")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--device", help="default: cuda if there is one")
    return parser


if __name__ == "__main__":
    main()
