"""Readers of COCO's and Flickr30k's files, and protocols that refuse what they are not over."""

import json

import pytest
from PIL import Image

import eval.protocols as module
from eval.protocols import PROTOCOLS, Protocol, open_retrieval
from vision_moe.data.captions import open_captions


@pytest.fixture
def pictures(tmp_path):
    """Three pictures, one of them in a folder."""
    for name in ("val2014/a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def _sentences(*texts):
    return [{"raw": text, "tokens": text.split()} for text in texts]


@pytest.fixture
def karpathy(pictures):
    content = {
        "dataset": "coco",
        "images": [
            {"filename": "a.jpg", "filepath": "val2014", "split": "test", "sentences": _sentences(*"123456")},
            {"filename": "b.jpg", "split": "test", "sentences": _sentences(*"56789")},
            {"filename": "c.jpg", "split": "train", "sentences": _sentences(*"abcde")},
        ],
    }
    file = pictures / "dataset_coco.json"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture
def small(monkeypatch):
    """Protocols of two pictures, so that tests need no more."""
    sizes = {name: protocol._replace(num_images=2) for name, protocol in PROTOCOLS.items()}
    monkeypatch.setattr(module, "PROTOCOLS", sizes)


def _open(data, protocol=None, **kwargs):
    return open_retrieval(
        data, **{"split": "test", "caption_field": "captions", "image_dir": None, "protocol": protocol, **kwargs}
    )


def test_protocols_have_the_published_sizes():
    sizes = {"coco5k": 5_000, "coco2017": 5_000, "flickr1k": 1_000, "flickr31k": 31_014, "flickr31783": 31_783}
    assert {name: protocol.num_images for name, protocol in PROTOCOLS.items()} == sizes


def test_karpathy_split_gives_its_pictures_in_order_with_all_captions(karpathy):
    dataset = _open(karpathy)
    assert [dataset.name(i) for i in range(len(dataset))] == ["val2014/a.jpg", "b.jpg"]
    assert dataset.captions(0) == list("123456")
    assert dataset[0]["image"].size == (8, 8)


def test_a_protocol_takes_the_first_five_captions(karpathy, small):
    dataset = _open(karpathy, "coco5k")
    assert [dataset.captions(i) for i in range(len(dataset))] == [list("12345"), list("56789")]


def test_another_number_of_pictures_is_refused(karpathy):
    with pytest.raises(ValueError, match=r"coco5k .* has 5,000 pictures, but .* gives 2"):
        _open(karpathy, "coco5k")


def test_another_data_set_of_the_same_form_and_size_is_refused(karpathy, small):
    with pytest.raises(ValueError, match=r"flickr1k is over flickr30k, but .* calls itself 'coco'"):
        _open(karpathy, "flickr1k")


def test_a_file_of_another_form_is_refused(karpathy, small):
    with pytest.raises(ValueError, match=r"coco2017 .* of coco's form, but .* has karpathy's"):
        _open(karpathy, "coco2017")


def test_fewer_captions_than_five_are_refused(karpathy, small):
    content = json.loads(karpathy.read_text())
    content["images"][1]["sentences"].pop()
    karpathy.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"first 5 captions .* 1 pictures .* first b\.jpg"):
        _open(karpathy, "coco5k")


def test_full_flickr_takes_all_three_splits(karpathy, monkeypatch):
    content = json.loads(karpathy.read_text())
    content["dataset"] = "flickr30k"
    karpathy.write_text(json.dumps(content))
    monkeypatch.setattr(module, "PROTOCOLS", {"flickr31k": PROTOCOLS["flickr31k"]._replace(num_images=3)})
    assert len(_open(karpathy, "flickr31k")) == 3


def test_an_unknown_split_is_refused_with_those_there_are(karpathy):
    with pytest.raises(ValueError, match="no picture of split dev; its splits are test, train"):
        _open(karpathy, split="dev")


def test_a_missing_picture_is_an_error_and_not_left_out(karpathy, tmp_path):
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 pictures .* first b\.jpg; set --image-dir"):
        _open(karpathy)


def test_a_damaged_picture_is_an_error_that_names_it(karpathy, tmp_path):
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"b\.jpg cannot be read"):
        _open(karpathy)[1]


def test_coco_annotations_keep_their_order_within_a_picture(pictures, small):
    images = [{"id": 9, "file_name": "c.jpg"}, {"id": 4, "file_name": "b.jpg"}]
    order = [(9, "x1"), (4, "y1"), (9, "x2"), *((4, f"y{i}") for i in range(2, 6)), *((9, f"x{i}") for i in (3, 4, 5))]
    annotations = [{"image_id": image, "caption": text} for image, text in order]
    file = pictures / "captions_val2017.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    dataset = _open(file, "coco2017")
    assert [dataset.name(i) for i in range(2)] == ["b.jpg", "c.jpg"]
    assert dataset.captions(1) == ["x1", "x2", "x3", "x4", "x5"]


def test_token_file_groups_captions_by_picture(pictures, small):
    file = pictures / "results_20130124.token"
    lines = [f"{name}#{i}\t{name} {i}" for name in ("c.jpg", "b.jpg") for i in range(5)]
    file.write_text("\n".join(lines) + "\n")
    dataset = _open(file, "flickr31783")
    assert [dataset.name(i) for i in range(2)] == ["c.jpg", "b.jpg"]
    assert dataset.captions(1) == [f"b.jpg {i}" for i in range(5)]


@pytest.mark.parametrize("content", [{"images": [{"filename": "a.jpg"}]}, {"images": 3}, {}])
def test_json_of_another_form_is_refused(tmp_path, content):
    file = tmp_path / "data.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must hold"):
        _open(file)


def test_a_line_without_a_tab_is_refused(tmp_path):
    file = tmp_path / "a.token"
    file.write_text("a.jpg#0\tone\nb.jpg two\n")
    with pytest.raises(ValueError, match=r"a\.token:2 must be"):
        _open(file)


def test_lists_are_read_as_in_training_and_held_to_the_number(pictures, small):
    file = pictures / "list.json"
    file.write_text(json.dumps([{"image": name, "captions": list("12345")} for name in ("b.jpg", "c.jpg")]))
    assert _open(file, "flickr1k").captions(1) == open_captions(file).captions(1)
    module.PROTOCOLS["flickr1k"] = Protocol(3, "karpathy")
    with pytest.raises(ValueError, match="gives 2"):
        _open(file, "flickr1k")
