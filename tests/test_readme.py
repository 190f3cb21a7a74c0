"""Every command of the README runs, in its smoke form."""

import os
import re
import shlex
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
README = CHECKOUT / "README.md"


def commands() -> list[str]:
    """Lines of the README's bash blocks, continued lines joined, comments removed."""
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(), flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) for line in lines if line.strip()]


def smoke_form(command: str, outputs: Path) -> str:
    """The same command on little data, below another folder."""
    command = command.replace("outputs/", f"{outputs}/").replace("--num 8000 --num-test 1000", "--num 96 --num-test 24")
    if "train_encoder.sh" in command or "llava_finetune.sh" in command:
        # The overlay names a tiny tower of its own; the README's is what comes out of the step before.
        command += " --smoke"
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
    ):
        assert sum(command.startswith(start) for command in found) == 1, start
    assert len(found) == 7


def test_links_of_the_readme_and_docs_exist():
    for page in (README, *sorted((CHECKOUT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


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
