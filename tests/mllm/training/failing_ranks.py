"""Run by test_train_watches.py on two ranks, `failing_ranks.py OUT`: rank 1 fails, and both write what they raise."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

import mllm.preflight
from mllm.loss_watch import LossWatch, NonFiniteLossError
from mllm.sampler import DialogueBatchSampler


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    sampler = DialogueBatchSampler(8, 4, 1, seed=0, rank=rank, world_size=2)
    watch = LossWatch(sampler, SimpleNamespace(sample_id=lambda number: f"sample{number}"))
    try:
        watch.check(torch.tensor(torch.nan if rank else 1.0), 0)
    except NonFiniteLossError as error:
        (out / f"loss{rank}.txt").write_text(str(error))

    def fail(*args: object, **kwargs: object) -> None:
        if rank:
            raise RuntimeError("its own trouble")

    mllm.preflight._check = fail
    trainer = SimpleNamespace(
        model=torch.nn.Linear(2, 2),
        args=SimpleNamespace(device=torch.device("cpu")),
        accelerator=SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None)),
    )
    try:
        mllm.preflight.preflight(trainer, None, out)
    except (mllm.preflight.PreflightError, RuntimeError) as error:
        (out / f"preflight{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
