"""`python -m mllm.data.check`: what it counts, what it shows, and which data it does not let pass."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mllm.data.check import CheckConfig, check, main
from mllm.stage_recipe import StageConfig

ASK = {"from": "human", "value": "<image>\nIs there a red cube?"}
YES = {"from": "gpt", "value": "Yes."}
GOOD = {"id": "good", "image": "good.png", "conversations": [ASK, YES]}
TEXT = {"id": "text", "conversations": [{"from": "human", "value": "Is it red?"}, YES]}
LONG = {"id": "long", "conversations": [TEXT["conversations"][0], {"from": "gpt", "value": "red " * 400}]}
LATE = {"id": "late", "conversations": [{"from": "human", "value": "red " * 400}, YES]}
MISSING = {**GOOD, "image": "absent.png"}
TORN = {**GOOD, "image": "torn.png"}
MISMATCH = {"id": "mismatch", "conversations": [ASK, YES]}


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[..., CheckConfig]:
    """A recipe whose only stage has the given samples, max_length 300; the packaged models take 64 tokens a picture."""
    Image.effect_noise((40, 40), 50).save(tmp_path / "good.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])

    def make(*samples: dict[str, Any], **fields: Any) -> CheckConfig:
        (tmp_path / "data.json").write_text(json.dumps(samples))
        settings = {"max_length": 300, "show": 0, "num_workers": 0, "output": tmp_path / "run", **fields}
        return CheckConfig(
            image_folder=tmp_path,
            pretrain=StageConfig(enabled=False),
            finetune=StageConfig(data=tmp_path / "data.json", llm="full"),
            **settings,
        )

    return make


def test_good_data_are_counted_and_ready(make_recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(make_recipe(GOOD, GOOD, TEXT, LONG))
    out = capsys.readouterr().out
    assert "samples: 4, 4 good, 2 without a picture" in out
    assert "128 of pictures; longest sample 300" in out
    assert "cut at max_length 300: 1 samples" in out
    assert "pictures: 2, 0 missing, 0 broken" in out
    assert "ready" in out
    assert "NOT" not in out


def test_independent_turns_are_counted_and_shown_as_they_train(
    make_recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {**GOOD, "conversations": [ASK, YES, {"from": "human", "value": "Is it red?"}, YES] * 4}
    long["conversations"][4::4] = [{"from": "human", "value": "Is it a cube?"}] * 3
    config = make_recipe(long, show=1, color="never")
    check(config)
    together = capsys.readouterr().out
    check(replace(config, finetune=replace(config.finetune, independent_turns=True)))
    apart = capsys.readouterr().out
    assert "\n|" not in together
    assert apart.count("\n|") == 8
    assert apart.count("<image x 64>") == 1
    assert apart.count("[[ Yes.</s>]]") == together.count("[[ Yes.</s>]]") == 8


def test_supervised_tokens_are_set_off_from_the_rest(make_recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    check(make_recipe(GOOD, show=1, color="always"))
    colored = capsys.readouterr().out
    assert "\x1b[36m<image x 64>\x1b[0m" in colored
    assert "\x1b[32m Yes.</s>\x1b[0m" in colored
    assert "Is there a red cube? ASSISTANT:\x1b[0m" in colored
    check(make_recipe(GOOD, show=1))
    assert "Is there a red cube? ASSISTANT:[[ Yes.</s>]]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bad", "counted"),
    [
        (MISSING, "1 missing, 0 broken"),
        (TORN, "0 missing, 1 broken"),
        (LATE, "unusable: 1\n    sample number 1: no answer begins within max_length=300"),
    ],
)
def test_bad_samples_pass_only_where_they_are_skipped(
    make_recipe: Any, capsys: pytest.CaptureFixture[str], bad: dict[str, Any], counted: str
) -> None:
    assert not check(make_recipe(GOOD, bad))
    out = capsys.readouterr().out
    assert counted in out
    assert "samples: 2, 1 good" in out
    assert "NOT READY: 1 bad samples would stop it; mend them, or leave them out with --bad_samples skip" in out
    assert check(make_recipe(GOOD, bad, bad_samples="skip"))
    assert not check(make_recipe(GOOD, bad, bad, bad_samples="skip"))
    assert "2 of 3 samples would be skipped, more than half" in capsys.readouterr().out


def test_pictures_that_are_only_looked_for_are_not_read(make_recipe: Any) -> None:
    assert check(make_recipe(GOOD, TORN, pictures="exist"))
    assert not check(make_recipe(GOOD, MISSING, pictures="exist"))


def test_a_malformed_sample_never_passes(make_recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert not check(make_recipe(GOOD, GOOD, MISMATCH, bad_samples="skip"))
    out = capsys.readouterr().out
    assert "malformed: 1\n    sample number 2: 0 picture(s) but 1 <image> placeholder" in out
    assert "1 malformed samples would stop it" in out


def test_data_that_train_nothing_never_pass(make_recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert not check(make_recipe(LATE, LATE, bad_samples="skip"))
    assert "no sample has anything to train on" in capsys.readouterr().out


def test_a_limit_spreads_over_the_data(make_recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert not check(make_recipe(GOOD, GOOD, GOOD, GOOD, MISSING, limit=2))
    assert "samples: 2 of 5, 1 good" in capsys.readouterr().out


def test_the_command_ends_with_status_1(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_recipe(GOOD, MISSING)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"image_folder: {tmp_path}\npretrain: {{enabled: false}}\nfinetune: {{llm: full, data: {tmp_path}/data.json}}\n"
    )
    flags = ["--show", "0", "--output", str(tmp_path / "run"), "--max_length", "300"]
    monkeypatch.setattr(sys, "argv", ["check", str(recipe), *flags])
    with pytest.raises(SystemExit, match="1"):
        main()
    monkeypatch.setattr(sys, "argv", ["check", str(recipe), *flags, "--bad_samples", "skip"])
    main()
    assert "1 missing" in capsys.readouterr().out
