"""ImageNet and the sets made to test what was learned on it: folders of pictures -> classes by CLIP's names.

Class names are the 1,000 that OpenAI prompts CLIP with, as open_clip has them; the order of the WordNet ids is timm's.
"""

import json
from pathlib import Path
from typing import NamedTuple

from eval.labelled import LabelledFiles, pictures, subfolders


class ImageNetSet(NamedTuple):
    """A set of folders named by WordNet id.

    Attributes:
        num_classes: folders that it has.
        source: where the sizes stand.
    """

    num_classes: int
    source: str


SETS = {
    "imagenet": ImageNetSet(1000, "Russakovsky et al. 2015"),
    "imagenet-sketch": ImageNetSet(1000, "Wang et al. 2019"),
    "imagenet-a": ImageNetSet(200, "Hendrycks et al. 2021, Natural Adversarial Examples"),
    "imagenet-r": ImageNetSet(200, "Hendrycks et al. 2021, The Many Faces of Robustness"),
}

# ObjectNet's pictures have a red border; 2 pixels are what model soups' and wise-ft's readers cut.
_OBJECTNET_BORDER = 2
_OBJECTNET_CLASSES = 113


def missing_open_clip() -> ImportError:
    """What to raise where the class names and templates are not there."""
    return ImportError('CLIP\'s class names and templates are in open_clip: pip install "vision-moe[open_clip]"')


def class_names() -> dict[str, str]:
    """Name by WordNet id of ImageNet's 1,000 classes, in the order of the classes.

    Raises:
        ImportError: open_clip or timm, which it needs, is missing.
    """
    try:
        from open_clip import IMAGENET_CLASSNAMES
        from timm.data import ImageNetInfo
    except ImportError as error:
        raise missing_open_clip() from error
    return dict(zip(ImageNetInfo("imagenet-1k").label_names(), IMAGENET_CLASSNAMES, strict=True))


def wnid_folders(folder: Path, num_classes: int) -> LabelledFiles:
    """Pictures in folders named by WordNet id ("n01440764"); classes are those that have a folder.

    Args:
        folder: the folder.
        num_classes: how many there must be.

    Raises:
        ValueError: a folder is none of ImageNet's classes, or their number is another.
    """
    names = class_names()
    folders = subfolders(folder)
    unknown = [path.name for path in folders if path.name not in names]
    if unknown or len(folders) != num_classes:
        raise ValueError(
            f"{folder} must hold {num_classes} folders named by WordNet id (as n01440764), but has {len(folders)} "
            f"folders, of which {len(unknown)} are no class of ImageNet: {unknown[:5]}. ImageNet's validation pictures "
            "come without folders: sort them first (torchvision.datasets.ImageNet does)"
        )
    return LabelledFiles(folder, [names[path.name] for path in folders], [pictures(path) for path in folders])


def same_classes(folder: Path, like: Path) -> LabelledFiles:
    """Pictures of `folder` in the classes that `like` has a folder of; both are named by WordNet id.

    Raises:
        ValueError: a class has no folder.
    """
    names = class_names()
    wnids = [path.name for path in subfolders(like)]
    missing = [wnid for wnid in wnids if not (folder / wnid).is_dir()]
    if missing:
        raise ValueError(f"{folder} has no folder {missing[0]} ({len(missing)} of {len(wnids)} classes are missing)")
    return LabelledFiles(folder, [names[wnid] for wnid in wnids], [pictures(folder / wnid) for wnid in wnids])


def numbered_folders(folder: Path) -> LabelledFiles:
    """ImageNetV2 (Recht et al. 2019): folders 0 to 999, each the number of its class.

    Raises:
        ValueError: the folders are others.
    """
    names = list(class_names().values())
    folders = {path.name: path for path in subfolders(folder)}
    missing = [str(number) for number in range(len(names)) if str(number) not in folders]
    if missing or len(folders) != len(names):
        raise ValueError(
            f"{folder} must hold the folders 0 to {len(names) - 1}, but has {len(folders)}; missing: {missing[:5]}"
        )
    return LabelledFiles(folder, names, [pictures(folders[str(number)]) for number in range(len(names))])


def objectnet(folder: Path, mappings: Path) -> LabelledFiles:
    """ObjectNet (Barbu et al. 2019): the 113 classes that ImageNet has too, by ObjectNet's own names in lower case.

    This is how CLIP_benchmark asks; Barbu et al. score a classifier over all of ImageNet's classes instead.

    Args:
        folder: of the class folders ("images").
        mappings: ObjectNet's own folder with folder_to_objectnet_label.json and objectnet_to_imagenet_1k.json.

    Raises:
        ValueError: the mappings do not name 113 classes, or a class has no folder.
    """
    label_of = json.loads((mappings / "folder_to_objectnet_label.json").read_text(encoding="utf-8"))
    shared = json.loads((mappings / "objectnet_to_imagenet_1k.json").read_text(encoding="utf-8"))
    names = sorted(name for name, label in label_of.items() if label in shared)
    if len(names) != _OBJECTNET_CLASSES or len(shared) != _OBJECTNET_CLASSES:
        raise ValueError(
            f"{mappings} must map {_OBJECTNET_CLASSES} folders to classes that ImageNet has, but maps {len(names)} "
            f"of {len(shared)}"
        )
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing:
        raise ValueError(f"{folder} has no folder {missing[0]} ({len(missing)} of {len(names)} are missing)")
    classes = [label_of[name].lower() for name in names]
    return LabelledFiles(folder, classes, [pictures(folder / name) for name in names], border=_OBJECTNET_BORDER)
