"""Every command of README and docs runs, in its smoke form; what a page shows but needs data or machines that are not
here is listed with the reason."""

import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parent.parent
README = CHECKOUT / "README.md"


PAGES = sorted((CHECKOUT / "docs").rglob("*.md"))
# Parts of commands that cannot run here, and why; their flags are checked all the same (tests/test_commands.py).
ELSEWHERE = {
    "mllm.convert": "needs a checkpoint of LLaVA, which no package index carries",
    "mllm.merge": "needs the adapter of a run; tests/mllm/training/test_adapters.py has one",
    "outputs/RUN/adapter": "as above",
    "vision_moe.convert SRC": "needs a checkpoint; tests/vision_moe/convert has small ones",
    "https://host": "needs a server; tests/vision_moe/training/test_streamed_run.py streams",
    "--node-rank": "needs two machines",
    "NNODES=2": "needs two machines",
    "sbatch ": "needs SLURM; tests/test_launch_scripts.py has stand-ins",
    "--protocol coco2017": "needs COCO",
    "mmbench_en_dev": "needs the model hub",
    "scripts/test.sh": "this is it",
    "scripts/setup.sh": "has run",
    "demo.app": "is started by the README's test",
    "scripts/quickstart.sh": "is run by the README's test",
    "outputs/quickstart": "as above",
}
# What stands for data that a page names and that is not here.
STAND_INS = {
    "NPROC=8 ": "",
    "share-captioner_coco_lcs_sam_1246k_1107.json": "outputs/scenes/llava_pretrain.json",
    "--data.image_dir data/": "--data.image_dir outputs/scenes/images",
    "coco_val2017.json": "outputs/scenes/llava_pretrain.json",
    "blip_laion_cc_sbu_558k.json": "outputs/scenes/llava_pretrain.json",
    "llava_v1_5_mix665k.json": "outputs/scenes/llava_finetune.json",
    "IMAGES_558K": "outputs/scenes/images",
    "IMAGES_665K": "outputs/scenes/images",
    "outputs/scenes40k": "outputs/scenes",
    "--num 40000 --num-test 2000 --seed 0": "--num 96 --num-test 24 --seed 1",
    "data.check PATH": "data.check outputs/scenes --caption_field long",
    "--model FOLDER": "--model scenes-clip",
    " --output report.json": " --output outputs/report.json",
    "--tokenizer MODEL": "--tokenizer scenes-clip",
    " --caption_field F": "",
    "outputs/clip_moe_336/dmu/model": "scenes-clip",
}


def commands(page: Path = README) -> list[str]:
    """Lines of a page's bash blocks, continued lines joined, comments removed."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    # Quotes stay: bash reads the line as a person's bash would.
    uncommented = [" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in lines]
    return [line for line in uncommented if line]


def smoke_form(command: str, outputs: Path) -> str:
    """The same command on little data, below another folder."""
    command = command.replace("outputs/", f"{outputs}/").replace("--num 8000 --num-test 1000", "--num 96 --num-test 24")
    if "train_encoder.sh" in command or "llava_finetune.sh" in command:
        # The overlay names a tiny tower of its own; the README's is what comes out of the step before.
        command += " --smoke"
    if "mllm.data.check" in command:
        command += " --show 1"
    if "vision_moe.analysis" in command:
        command += " --limit 8 --similarity_tokens 20"
    if "quickstart.sh" in command:
        command += f" --smoke --output {outputs}/quickstart"
    if "eval.run" in command:
        command += " --limit 4"
    return command


def run(command: str) -> None:
    done = subprocess.run(["bash", "-c", command], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_the_readme_names_the_commands_that_are_its_contract():
    found = commands()
    for start in (
        "bash scripts/quickstart.sh",
        "bash scripts/test.sh",
        ".venv/bin/python -m vision_moe.data.scenes",
        "bash scripts/train_encoder.sh",
        "bash scripts/llava_finetune.sh",
        ".venv/bin/python -m eval.run",
        ".venv/bin/python -m demo.app",
        ".venv/bin/python -m vision_moe.doctor",
    ):
        assert sum(command.startswith(start) for command in found) == 1, start
    assert len(found) == 8


def test_links_of_the_readme_and_docs_exist():
    for page in (README, *PAGES):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation():
    def pages(entries: list[Any]) -> Iterator[str]:
        for entry in entries:
            for value in entry.values() if isinstance(entry, dict) else [entry]:
                yield from pages(value) if isinstance(value, list) else [value]

    named = list(pages(yaml.safe_load((CHECKOUT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert sorted(named) == sorted(page.relative_to(CHECKOUT / "docs").as_posix() for page in PAGES)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """Dead links, pages outside the navigation and commands that have lost their help end the build."""
    run(f".venv/bin/mkdocs build --strict --site-dir {tmp_path}/site")
    commands_page = (tmp_path / "site" / "reference" / "commands.html").read_text(encoding="utf-8")
    assert "python -m vision_moe.train [RECIPE.yaml ...]" in commands_page
    fields_page = (tmp_path / "site" / "reference" / "recipes.html").read_text(encoding="utf-8")
    assert "mcl.learning_rate" in fields_page
    assert "merge_donors" in (tmp_path / "site" / "reference" / "python.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_command_of_the_readme_runs(tmp_path):
    for command in commands():
        if command == "bash scripts/test.sh":
            # This is it.
            continue
        if "demo.app" in command:
            answers(smoke_form(command, tmp_path))
        else:
            run(smoke_form(command, tmp_path))
    report = (tmp_path / "quickstart" / "report.md").read_text()
    for heading in ("POPE on Scenes", "Encoder", "Which expert", "Loss", "Answers", "Talk to it"):
        assert heading in report
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", report):
        assert (tmp_path / "quickstart" / picture).is_file(), picture


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(CHECKOUT / "docs").with_suffix("").as_posix())
def test_every_command_of_a_page_runs(page, tmp_path):
    found = [command for command in commands(page) if not any(part in command for part in ELSEWHERE)]
    if not found:
        pytest.skip("shows no command that can run here")
    for command in found:
        command = re.sub(r"(?<!\S)\[(--[^]]*)\]", r"\1", command)
        for shown, here in STAND_INS.items():
            command = command.replace(shown, here)
        command = re.sub(r"(?<!\S)python -", ".venv/bin/python -", command)
        if "outputs/scenes" in command and "data.scenes" not in command and not (tmp_path / "scenes").is_dir():
            run(
                smoke_form(
                    ".venv/bin/python -m vision_moe.data.scenes --out outputs/scenes --num 96 --num-test 24", tmp_path
                )
            )
        run(smoke_form(command, tmp_path))


def answers(command: str) -> None:
    """The demo starts and serves its page."""
    port = 7911
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command} --port {port}"],
        cwd=CHECKOUT,
        env={**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None, process.stdout.read()[-3000:]
            assert time.monotonic() < deadline, "the demo did not answer"
            try:
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read()
                break
            except OSError:
                time.sleep(1)
        assert b"gradio" in page
    finally:
        process.terminate()
        process.wait(timeout=30)
