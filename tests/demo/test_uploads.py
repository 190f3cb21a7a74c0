"""What is read of what users send, and what is refused with which words."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo import uploads as limits
from demo.uploads import Uploads


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    (tmp_path / "uploads").mkdir()
    return Uploads(tmp_path / "uploads")


def test_content_decides_the_format_and_not_the_name(uploads: Uploads) -> None:
    Image.new("RGB", (8, 8), "red").save(uploads.folder / "really.png")
    (uploads.folder / "really.png").rename(uploads.folder / "named.jpg")
    assert uploads.read(uploads.folder / "named.jpg").size == (8, 8)
    # Formats whose readers run other programs, or that a browser does not show.
    Image.new("RGB", (8, 8), "red").save(uploads.folder / "a.eps")
    (uploads.folder / "a.eps").rename(uploads.folder / "eps.png")
    with pytest.raises(ValueError, match=r"Cannot read eps.png: its content is not a known picture\. Send a JPEG"):
        uploads.read(uploads.folder / "eps.png")


def test_truncated_picture_is_an_error(uploads: Uploads) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(uploads.folder / "whole.jpg")
    (uploads.folder / "half.jpg").write_bytes((uploads.folder / "whole.jpg").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"Cannot read half.jpg \(.*truncated"):
        uploads.read(uploads.folder / "half.jpg")


def test_picture_is_turned_the_way_the_camera_was_held(uploads: Uploads) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(uploads.folder / "side.jpg", exif=exif)
    assert uploads.read(uploads.folder / "side.jpg").size == (4, 8)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("side", [8000, 16000], ids=["above ours", "above Pillow's"])
def test_decompression_bomb_is_refused_by_its_header(uploads: Uploads, side: int) -> None:
    """64 and 256 million pixels, of which nothing is unpacked: the file has no more than announces them."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    (uploads.folder / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"") + _chunk(b"IEND", b"")
    )
    with pytest.raises(ValueError, match=r"bomb.png .*50,000,000"):
        uploads.read(uploads.folder / "bomb.png")


def test_large_file_is_refused_before_it_is_read(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (64, 64)).save(uploads.folder / "a.png")
    monkeypatch.setattr(limits, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="at most 0 MB are read"):
        uploads.read(uploads.folder / "a.png")


def test_files_elsewhere_are_as_if_they_were_not_there(uploads: Uploads, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (uploads.folder / "link.png").symlink_to(tmp_path / "outside.png")
    for path in (tmp_path / "outside.png", uploads.folder / "link.png", uploads.folder / ".." / "outside.png"):
        assert not uploads.holds(path)
        with pytest.raises(ValueError, match="was not uploaded here, or is no longer kept"):
            uploads.read(path)
    with pytest.raises(ValueError, match="was not uploaded here, or is no longer kept"):
        uploads.read(uploads.folder / "missing.png")
