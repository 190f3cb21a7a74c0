"""eval.experiment: the learning rate is chosen by the selecting measure, differences are paired, experts are joined."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModel

from eval.arm_scores import Encoders, Hits, MeasureConfig, any_of, load_all, measure, soup
from eval.arms import ArmConfig, ArmRun
from eval.experiment import ExperimentConfig, run
from eval.experiment_report import trained_rows
from vision_moe.config import parse
from vision_moe.data.captions import open_captions
from vision_moe.data.scenes import ScenesArguments, generate
from vision_moe.factors import factor_accuracy
from vision_moe.retrieval import retrieval

EXPERIMENTS = sorted((Path(__file__).parents[2] / "eval" / "experiments").glob("*.yaml"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment") / "scenes"
    generate(folder, ScenesArguments(num=64, num_test=12))
    return folder


def arm(stage, rates, **fields):
    flags = ["--smoke", "--model", "scenes-clip", "--methods", f"[{stage}]"]
    return ArmConfig(flags=flags, result=stage, learning_rate="mcl.learning_rate", learning_rates=rates, **fields)


def config(scenes, output, arms, **fields):
    measures = {"asked": MeasureConfig(kind="retrieval", data=scenes)}
    return ExperimentConfig(
        recipe=Path("vision_moe/recipes/scenes.yaml"),
        train=scenes,
        output=output,
        arms=arms,
        baseline=next(iter(arms)),
        measures=measures,
        select="asked",
        **fields,
    )


def finished(output, run, hits):
    """A run that has ended and been measured."""
    folder = run.folder(output)
    (folder / run.arm.result).mkdir(parents=True)
    (folder / run.arm.result / "stage.json").write_text("{}")
    (folder / "hits").mkdir()
    array = np.array([hits, hits], dtype=np.float64)
    save_file({"hits": array, "questions": np.ones_like(array)}, folder / "hits" / "result-asked.safetensors")


@pytest.mark.parametrize("recipe", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_is_read(recipe, tmp_path):
    read = parse(ExperimentConfig, [str(recipe), "--train", "train", "--output", str(tmp_path)])
    assert read.recipe.is_file()
    assert read.baseline in read.arms


def test_best_rate_is_run_on_every_seed_and_differences_are_paired(tmp_path):
    arms = {"direct": arm("direct", [1e-3]), "dmu": arm("dmu", [1e-4, 1e-3, 1e-2])}
    for rate, hits in ((1e-4, [1, 0, 0, 0]), (1e-3, [1, 1, 1, 0]), (1e-2, [0, 0, 0, 0])):
        finished(tmp_path, ArmRun("dmu", arms["dmu"], rate, 0), hits)
    # Had another rate been chosen, its run on seed 1 would be missing.
    finished(tmp_path, ArmRun("dmu", arms["dmu"], 1e-3, 1), [1, 1, 0, 0])
    for seed in (0, 1):
        finished(tmp_path, ArmRun("direct", arms["direct"], 1e-3, seed), [1, 0, 0, 0])
    results = run(config(Path("unread"), tmp_path, arms, seeds=[0, 1], contrasts=[["dmu", "direct"]]))
    assert results["learning_rates"] == {"direct": 1e-3, "dmu": 1e-3}
    row = results["rows"]["dmu"]["asked"]
    assert row["mean"] == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert row["difference"] == pytest.approx(row["mean"] - 1 / 4)
    # Both are right on picture 0 and wrong on picture 3: only the other two vary.
    assert 0 <= row["interval"][0] <= row["difference"] <= row["interval"][1] <= 1
    assert results["rows"]["direct"]["asked"]["interval"] == [0, 0]
    (contrast,) = results["contrasts"]
    assert contrast["measures"]["asked"] == {name: row[name] for name in ("difference", "interval")}
    assert row["parts"]["text to image"]["mean"] == pytest.approx(row["mean"])
    report = (tmp_path / "report.md").read_text()
    assert "| dmu | 62.5 ± 17.7 | 37.5 [" in report
    assert "| dmu above direct | 37.5 [" in report
    assert "| dmu | 62.5, 37.5 [" in report
    assert trained_rows(results) == {"dmu": {"asked": (row["difference"], tuple(row["interval"]))}}
    assert (tmp_path / "report.png").is_file()


def test_one_arm_alone_has_nothing_to_draw(tmp_path):
    arms = {"direct": arm("direct", [1e-3])}
    finished(tmp_path, ArmRun("direct", arms["direct"], 1e-3, 0), [1, 0])
    run(config(Path("unread"), tmp_path, arms, seeds=[0]))
    assert (tmp_path / "report.md").is_file()
    assert not (tmp_path / "report.png").exists()


def test_a_contrast_of_unknown_rows_is_refused(tmp_path):
    arms = {"dmu": arm("dmu", [1e-3], experts=["mcl1"]), "direct": arm("direct", [1e-3])}
    for pair in (["dmu: soup", "direct: soup"], ["dmu"]):
        with pytest.raises(ValueError, match=r"contrasts must be pairs of the rows \['direct', 'dmu', 'dmu: best"):
            config(Path("unread"), tmp_path, arms, contrasts=[pair])


def test_an_unknown_baseline_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"baseline must be one of the arms \['dmu'\], but got 'direct'"):
        ExperimentConfig(
            recipe=Path("r"),
            train=Path("t"),
            output=tmp_path,
            arms={"dmu": arm("dmu", [1e-3])},
            baseline="direct",
            measures={},
            select="x",
        )


def test_one_encoder_scores_as_in_the_other_commands(scenes):
    (model,), processor = load_all([Path("scenes-clip")])
    dataset = open_captions(scenes, split="test", caption_field="long")
    found = measure(MeasureConfig(kind="retrieval", data=scenes), Encoders([model], processor))
    assert found.score == pytest.approx(retrieval(model, processor, dataset)["mean_R@1"])
    asked = MeasureConfig(kind="factors", data=scenes, factors=["shape", "texture"])
    found = measure(asked, Encoders([model], processor))
    wanted = factor_accuracy(model, processor, dataset)
    assert (found.hits.sum(axis=1) / found.questions.sum(axis=1)).tolist() == pytest.approx(
        [wanted["shape"]["accuracy"], wanted["texture"]["accuracy"]]
    )


def test_a_factor_without_variants_is_refused(scenes):
    (model,), processor = load_all([Path("scenes-clip")])
    with pytest.raises(ValueError, match=r"has no variants of \['smell'\]"):
        measure(MeasureConfig(kind="factors", data=scenes, factors=["smell"]), Encoders([model], processor))


def test_a_measure_of_some_pictures_is_the_measure_of_them_alone(scenes, tmp_path):
    (model,), processor = load_all([Path("scenes-clip")])
    encoders = Encoders([model], processor, tmp_path)
    asked = {"kind": "factors", "data": scenes, "factors": ["shape"]}
    whole = measure(MeasureConfig(**asked), encoders)
    some = measure(MeasureConfig(**asked, start=3, stop=8), encoders)
    assert np.array_equal(some.hits, whole.hits[:, 3:8])
    with pytest.raises(ValueError, match="no picture from 12"):
        measure(MeasureConfig(**asked, start=12), encoders)


def test_oracle_takes_the_best_member_of_every_picture():
    questions = np.ones((1, 3))
    found = any_of([Hits(np.array([[1.0, 0, 0]]), questions), Hits(np.array([[0.0, 1, 0]]), questions)])
    assert found.score == pytest.approx(2 / 3)


def test_soup_is_the_mean_of_all_weights(model_folder):
    one, other = (AutoModel.from_pretrained(model_folder) for _ in range(2))
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(2.0)
    for name, tensor in soup([one, other]).named_parameters():
        torch.testing.assert_close(tensor, before[name] + 1.0)


@pytest.mark.slow
def test_experts_of_a_run_are_measured_together(scenes, tmp_path):
    """The whole road, two steps a stage: the mixture, each expert, their soup, ensemble and oracle."""
    arms = {"dmu": arm("dmu", [1e-3], experts=["mcl1", "mcl2", "mcl3"])}
    results = run(config(scenes, tmp_path, arms, seeds=[0]))
    together = {f"dmu: {what}" for what in ("best expert alone", "soup", "ensemble", "oracle")}
    assert set(results["rows"]) == {"dmu", "start"} | together
    scores = {row: found["asked"]["mean"] for row, found in results["rows"].items()}
    assert scores["dmu: oracle"] >= max(scores["start"], scores["dmu: best expert alone"])
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == results["rows"]
    # The ensemble embeds nothing anew: its members, the mixture and the soup, pictures and texts of each.
    assert len(list((tmp_path / "embeddings").iterdir())) == 2 * (4 + 2)
    (folder,) = (tmp_path / "runs").iterdir()
    assert not (folder / "report.md").exists()
