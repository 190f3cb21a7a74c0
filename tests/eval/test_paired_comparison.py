"""eval.compare on records whose differences are worked by hand, and its refusals."""

import json

import numpy as np
import pytest

from eval.compare import compare, main
from eval.imagenet_o import detection
from eval.record import emit, questions_sha256
from eval.zero_shot import zero_shot


@pytest.fixture
def write(tmp_path):
    """Writes the record of a model."""

    def run(name, benchmark, samples, questions=("q",), **settings):
        content = {
            "benchmark": benchmark,
            "model": {"path": name},
            "settings": {"data": f"/{name}", "seed": 0, **settings},
            "questions_sha256": questions_sha256(questions),
        }
        output = tmp_path / f"{name}.json"
        emit(content, "", output, {key: np.array(values) for key, values in samples.items()})
        return output

    return run


@pytest.fixture
def retrieval_pair(write):
    # Three pictures with 2, 1 and 1 captions.
    shared = {"image_of_text": [0, 0, 1, 2]}
    a = {"image_to_text_rank": [0, 3, 0], "text_to_image_rank": [0, 1, 2, 0], **shared}
    b = {"image_to_text_rank": [0, 0, 5], "text_to_image_rank": [0, 0, 0, 1], **shared}
    return write("a", "retrieval", a), write("b", "retrieval", b)


def test_retrieval_differences_are_those_worked_by_hand(retrieval_pair):
    found = compare(*retrieval_pair)["differences"]
    one = found["image to text R@1"]
    assert (one["a"], one["b"], one["n"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3), 3)
    assert one["value"] == pytest.approx(0)
    # Each is right alone once.
    assert one["mcnemar"] == {"only_a": 1, "only_b": 1, "p": 1.0}
    captions = found["text to image R@1"]
    assert (captions["a"], captions["b"], captions["n"]) == (0.5, 0.75, 4)
    assert captions["value"] == pytest.approx(0.25)
    assert "mcnemar" not in captions
    assert found["image to text R@5"]["value"] == pytest.approx(-1 / 3)
    assert found["mean R@1"]["value"] == pytest.approx(0.125)


def test_models_that_agree_differ_by_nothing_with_certainty(write):
    samples = {"rank": [0, 1, 0, 7], "label": [0, 1, 2, 3]}
    found = compare(write("a", "zero_shot", samples), write("b", "zero_shot", samples))["differences"]["top-1"]
    assert (found["value"], found["interval"]) == (0.0, [0.0, 0.0])
    assert found["mcnemar"]["p"] == 1.0


def test_pairing_sees_what_two_intervals_do_not(write):
    # B is right wherever A is, and on 10 of 1,000 samples more.
    label = np.arange(1000) % 10
    a = np.where(np.arange(1000) < 500, 0, 9)
    b = np.where(np.arange(1000) < 510, 0, 9)
    files = write("a", "zero_shot", {"rank": a, "label": label}), write("b", "zero_shot", {"rank": b, "label": label})
    found = compare(*files)["differences"]["top-1"]
    assert found["value"] == pytest.approx(0.01)
    low, high = found["interval"]
    # 1.96 * sqrt(0.01 * 0.99 / 1000) = 0.0062; two independent samples would give 1.96 * sqrt(2 * 0.25 / 1000) = 0.044.
    assert low == pytest.approx(0.01 - 0.0062, abs=0.002)
    assert high == pytest.approx(0.01 + 0.0062, abs=0.002)
    # Ten of ten for B: 2 / 2^10.
    assert found["mcnemar"]["p"] == pytest.approx(2 / 1024)


def test_records_over_other_samples_are_refused(write):
    samples = {"rank": [0, 1], "label": [0, 1]}
    files = write("a", "zero_shot", samples), write("b", "zero_shot", samples, questions=("other",))
    with pytest.raises(ValueError, match="other pictures, captions or classes"):
        compare(*files)


def test_records_of_two_benchmarks_are_refused(write, retrieval_pair):
    other = write("c", "zero_shot", {"rank": [0], "label": [0]})
    with pytest.raises(ValueError, match="two records of one of retrieval, zero_shot"):
        compare(retrieval_pair[0], other)


def test_samples_of_another_run_are_refused(retrieval_pair, tmp_path):
    (tmp_path / "a.samples.safetensors").write_bytes((tmp_path / "b.samples.safetensors").read_bytes())
    with pytest.raises(ValueError, match="is not the one that"):
        compare(*retrieval_pair)


def test_a_record_without_samples_is_refused(retrieval_pair, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"benchmark": "factors"}))
    with pytest.raises(ValueError, match="names no samples"):
        compare(retrieval_pair[0], tmp_path / "c.json")


def test_the_command_shows_and_writes_the_differences(write, tmp_path, capsys):
    samples = {"rank": [0, 1, 0], "label": [0, 1, 2]}
    a = write("a", "zero_shot", samples, templates=["{}"])
    b = write("b", "zero_shot", samples, templates=["a {}"])
    main([str(a), str(b), "--output", str(tmp_path / "difference.json")])
    assert json.loads((tmp_path / "difference.json").read_text()) == compare(a, b)
    shown = capsys.readouterr().out
    assert "| top-1 | 66.7 | 66.7 | +0.0 [+0.0, +0.0] | 1 | 3 |" in shown
    assert "differ in templates as well" in shown


class Angles:
    """An encoder whose embeddings are unit vectors at known degrees."""

    def __init__(self, degrees):
        self.degrees = degrees

    def images(self, dataset, fingerprint):
        return self._unit(dataset.degrees)

    def texts(self, texts):
        return self._unit([self.degrees[text] for text in texts])

    @staticmethod
    def _unit(degrees):
        radians = np.deg2rad(degrees)
        return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


class Pictures:
    fingerprint = ""

    def __init__(self, degrees, labels=()):
        self.degrees = degrees
        self.labels_N = np.array(labels, dtype=np.int64)
        self.classes = ["x", "y"]

    def __len__(self):
        return len(self.degrees)


def test_zero_shot_takes_the_mean_of_the_unit_prompts():
    # x: prompts at 0 and 60, so the class is at 30; y: 90 and 90. Pictures at 55 and 65 lie on either side of 60.
    encoder = Angles({"a x": 0, "b x": 60, "a y": 90, "b y": 90})
    result, ranks = zero_shot(encoder, Pictures([55, 65, 65], [0, 0, 1]), ["a {}", "b {}"])
    assert ranks.tolist() == [0, 1, 0]
    assert result["accuracy"]["top-1"]["value"] == pytest.approx(2 / 3)
    assert result["accuracy"]["mean per class"]["value"] == pytest.approx((1 / 2 + 1) / 2)
    assert (result["num_templates"], result["chance"]) == (2, 0.5)


def test_detection_ranks_pictures_by_the_models_doubt():
    # Classes at 0 and 90: the picture at 45 is the most doubtful, then 30, then 0.
    encoder = Angles({"x": 0, "y": 90})
    outside, inside = Pictures([45, 0], [0, 0]), Pictures([30, 0], [0, 0])
    result = detection(encoder, outside, inside, ["{}"], logit_scale=10.0)
    # Doubt falls: 45 (outside), 30 (inside), then 0 twice, a tie of one of either kind: 1/2 * 1 + 1/2 * 2/4.
    assert result["aupr"]["value"] == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 4)
    assert result["chance"] == 0.5
    # At 45 both classes are equal: a tie is no hit.
    assert result["taken_for_folder"]["value"] == 0.5
