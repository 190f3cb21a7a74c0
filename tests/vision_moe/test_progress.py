"""What a training prints."""

import torch
from torch.utils.data import TensorDataset, default_collate
from transformers import TrainerCallback, TrainingArguments

from vision_moe.sampled_trainer import SampledTrainer


class _Logs(TrainerCallback):
    def __init__(self):
        self.names = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.names |= logs.keys()


class _Detailed(SampledTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(inputs[0]).mean()

    def log(self, logs, start_time=None):
        super().log({**logs, "moe/vision/layer3/dropped_fraction": 0.25}, start_time)


def test_numbers_of_single_blocks_are_logged_and_not_printed(tmp_path, capfd):
    seen = _Logs()
    args = TrainingArguments(
        str(tmp_path), max_steps=2, logging_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    data = TensorDataset(torch.ones(4, 3))
    trainer = _Detailed(
        torch.nn.Linear(3, 1),
        args,
        train_dataset=data,
        data_collator=default_collate,
        batch_sampler=[[0, 1], [2, 3]],
        callbacks=[seen],
    )
    trainer.train()
    assert "moe/vision/layer3/dropped_fraction" in seen.names
    printed = capfd.readouterr().out
    assert "'loss'" in printed
    assert "dropped_fraction" not in printed
