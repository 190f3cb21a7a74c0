"""eval.retrieval, eval.factors, eval.zero_shot and eval.report, each as its command, on a tiny CLIP folder."""

import hashlib
import io
import json
import tarfile

import pytest
from PIL import Image

from eval.compare import compare
from eval.encoder import load_encoder
from eval.factors import main as factors_main
from eval.imagenet import class_names
from eval.imagenet_o import main as imagenet_o_main
from eval.labelled import class_folders
from eval.report import main as report_main
from eval.retrieval import main as retrieval_main
from eval.templates import read_templates, templates
from eval.zero_shot import main as zero_shot_main
from vision_moe.files import weights_sha256

COLORS = ["red", "green", "blue", "white"]


def _add(tar, name, payload):
    info = tarfile.TarInfo(name)
    info.size = len(payload)
    tar.addfile(info, io.BytesIO(payload))


def _jpeg(color):
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    with tarfile.open(folder / "test-0000.tar", "w") as tar:
        for index, color in enumerate(COLORS):
            others = [other for other in COLORS if other != color]
            truth = f"a {color} picture of nothing"
            content = {
                "captions": [f"a {color} picture", f"{color} only"],
                "long": truth,
                "variants": {"color": [truth, *(f"a {other} picture of nothing" for other in others)]},
            }
            _add(tar, f"{index:04d}.jpg", _jpeg(color))
            _add(tar, f"{index:04d}.json", json.dumps(content).encode())
    return folder


