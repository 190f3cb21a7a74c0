"""Small pictures and archives in every form that data sets come in."""

import functools
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """Encodes a picture: PNG unless told otherwise."""

    def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        return buffer.getvalue()

    return encoded


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, dict[str, bytes]], None]:
    """Writes an archive of files by name."""

    def write(path: Path, files: dict[str, bytes]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    return write


@pytest.fixture
def numbered_shards(tmp_path, write_tar, encode) -> Path:
    """img2dataset's output: 00000.tar to 00003.tar of 5 pictures each, captioned "number 0" to "number 19"."""
    folder = tmp_path / "shards"
    for shard in range(4):
        files = {}
        for number in range(5 * shard, 5 * shard + 5):
            key = f"{shard:05d}{number:04d}"
            row = {"caption": f"number {number}", "re_caption": f"again {number}", "status": "success", "key": key}
            files[f"{key}.jpg"] = encode(Image.new("RGB", (8, 8), (10 * number, 0, 0)), "JPEG")
            files[f"{key}.json"] = json.dumps(row).encode()
            files[f"{key}.txt"] = f"number {number}".encode()
        write_tar(folder / f"{shard:05d}.tar", files)
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 6, "successes": 5}))
        (folder / f"{shard:05d}.parquet").write_bytes(b"img2dataset's table, which is not read")
    return folder


@pytest.fixture
def serve(tmp_path) -> Iterator[Callable[[Path], str]]:
    """Serves a folder by HTTP and returns its address."""
    servers = []

    def start(folder: Path) -> str:
        handler = functools.partial(_Quiet, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """A server that says nothing, and breaks off the first answer for a file beside which `NAME.broken` lies."""

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        mark = path.with_name(path.name + ".broken")
        if not mark.exists():
            super().do_GET()
            return
        mark.unlink()
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True
