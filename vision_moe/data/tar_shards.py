"""WebDataset shards read one after another, from wherever they lie."""

import logging
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

from vision_moe.data.archive import index, samples
from vision_moe.data.samples import RawSample
from vision_moe.data.urls import is_remote, open_place

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
_PAUSE_SECONDS = 2.0


class TarShards:
    """Shards by place, each read in sequence.

    The reader is tarfile over fsspec, and neither of the two libraries that read such shards: `webdataset` 1.0 and the
    webdataset builder of `datasets` 5.2 both take a damaged header inside a shard for its end and go on without a word
    (so does plain tarfile), neither can leave a damaged shard and go on with the next one in an exactly resumable way,
    and the latter refuses a shard whose first five samples differ in their fields.

    Args:
        shards: paths, URLs and commands, see `vision_moe.data.urls`.
        allow_pipe: lets commands run.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, shards: list[str], *, allow_pipe: bool = False) -> None:
        if not shards:
            raise ValueError("no shards to stream from")
        self.shards = shards
        self.allow_pipe = allow_pipe

    def read(self, shard: int, start: int = 0) -> Iterator[RawSample]:
        """Samples of a shard from number `start` on; a broken connection is made again up to twice at each sample.

        Raises:
            OSError: the shard cannot be read, or is damaged.
            PermissionError: a command that is not allowed.
        """
        place = self.shards[shard]
        attempts = _ATTEMPTS if is_remote(place) else 1
        failures = 0
        while True:
            try:
                with open_place(place, allow_pipe=self.allow_pipe) as file:
                    for sample in samples(file, _name(place), start):
                        start, failures = start + 1, 0
                        yield sample
                return
            except PermissionError:
                raise
            except (OSError, tarfile.TarError) as error:
                failures += 1
                if failures >= attempts:
                    raise OSError(f"{type(error).__name__}: {error}") from error
                logger.warning("%s: %s; reading it again from sample %d", place, error, start)
                time.sleep(_PAUSE_SECONDS * failures)

    def count(self) -> int | None:
        """Number of samples, told from the headers; None where a shard does not lie on local disk."""
        if any(is_remote(place) for place in self.shards):
            return None
        return sum(len(index(Path(place))[0]) for place in self.shards)


def _name(place: str) -> str:
    return place if is_remote(place) else Path(place).name
