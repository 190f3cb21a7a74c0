"""Places that shards are streamed from: local files, anything that fsspec opens, and shell commands."""

import itertools
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast
from urllib.parse import urlsplit

import fsspec

_PIPE = "pipe:"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_SILENCE_SECONDS = 60


def is_remote(place: str) -> bool:
    """Whether a place is a URL or a command, and no local path."""
    return place.startswith(_PIPE) or "://" in place


def expand(pattern: str) -> list[str]:
    """All places of a pattern with ranges as shells write them: "{00000..00012}" counts up, keeping the zeros.

    Raises:
        ValueError: a range counts down.
    """
    parts = _RANGE.split(pattern)
    numbers = []
    for first, last in zip(parts[1::3], parts[2::3], strict=True):
        if int(first) > int(last):
            raise ValueError(f"{{{first}..{last}}} in {pattern} counts down; write the smaller number first")
        numbers.append([f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)])
    texts = parts[::3]
    return [
        texts[0] + "".join(number + text for number, text in zip(chosen, texts[1:], strict=True))
        for chosen in itertools.product(*numbers)
    ]


@contextmanager
def open_place(place: str, *, allow_pipe: bool = False) -> Iterator[IO[bytes]]:
    """Opens a place for reading from its beginning to its end.

    Args:
        place: a path, a URL of http, https or whatever fsspec has a file system for (s3, gs, hf, ...), or
            "pipe:COMMAND" for the standard output of a shell command.
        allow_pipe: a command in a data string runs with the rights of whoever starts the training: without this it is
            refused, so that a recipe from elsewhere cannot run one.

    Raises:
        OSError: the place cannot be opened or read, or the command failed.
        PermissionError: a command that is not allowed.
    """
    if place.startswith(_PIPE):
        if not allow_pipe:
            raise PermissionError(f"{place!r} runs a shell command; set allow_pipe if you trust whoever wrote it")
        with _command(place.removeprefix(_PIPE)) as output:
            yield output
    elif not is_remote(place):
        with open(place, "rb") as file:
            yield file
    else:
        with _opened(place) as remote:
            yield cast("IO[bytes]", _Remote(remote))


class _Remote:
    """Lets errors of the network arrive as OSError: those of aiohttp and of most of fsspec's packages are none."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:
            raise _as_os_error(error) from error


@contextmanager
def _opened(url: str) -> Iterator[IO[bytes]]:
    try:
        file = fsspec.open(url, "rb", **_options(url)).open()
    except Exception as error:
        raise _as_os_error(error) from error
    with file:
        yield file


def _options(url: str) -> dict[str, Any]:
    if urlsplit(url).scheme not in ("http", "https"):
        return {}
    from aiohttp import ClientTimeout

    # aiohttp's own limit is five minutes for a whole file, which a training that reads at its own pace exceeds.
    timeout = ClientTimeout(total=None, sock_connect=_SILENCE_SECONDS, sock_read=_SILENCE_SECONDS)
    return {"client_kwargs": {"timeout": timeout}}


def _as_os_error(error: Exception) -> OSError:
    return error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {error}")


@contextmanager
def _command(command: str) -> Iterator[IO[bytes]]:
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield process.stdout
        # What follows the archive's end mark: closed before, the command would die of a broken pipe.
        while process.stdout.read(1 << 20):
            pass
        if process.wait() != 0:
            raise OSError(f"the command {command!r} ended with status {process.returncode}")
    finally:
        process.stdout.close()
        process.kill()
        process.wait()
