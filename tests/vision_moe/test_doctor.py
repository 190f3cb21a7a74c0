"""The doctor names what there is, what is used and what is missing, and ends with 1 where the encoder cannot run."""

import pytest
from packaging.requirements import Requirement

from vision_moe import doctor
from vision_moe.extras import problem, require, requirements


def test_it_tells_hardware_versions_and_what_is_used(capsys):
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for wanted in ("processor", "memory", "GiB free", "torch 2.", "device ", "float32 ", "NPROC=n", "model hub"):
        assert wanted in text, wanted


def test_what_is_missing_comes_with_the_command(capsys, monkeypatch):
    asked = {None: [Requirement("torch>=999")], "demo": [Requirement("no-such-package>=6")]}
    monkeypatch.setattr(doctor, "requirements", lambda extra=None: asked.get(extra, []))
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "needed is >=999: bash scripts/setup.sh" in text
    assert 'no-such-package is not installed: pip install "vision-moe[demo]"' in text


def test_requirements_of_an_extra_are_its_own():
    names = {needed.name for needed in requirements("demo")}
    assert "gradio" in names
    assert "torch" not in names
    assert "torch" in {needed.name for needed in requirements()}
    assert problem(Requirement("torch>=1")) is None


def test_a_module_that_is_not_there_is_named_with_its_extra():
    require("demo", "json")
    with pytest.raises(ModuleNotFoundError, match=r'no_such_module is not installed: pip install "vision-moe\[demo\]"'):
        require("demo", "json", "no_such_module")
