"""ImageNet's relatives, CIFAR, ObjectNet and CLIP_benchmark's shards: which picture gets which class."""

import hashlib
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from eval.cifar import Cifar
from eval.class_shards import ClassShards
from eval.imagenet import class_names, numbered_folders, objectnet, same_classes, wnid_folders
from eval.labelled import class_folders
from eval.zero_shot import open_labelled


def _picture(path, color=(0, 0, 0), size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_class_names_are_openais_in_the_order_of_the_wordnet_ids():
    names = class_names()
    wnids = list(names)
    assert len(names) == 1000
    assert wnids == sorted(wnids)
    assert names["n01440764"] == "tench"
    # OpenAI's names part the two cranes that WordNet calls alike.
    assert names["n02012849"] != names["n03126707"]
    assert wnids.index("n15075141") == 999
    assert names["n15075141"] == "toilet paper"


def test_a_subset_of_wordnet_folders_is_classified_among_itself(tmp_path):
    for wnid in ("n15075141", "n01440764"):
        _picture(tmp_path / wnid / "x.JPEG")
    dataset = wnid_folders(tmp_path, 2)
    assert dataset.classes == ["tench", "toilet paper"]
    assert [(dataset.name(i), int(dataset.labels_N[i])) for i in range(2)] == [
        ("n01440764/x.JPEG", 0),
        ("n15075141/x.JPEG", 1),
    ]


@pytest.mark.parametrize("name", ["imagenet", "imagenet-a", "imagenet-r", "imagenet-sketch"])
def test_another_number_of_folders_is_refused(tmp_path, name):
    _picture(tmp_path / "n01440764" / "x.JPEG")
    with pytest.raises(ValueError, match="but has 1 folders, of which 0 are no class"):
        open_labelled(name, tmp_path)


def test_a_folder_that_is_no_class_is_refused(tmp_path):
    _picture(tmp_path / "n00000000" / "x.JPEG")
    with pytest.raises(ValueError, match="no class of ImageNet: \\['n00000000'\\]"):
        wnid_folders(tmp_path, 1)


def test_pictures_of_the_same_classes_leave_the_others_out(tmp_path):
    for wnid in ("n01440764", "n01443537", "n15075141"):
        _picture(tmp_path / "val" / wnid / "x.JPEG")
    for wnid in ("n01440764", "n15075141"):
        _picture(tmp_path / "o" / wnid / "y.JPEG")
    dataset = same_classes(tmp_path / "val", tmp_path / "o")
    assert [dataset.name(i) for i in range(len(dataset))] == ["n01440764/x.JPEG", "n15075141/x.JPEG"]
    with pytest.raises(ValueError, match="no folder n01443537"):
        same_classes(tmp_path / "o", tmp_path / "val")


def test_numbered_folders_are_numbers_and_not_names(tmp_path):
    for number in range(1000):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "x.jpeg").write_bytes(b"")
    dataset = numbered_folders(tmp_path)
    assert dataset.name(2) == "2/x.jpeg"
    assert dataset.labels_N[2] == 2
    assert dataset.classes == list(class_names().values())
    (tmp_path / "7" / "x.jpeg").unlink()
    (tmp_path / "7").rmdir()
    with pytest.raises(ValueError, match=r"missing: \['7'\]"):
        numbered_folders(tmp_path)


@pytest.fixture
def mappings(tmp_path):
    """114 folders, of which 113 have a class that ImageNet has."""
    folder = tmp_path / "mappings"
    folder.mkdir()
    labels = {f"folder_{i:03d}": f"Label {i:03d}" for i in range(114)}
    (folder / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    shared = {label: "something" for label in labels.values() if label != "Label 005"}
    (folder / "objectnet_to_imagenet_1k.json").write_text(json.dumps(shared))
    return folder


def test_objectnet_takes_the_shared_classes_and_cuts_the_border(tmp_path, mappings):
    for number in range(114):
        pixels = np.zeros((8, 8, 3), dtype=np.uint8)
        pixels[2:-2, 2:-2] = 255
        (tmp_path / "images" / f"folder_{number:03d}").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"folder_{number:03d}" / "x.png")
    dataset = open_labelled("objectnet", tmp_path / "images", mappings=mappings)
    assert len(dataset) == 113
    assert dataset.classes[4:6] == ["label 004", "label 006"]
    assert np.asarray(dataset[0]["image"]).tolist() == np.full((4, 4, 3), 255).tolist()


