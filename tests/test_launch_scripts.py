"""What the launching scripts start, on one machine, on several, and under SLURM; Python and SLURM are stand-ins."""

import os
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
SCRIPTS = CHECKOUT / "scripts"
# Prints what it is called with, as the ranks would be, and pretends to have 4 GPUs and 8 cores.
PYTHON = """#!/bin/bash
case $2 in
    *device_count*) echo 4 ;;
    *affinity*) echo 8 ;;
    *) echo "$OMP_NUM_THREADS $*" ;;
esac
"""
ONE_MACHINE = "2 -m torch.distributed.run --standalone --nproc_per_node 4 -m mllm.train recipe.yaml --output out"


@pytest.fixture
def launch(tmp_path: Path):
    """Runs a script with stand-ins for Python and for the given commands; returns the completed process."""

    def start(script: Path, *arguments: str, commands: dict[str, str] | None = None, **environment: str):
        for name, text in {"python": PYTHON, **(commands or {})}.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        known = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VISION_MOE_PYTHON": str(tmp_path / "python")}
        return subprocess.run(
            ["bash", str(script), *arguments],
            env={**known, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    return start


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ONE_MACHINE),
        ({"NPROC": "1", "OMP_NUM_THREADS": "5"}, "5 -m mllm.train recipe.yaml --output out"),
        ({"OMP_NUM_THREADS": "5"}, f"5{ONE_MACHINE[1:]}"),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host0", "NPROC": "1"},
            "8 -m torch.distributed.run --nnodes 2 --node_rank 1 --master_addr host0 --master_port 29500 "
            "--nproc_per_node 1 -m mllm.train recipe.yaml --output out",
        ),
        (
            {"TORCHRUN_ARGS": "--nnodes 2 --rdzv-endpoint host:1"},
            "2 -m torch.distributed.run --nproc_per_node 4 --nnodes 2 --rdzv-endpoint host:1 -m mllm.train "
            "recipe.yaml --output out",
        ),
    ],
    ids=["a_process_per_gpu", "one_process", "threads_as_told", "one_of_two_machines", "torchruns_own_options"],
)
def test_the_trainer_starts_as_the_environment_says(launch, environment: dict[str, str], expected: str) -> None:
    done = launch(SCRIPTS / "launch.sh", "mllm.train", "recipe.yaml", "--output", "out", **environment)
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr


@pytest.mark.parametrize(("environment", "missing"), [({}, "NODE_RANK"), ({"NODE_RANK": "0"}, "MASTER_ADDR")])
def test_a_machine_that_does_not_know_its_place_is_told(launch, environment: dict[str, str], missing: str) -> None:
    done = launch(SCRIPTS / "launch.sh", "mllm.train", "recipe.yaml", NNODES="2", **environment)
    assert done.returncode == 2
    assert f"NNODES=2 needs {missing}" in done.stderr


def test_slurm_starts_one_launcher_on_each_machine(launch, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "setup.sh").write_text("echo set up\n")
    srun = (
        '#!/bin/bash\n[ "$1" = --kill-on-bad-exit=1 ] || exit 9\nshift\n'
        'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done\n'
    )
    scontrol = '#!/bin/bash\n[ "$*" = "show hostnames gpu[3-4]" ] && printf "gpu3\\ngpu4\\n"\n'
    done = launch(
        SCRIPTS / "slurm" / "train.sbatch",
        str(SCRIPTS / "launch.sh"),
        "mllm.train",
        "a recipe.yaml",
        commands={"srun": srun, "scontrol": scontrol},
        SLURM_JOB_NODELIST="gpu[3-4]",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_ID="123456",
        SLURM_SUBMIT_DIR=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "set up",
        *(
            f"2 -m torch.distributed.run --nnodes 2 --node_rank {node} --master_addr gpu3 --master_port 23456 "
            f"--nproc_per_node 4 -m mllm.train a recipe.yaml"
            for node in (0, 1)
        ),
    ]
