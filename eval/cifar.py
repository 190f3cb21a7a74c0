"""CIFAR-10 and CIFAR-100's test sets, read by torchvision from the "python version" archives.

Those files are pickles; torchvision opens them only where their MD5 is that of the published ones.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100


class Cifar:
    """The 10,000 test pictures.

    Args:
        folder: holds cifar-10-batches-py or cifar-100-python.
        num_classes: 10 or 100.

    Raises:
        FileNotFoundError: they are not there, or not the published ones.
    """

    def __init__(self, folder: Path, num_classes: int) -> None:
        kind = {10: CIFAR10, 100: CIFAR100}[num_classes]
        try:
            self._dataset = kind(str(folder), train=False, download=False)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"no whole {kind.base_folder} in {folder}: unpack {kind.filename} of {kind.url} there"
            ) from error
        self.classes = [name.replace("_", " ") for name in self._dataset.classes]
        self.labels_N = np.array(self._dataset.targets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, _ = self._dataset[index]
        return {"image": image}

    def name(self, index: int) -> str:
        """The picture's number."""
        return str(index)

    @property
    def fingerprint(self) -> str:
        """Hash of the pixels."""
        return hashlib.blake2b(self._dataset.data.tobytes(), digest_size=16).hexdigest()