def test_retrieval_writes_every_metric_with_its_n(model_folder, shards, tmp_path, capsys):
    output = tmp_path / "retrieval.json"
    retrieval_main(["--model", str(model_folder), "--data", str(shards), "--output", str(output)])
    written = json.loads(output.read_text())
    assert (written["result"]["num_images"], written["result"]["num_captions"]) == (4, 8)
    assert set(written["result"]["image_to_text"]) == {"R@1", "R@5", "R@10"}
    assert written["model"]["weights_sha256"] == weights_sha256(model_folder)
    assert "| image to text |" in capsys.readouterr().out
    assert written["result"]["image_to_text_interval"]["R@1"][0] <= written["result"]["image_to_text"]["R@1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["retrieval.json", "retrieval.samples.safetensors"]


def test_retrieval_from_the_cache_equals_the_first_run(model_folder, shards, tmp_path, monkeypatch):
    flags = ["--model", str(model_folder), "--data", str(shards), "--cache", str(tmp_path / "cache")]
    retrieval_main([*flags, "--output", str(tmp_path / "first.json")])
    monkeypatch.setattr("vision_moe.embedding_cache.embed_images", None)
    monkeypatch.setattr("vision_moe.embedding_cache.embed_texts", None)
    retrieval_main([*flags, "--output", str(tmp_path / "second.json")])
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second"))
    assert first["result"] == second["result"]


def test_retrieval_with_long_captions_has_one_a_picture(model_folder, shards, tmp_path):
    output = tmp_path / "long.json"
    flags = ["--model", str(model_folder), "--data", str(shards), "--output", str(output)]
    retrieval_main([*flags, "--caption-field", "long"])
    assert json.loads(output.read_text())["result"]["num_captions"] == 4


def test_factors_writes_accuracy_chance_and_n(model_folder, shards, tmp_path):
    output = tmp_path / "factors.json"
    factors_main(["--model", str(model_folder), "--data", str(shards), "--output", str(output)])
    entry = json.loads(output.read_text())["result"]["color"]
    assert entry["n"] == 4
    assert entry["chance"] == pytest.approx(1 / 4)


def test_zero_shot_reads_class_folders_and_templates(model_folder, tmp_path):
    for color in COLORS:
        (tmp_path / "data" / color).mkdir(parents=True)
        (tmp_path / "data" / color / "0.jpg").write_bytes(_jpeg(color))
    templates = tmp_path / "templates.txt"
    templates.write_text("a {} picture\n\n{} only\n")
    output = tmp_path / "zero_shot.json"
    flags = ["--model", str(model_folder), "--data", str(tmp_path / "data"), "--output", str(output)]
    zero_shot_main([*flags, "--templates", str(templates)])
    written = json.loads(output.read_text())
    assert written["result"]["accuracy"]["top-1"]["n"] == 4
    assert written["result"]["chance"] == pytest.approx(1 / 4)
    assert "top-5" not in written["result"]["accuracy"]
    assert written["result"]["accuracy"]["mean per class"]["n"] == 4
    assert written["settings"]["templates"] == ["a {} picture", "{} only"]


def test_zero_shot_takes_the_templates_of_class_shards(model_folder, tmp_path):
    (tmp_path / "data" / "test").mkdir(parents=True)
    (tmp_path / "data" / "classnames.txt").write_text("\n".join(COLORS))
    (tmp_path / "data" / "zeroshot_classification_templates.txt").write_text("a {c} picture\n")
    with tarfile.open(tmp_path / "data" / "test" / "0.tar", "w") as tar:
        for index, color in enumerate(COLORS):
            _add(tar, f"s{index}.jpg", _jpeg(color))
            _add(tar, f"s{index}.cls", str(index).encode())
    output = tmp_path / "zero_shot.json"
    flags = ["--model", str(model_folder), "--data", str(tmp_path / "data"), "--output", str(output)]
    zero_shot_main([*flags, "--dataset", "webdataset"])
    written = json.loads(output.read_text())
    assert written["settings"]["templates"] == ["a {} picture"]
    assert written["result"]["accuracy"]["top-1"]["n"] == 4


def test_imagenet_o_measures_two_hundred_classes_of_both_folders(model_folder, tmp_path):
    wnids = list(class_names())[::5]
    for number, wnid in enumerate(wnids):
        for folder in ("o", "val"):
            (tmp_path / folder / wnid).mkdir(parents=True)
            (tmp_path / folder / wnid / "0.jpg").write_bytes(_jpeg((number, 100, 0 if folder == "o" else 200)))
    (tmp_path / "val" / "n01443537").mkdir()
    (tmp_path / "templates.txt").write_text("{}\n")
    output = tmp_path / "o.json"
    flags = ["--model", str(model_folder), "--data", str(tmp_path / "o"), "--output", str(output)]
    in_distribution = ["--in-distribution", str(tmp_path / "val"), "--templates", str(tmp_path / "templates.txt")]
    imagenet_o_main([*flags, *in_distribution])
    result = json.loads(output.read_text())["result"]
    assert (result["aupr"]["n"], result["aupr"]["num_positive"], result["chance"]) == (400, 200, 0.5)
    low, high = result["aupr"]["interval"]
    assert 0 < low < result["aupr"]["value"] < high < 1


def test_a_model_compared_with_itself_differs_by_nothing(model_folder, shards, tmp_path):
    for name in ("a", "b"):
        output = tmp_path / f"{name}.json"
        retrieval_main(["--model", str(model_folder), "--data", str(shards), "--output", str(output)])
    found = compare(tmp_path / "a.json", tmp_path / "b.json")
    assert found["different_settings"] == []
    assert {tuple(entry["interval"]) for entry in found["differences"].values()} == {(0.0, 0.0)}
    written = json.loads((tmp_path / "a.json").read_text())["result"]
    assert found["differences"]["mean R@1"]["a"] == pytest.approx(written["mean_R@1"])
    assert found["differences"]["text to image R@5"]["b"] == pytest.approx(written["text_to_image"]["R@5"])


def test_zero_shot_refuses_a_class_without_pictures(tmp_path):
    for color in COLORS:
        (tmp_path / color).mkdir()
    with pytest.raises(ValueError, match="empty"):
        class_folders(tmp_path)


def test_templates_without_a_place_for_the_class_are_refused(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a photo\n")
    with pytest.raises(ValueError, match="a photo"):
        read_templates(file)


def test_openai_templates_are_eighty_with_one_place_each():
    found = templates("openai")
    assert len(found) == len(set(found)) == 80
    assert {"a photo of a {}.", "itap of my {}."} <= set(found)
    assert all(template.count("{}") == 1 for template in (*found, *templates("simple")))


def test_unknown_templates_are_refused():
    with pytest.raises(FileNotFoundError, match="photo, simple, openai or a text file"):
        templates("no such file")


def test_report_shows_a_table_of_each_record_in_a_folder(model_folder, shards, tmp_path, capsys):
    for name, command in (("retrieval", retrieval_main), ("factors", factors_main)):
        output = tmp_path / f"{name}.json"
        command(["--model", str(model_folder), "--data", str(shards), "--output", str(output)])
    capsys.readouterr()
    report_main([str(tmp_path)])
    shown = capsys.readouterr().out
    assert "## Retrieval" in shown
    assert "no protocol" in shown
    assert "| color |" in shown


def test_report_without_a_record_exits_non_zero(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit, match="no record"):
        report_main([str(tmp_path)])


def test_a_vision_tower_alone_is_refused(model_folder, tmp_path):
    model, _ = load_encoder(str(model_folder))
    model.vision_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dual encoder"):
        load_encoder(str(tmp_path))


def test_the_fingerprint_is_the_hash_of_the_weights(model_folder):
    expected = hashlib.sha256((model_folder / "model.safetensors").read_bytes()).hexdigest()
    assert weights_sha256(model_folder) == expected
