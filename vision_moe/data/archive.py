"""Tar archives read so that damage shows: what cannot be read to the end mark is an error, never a shorter archive."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from vision_moe.data.samples import PICTURES, RawSample, key_and_suffix, metadata_of


class Member(NamedTuple):
    """Bytes of one file inside an archive."""

    offset: int
    size: int


class DamagedShardError(ValueError):
    """A shard that cannot be read to its end."""


class _Header(tarfile.TarInfo):
    """tarfile takes a damaged header inside an archive, or a file that stops between two members, for the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, and no end-of-archive mark") from error


def index(shard: Path) -> tuple[dict[str, dict[str, Member]], str | None]:
    """Files of a local archive by key and suffix, and what damage ended it early, if any.

    Raises:
        ValueError: a file is there twice.
    """
    found: dict[str, dict[str, Member]] = {}
    key = ""
    try:
        with tarfile.open(shard, "r:", tarinfo=_Header) as tar:
            for member in tar:
                split = key_and_suffix(member.name)
                if not member.isfile() or split is None:
                    continue
                key, suffix = split
                members = found.setdefault(key, {})
                if suffix in members:
                    raise ValueError(f"{shard}: {member.name} is there twice")
                members[suffix] = Member(member.offset_data, member.size)
    except tarfile.TarError as error:
        # The damage is in the files of the last key or right behind them.
        found.pop(key, None)
        return found, str(error)
    return found, None


def samples(file: IO[bytes], shard: str, start: int = 0) -> Iterator[RawSample]:
    """Samples of an archive that is read once from its beginning; the files of a key must lie together.

    Args:
        file: open for reading; it need not be able to seek.
        shard: its name, for messages.
        start: samples to pass over without unpacking them.

    Raises:
        tarfile.TarError: the archive is damaged, after all samples before the damage were given.
        OSError: reading failed.
    """
    number, key = -1, None
    parts: dict[str, bytes] = {}
    with tarfile.open(fileobj=file, mode="r|", tarinfo=_Header) as tar:
        for member in tar:
            split = key_and_suffix(member.name)
            if not member.isfile() or split is None:
                continue
            if split[0] != key:
                if number >= start:
                    yield _sample(f"{shard}/{key}", parts)
                number, key, parts = number + 1, split[0], {}
            if number >= start and (split[1] in PICTURES or split[1] in (".json", ".txt")):
                content = tar.extractfile(member)
                assert content is not None
                parts[split[1]] = content.read()
            # tarfile keeps every header it has seen.
            tar.members = []  # type: ignore[attr-defined]
    if number >= start:
        yield _sample(f"{shard}/{key}", parts)


def _sample(name: str, parts: dict[str, bytes]) -> RawSample:
    picture = next((parts[suffix] for suffix in PICTURES if suffix in parts), None)
    try:
        return RawSample(name, picture, metadata_of(parts.get(".json"), parts.get(".txt"), name))
    except ValueError as error:
        return RawSample(name, picture, {}, str(error))
