"""A run stops at a loss that is not finite, with the samples' names, and where no step ends, with its stacks."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mllm.loss_watch
import mllm.watchdog
from mllm.loss_watch import LossWatch, NonFiniteLossError
from mllm.sampler import DialogueBatchSampler
from mllm.train import run

WORKER = Path(__file__).with_name("failing_ranks.py")
# A script finds the packages of this checkout.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(mllm.watchdog.__file__).parent.parent), "OMP_NUM_THREADS": "1"}


class Names:
    """A data set of which only the names are asked."""

    def sample_id(self, number: int) -> str:
        return f"sample{number}"


def test_the_message_names_the_samples_of_the_forward_and_of_the_step() -> None:
    sampler = DialogueBatchSampler(12, 4, 3, seed=3, accumulation=2)
    forwards = [[f"sample{index}" for index in forward] for forward in sampler]
    watch = LossWatch(sampler, Names())
    fine, broken = torch.tensor(1.0), torch.tensor(torch.inf)
    for step in range(2):
        watch.check(fine, step)
        watch.check(fine, step)
    watch.check(fine, 2)
    with pytest.raises(NonFiniteLossError) as caught:
        watch.check(broken, 2)
    # Three steps of two forwards of two samples: this is the sixth forward.
    message = str(caught.value)
    assert "step 3, forward 2 of 2, is not finite: inf on rank 0" in message
    assert f"rank 0, samples {', '.join(forwards[5])}. " in message
    assert f"All samples of the step: {', '.join(forwards[4] + forwards[5])}." in message


def test_the_first_of_several_is_named_and_ranks_talk_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    talks = []
    monkeypatch.setattr(mllm.loss_watch, "gather", lambda losses: talks.append(losses.shape) or losses)
    watch = LossWatch(DialogueBatchSampler(12, 4, 3, seed=3, accumulation=4), Names())
    for loss in (1.0, torch.nan, 1.0):
        watch.check(torch.tensor(loss), 1)
    assert talks == []
    with pytest.raises(NonFiniteLossError, match=r"step 2, forward 2 of 4, is not finite: nan on rank 0") as caught:
        watch.check(torch.tensor(torch.inf), 1)
    assert talks == [(1, 4)]
    assert "inf on" not in str(caught.value)


def test_a_run_stops_before_a_nan_reaches_its_weights(make_config: Any, tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    config = replace(config, pretrain=replace(config.pretrain, projector_lr=1e38, max_grad_norm=0.0))
    # The warm-up's first step has a learning rate of 0, the second one spoils the projector.
    with pytest.raises(NonFiniteLossError, match=r"the loss of step 3, forward 1 of 4, is not finite: nan on rank 0"):
        run(config)
    assert not (config.output / "pretrain" / "stage.json").exists()
    assert not list(config.output.rglob("hang_rank*.txt"))


def test_one_failing_rank_stops_both_with_its_samples(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*command, str(WORKER), str(tmp_path)], check=True, timeout=300, env=ENVIRONMENT)
    first, second = ((tmp_path / f"loss{rank}.txt").read_text() for rank in (0, 1))
    sampler = DialogueBatchSampler(8, 4, 1, seed=0, rank=1, world_size=2)
    assert f"nan on rank 1, samples {', '.join(f'sample{index}' for index in next(iter(sampler)))}." in first
    assert first == second
    assert (tmp_path / "preflight0.txt").read_text() == "the preflight failed on 1 other rank(s); see their messages"
    assert (tmp_path / "preflight1.txt").read_text() == "its own trouble"


_HANGING = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from mllm.watchdog import HangWatchdog

def step_that_never_ends():
    time.sleep(200)

trainer = SimpleNamespace(add_callback=lambda callback: None)
watchdog = HangWatchdog(Path(sys.argv[1]), 4)
with watchdog.watching(trainer):
    for _ in range(6):
        time.sleep(1)
        watchdog.on_step_end(None, None, None)
    print("six steps", flush=True)
    step_that_never_ends()
"""


def test_a_hang_ends_the_process_and_leaves_its_stacks(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HANGING, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=ENVIRONMENT)
    # Six seconds of steps are longer than the timeout, each of them is not.
    assert ended.stdout == "six steps\n"
    assert ended.returncode == 1
    stacks = (tmp_path / "hang_rank0.txt").read_text()
    assert "Timeout" in stacks
    assert "step_that_never_ends" in stacks


@pytest.mark.parametrize("timeout", [0, 1800])
def test_a_finished_run_leaves_no_file_of_stacks(make_config: Any, tmp_path: Path, timeout: int) -> None:
    config = make_config(tmp_path / "run", finetune={"enabled": False}, hang_timeout=timeout)
    run(config)
    assert not list(config.output.rglob("hang_rank*.txt"))


def test_the_stacks_of_an_earlier_hang_stay(tmp_path: Path) -> None:
    (tmp_path / "hang_rank0.txt").write_text("stacks")
    with mllm.watchdog.HangWatchdog(tmp_path, 1800).watching(SimpleNamespace(add_callback=lambda callback: None)):
        pass
    assert (tmp_path / "hang_rank0.txt").read_text() == "stacks"


def test_a_negative_timeout_is_an_error(make_config: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hang_timeout must be a number of seconds"):
        make_config(tmp_path / "run", hang_timeout=-1)
