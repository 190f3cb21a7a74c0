"""Embeddings of a data set kept on disk in chunks, so that a killed evaluation goes on and a second one is free.

Each model, processor and data set has a folder of its own, named by their fingerprint; nothing is ever removed.
Shapes: N pictures, M texts, D embedding dim.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from vision_moe.embedding import Pictures, embed_images, embed_texts
from vision_moe.features import weights_fingerprint
from vision_moe.files import replacing, write_json

if TYPE_CHECKING:
    import torch

_CHUNK = 4096


class CachedEncoder:
    """`embed_images` and `embed_texts` of one model, with a cache.

    Args:
        model: a dual encoder, on any device.
        processor: its CLIPProcessor.
        cache_dir: folder of all caches; None = no cache.
        batch_size: pictures a forward pass.
        autocast_dtype: as in `embed_images`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        cache_dir: Path | None = None,
        *,
        batch_size: int = 64,
        autocast_dtype: "torch.dtype | None" = None,
    ) -> None:
        self._model = model
        self._processor = processor
        self._cache_dir = cache_dir
        self._batch_size = batch_size
        self._autocast_dtype = autocast_dtype
        # The configuration too: another top-k gives other embeddings from the same weights.
        self._identity = {} if cache_dir is None else _identity(model, autocast_dtype)

    def images(self, dataset: Pictures, fingerprint: str) -> NDArray[np.float32]:
        """Unit embeddings float32[N, D] of every picture.

        Args:
            dataset: the pictures.
            fingerprint: of their files: it changes when a picture does.
        """
        identity = {"images": fingerprint, "processor": self._processor.image_processor.to_json_string()}

        def embed(start: int, stop: int) -> NDArray[np.float32]:
            return embed_images(
                self._model,
                self._processor,
                _Slice(dataset, start, stop),
                batch_size=self._batch_size,
                autocast_dtype=self._autocast_dtype,
            )

        return self._rows(identity, len(dataset), embed)

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit embeddings float32[M, D] of texts; equal texts get equal ones."""
        unique = sorted(set(texts), key=lambda text: (len(text), text))
        tokens = self._processor.tokenizer(unique)["input_ids"] if unique and self._cache_dir is not None else []
        identity = {"texts": _digest(json.dumps([unique, tokens]))}

        def embed(start: int, stop: int) -> NDArray[np.float32]:
            return embed_texts(self._model, self._processor, unique[start:stop], autocast_dtype=self._autocast_dtype)

        row_of = {text: row for row, text in enumerate(unique)}
        return self._rows(identity, len(unique), embed)[[row_of[text] for text in texts]]

    def _rows(
        self, identity: Mapping[str, str], num_rows: int, embed: Callable[[int, int], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """Rows chunk by chunk; those on disk are not computed again."""
        if num_rows == 0 or self._cache_dir is None:
            return embed(0, num_rows)
        signature = {**self._identity, **identity, "num_rows": num_rows, "chunk": _CHUNK}
        folder = self._cache_dir / _digest(json.dumps(signature, sort_keys=True))
        write_json(folder / "embeddings.json", signature)
        chunks = []
        for start in range(0, num_rows, _CHUNK):
            file = folder / f"chunk-{start:09d}.safetensors"
            if not file.is_file():
                with replacing(file) as temporary:
                    save_file({"rows": embed(start, min(start + _CHUNK, num_rows))}, temporary)
            chunks.append(load_file(file)["rows"])
        return np.concatenate(chunks)


class _Slice:
    """Pictures from `start` to before `stop`."""

    def __init__(self, dataset: Pictures, start: int, stop: int) -> None:
        self._dataset = dataset
        self._start = start
        self._stop = stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._dataset[self._start + index]


def _identity(model: Any, autocast_dtype: "torch.dtype | None") -> dict[str, str]:
    return {
        "weights": weights_fingerprint(model),
        "config": _digest(model.config.to_json_string(use_diff=False)),
        "autocast_dtype": str(autocast_dtype),
    }


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
