"""A Trainer whose batches come from a batch sampler that already gives each rank its own keys."""

from typing import Any

from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer

from vision_moe.progress import HeadlinePrinter, HeadlineProgress


class SampledTrainer(Trainer):
    """Trainer over a batch sampler of ours.

    Args:
        batch_sampler: yields this rank's keys for each forward; None where a subclass brings its own loader.
    """

    def __init__(self, *args: Any, batch_sampler: Sampler[Any] | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for shown, brief in ((PrinterCallback, HeadlinePrinter), (ProgressCallback, HeadlineProgress)):
            if self.pop_callback(shown) is not None:
                self.add_callback(brief)
        self.batch_sampler = batch_sampler

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The loader is not handed to accelerate, which would deal the batches out a second time."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.batch_sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_num_workers > 0,
        )