def test_objectnet_needs_its_mappings_and_nothing_else_takes_them(tmp_path, mappings):
    with pytest.raises(ValueError, match="--mappings"):
        open_labelled("objectnet", tmp_path)
    with pytest.raises(ValueError, match="--mappings"):
        open_labelled("folders", tmp_path, mappings=mappings)
    with pytest.raises(ValueError, match="no folder folder_000"):
        objectnet(tmp_path, mappings)


def test_cifar_is_read_where_its_md5_is_right_and_refused_otherwise(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.zeros((2, 3, 32, 32), dtype=np.uint8)
    pixels[1, 2] = 255
    batch = pickle.dumps({"data": pixels.reshape(2, -1), "labels": [3, 0]})
    meta = pickle.dumps({"label_names": ["an_airplane", "car", "bird", "cat"]})
    (folder / "test_batch").write_bytes(batch)
    (folder / "batches.meta").write_bytes(meta)
    with pytest.raises(FileNotFoundError, match="no whole cifar-10-batches-py"):
        Cifar(tmp_path, 10)
    monkeypatch.setattr(CIFAR10, "train_list", [])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", hashlib.md5(batch).hexdigest()]])
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": hashlib.md5(meta).hexdigest()}
    )
    dataset = open_labelled("cifar10", tmp_path)
    assert dataset.labels_N.tolist() == [3, 0]
    assert dataset.classes == ["an airplane", "car", "bird", "cat"]
    assert dataset[1]["image"].getpixel((5, 5)) == (0, 0, 255)


def _shard(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, payload in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))


def _webp(color):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(stream, "WEBP", lossless=True)
    return stream.getvalue()


@pytest.fixture
def class_shards(tmp_path):
    (tmp_path / "classnames.txt").write_text("red thing\nblue thing\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n{c}\n")
    first = {"s0000000.webp": _webp("blue"), "s0000000.cls": b"1", "s0000001.webp": _webp("red"), "s0000001.cls": b"0"}
    _shard(tmp_path / "test" / "0.tar", first)
    _shard(tmp_path / "test" / "1.tar", {"s0000002.webp": _webp("blue"), "s0000002.cls": b"1"})
    (tmp_path / "test" / "nshards.txt").write_text("2\n")
    return tmp_path


def test_class_shards_give_pictures_labels_and_templates(class_shards):
    dataset = ClassShards(class_shards)
    assert dataset.labels_N.tolist() == [1, 0, 1]
    assert dataset.classes == ["red thing", "blue thing"]
    assert dataset.templates == ("a photo of a {}.", "{}")
    assert [dataset[i]["image"].getpixel((0, 0)) for i in range(3)] == [(0, 0, 255), (255, 0, 0), (0, 0, 255)]
    assert dataset.name(2) == "1.tar/s0000002"


def test_a_shard_that_was_not_downloaded_is_an_error(class_shards):
    (class_shards / "test" / "1.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"has 1 \*.tar files, but nshards.txt says 2"):
        ClassShards(class_shards)


@pytest.mark.parametrize("label", [b"2", b"-1", b"red"])
def test_a_label_that_is_no_class_is_refused(class_shards, label):
    _shard(class_shards / "test" / "1.tar", {"s0000002.webp": _webp("blue"), "s0000002.cls": label})
    with pytest.raises(ValueError, match=r"s0000002.cls must hold a class in \[0, 2\)"):
        ClassShards(class_shards)


def test_an_empty_class_name_is_refused_and_not_skipped(class_shards):
    (class_shards / "classnames.txt").write_text("red\n\nblue\n")
    with pytest.raises(ValueError, match="line 2 is empty"):
        ClassShards(class_shards)


def test_a_damaged_picture_is_an_error_that_names_it(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"x\.jpg cannot be read"):
        class_folders(tmp_path)[0]


def test_the_fingerprint_changes_with_a_file(tmp_path):
    for name in ("a", "b"):
        _picture(tmp_path / name / "x.png")
    before = class_folders(tmp_path).fingerprint
    assert class_folders(tmp_path).fingerprint == before
    _picture(tmp_path / "b" / "x.png", color=(9, 9, 9), size=(5, 5))
    assert class_folders(tmp_path).fingerprint != before
