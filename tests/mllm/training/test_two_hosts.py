"""A LLaVA run on two machines: two network namespaces, which share nothing but the disk and a cable between them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mllm.train import run
from vision_moe.config import write_yaml

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces that reach each other at ADDRESSES through the interface eth0, and nobody else."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` (Debian: apt-get install iproute2)")
    names = [f"vision_moe_{os.getpid()}_{number}" for number in range(2)]
    try:
        for name in names:
            _ip("netns", "add", name)
        ends = [word for name in names for word in ("name", "eth0", "netns", name)]
        _ip("link", "add", *ends[:4], "type", "veth", "peer", *ends[4:])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/30", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        _remove(names)
        pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")
    yield names
    _remove(names)


def _remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.slow
def test_two_hosts_under_zero3_end_with_the_weights_of_one_process(hosts, make_config, tmp_path) -> None:
    config = make_config(tmp_path / "hosts", deepspeed="zero3")
    write_yaml(config, tmp_path / "recipe.yaml")
    environment = {
        **os.environ,
        "VISION_MOE_PYTHON": sys.executable,
        "PYTHONPATH": str(SCRIPTS.parent),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
        "NNODES": "2",
        "NPROC": "1",
        "MASTER_ADDR": ADDRESSES[0],
    }
    launchers = []
    for number, name in enumerate(hosts):
        command = ["ip", "netns", "exec", name, "bash", str(SCRIPTS / "launch.sh"), "mllm.train"]
        with (tmp_path / f"host{number}.log").open("w") as log:
            launchers.append(
                subprocess.Popen(
                    [*command, str(tmp_path / "recipe.yaml")],
                    env={**environment, "NODE_RANK": str(number)},
                    stdout=log,
                    stderr=log,
                )
            )
    try:
        statuses = [launcher.wait(400) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    logs = [(tmp_path / f"host{number}.log").read_text() for number in range(2)]
    assert statuses == [0, 0], "\n".join(log[-3000:] for log in logs)
    assert "1 per forward x 2 processes x 2 accumulated forwards" in logs[0]
    expected = load_file(run(make_config(tmp_path / "plain")) / "model.safetensors")
    got = load_file(config.output / "model" / "model.safetensors")
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
