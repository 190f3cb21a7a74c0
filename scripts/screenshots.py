"""Makes the pictures of docs/demo.md: starts the demo, does what they show in a headless Chromium, writes small PNGs.

    .venv/bin/python scripts/screenshots.py --run outputs/quickstart [--compare outputs/llava_dense/model]

Needs the extra `dev` (playwright) and the system's Chromium (Debian: apt-get install chromium).
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from vision_moe.files import replacing

_CHECKOUT = Path(__file__).resolve().parent.parent
_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
_PORT = 7919
_SECONDS = 120
_COLORS = 256
_MAX_BYTES = 150_000


def main() -> None:
    """Writes docs/images/demo_*.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a quick start")
    parser.add_argument("--model", help="another LLaVA than the run's")
    parser.add_argument("--compare", help="LLaVA to set beside it; without it there is no picture of the comparison")
    parser.add_argument("--output", type=Path, default=_CHECKOUT / "docs" / "images")
    args = parser.parse_args()
    command = [sys.executable, "-m", "demo.app", "--run", str(args.run), "--port", str(_PORT)]
    for flag in ("model", "compare"):
        if getattr(args, flag):
            command += [f"--{flag}", getattr(args, flag)]
    server = subprocess.Popen(command, cwd=_CHECKOUT, env={**os.environ, "PYTHONPATH": str(_CHECKOUT)})
    try:
        _wait(server)
        _take(args, sorted((args.run / "scenes" / "images" / "test").glob("*.jpg")))
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait(server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit("screenshots: the demo ended before it answered; its message stands above")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{_PORT}/health", timeout=2).read()
            return
        except OSError:
            time.sleep(1)
    sys.exit(f"screenshots: the demo did not answer in {_SECONDS} seconds")


def _take(args: argparse.Namespace, pictures: list[Path]) -> None:
    states: dict[str, tuple[str, Callable[[Page, list[Path]], Any]]] = {
        "blank": ("light", lambda page, _: None),
        "chat": ("light", _chat),
        "chat_dark": ("dark", _chat_dark),
        "experts": ("light", _experts),
        "search": ("light", _search),
        "error": ("light", _error),
    }
    if args.compare:
        states["side_by_side"] = ("light", _side_by_side)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=list(_FLAGS))
        for name, (scheme, act) in states.items():
            context = browser.new_context(viewport={"width": 1240, "height": 840}, color_scheme=scheme)  # type: ignore[arg-type]
            page = context.new_page()
            page.set_default_timeout(_SECONDS * 1000)
            page.goto(f"http://127.0.0.1:{_PORT}")
            page.wait_for_selector("#box textarea")
            act(page, pictures)
            page.wait_for_timeout(800)
            _write(page.screenshot(full_page=name in ("experts", "search")), args.output / f"demo_{name}.png")
            context.close()
        browser.close()


def _write(png: bytes, path: Path) -> None:
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(_COLORS, dither=Image.Dither.NONE)
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", optimize=True)
    print(f"{path} {path.stat().st_size:,} bytes")
    if path.stat().st_size > _MAX_BYTES:
        sys.exit(f"screenshots: {path} is larger than {_MAX_BYTES:,} bytes")


def _ask(page: Page, picture: Path, question: str, box: str = "#box") -> None:
    page.set_input_files(f"{box} input[type=file]", str(picture))
    page.wait_for_selector(f"{box} img")
    page.fill(f"{box} textarea", question)
    page.press(f"{box} textarea", "Enter")
    page.wait_for_selector(f"{box} button.stop-button")
    page.wait_for_selector(f"{box} button.submit-button")


def _chat(page: Page, pictures: list[Path]) -> None:
    _ask(page, pictures[0], "Describe the image.")


def _chat_dark(page: Page, pictures: list[Path]) -> None:
    _ask(page, pictures[2], "What is the background?")
    page.locator("#layer input[type=number]").fill("2")
    page.locator("#layer input[type=number]").press("Enter")
    page.get_by_text("Layer 2, block").wait_for()


def _experts(page: Page, _: list[Path]) -> None:
    page.get_by_role("tab", name="Experts").click()
    page.wait_for_selector("#survey .surest")
    page.fill("#sentence textarea", "A large red circle above a small blue square.")
    page.press("#sentence textarea", "Enter")
    page.wait_for_selector("#tokens .token")


def _search(page: Page, _: list[Path]) -> None:
    page.get_by_role("tab", name="Search").click()
    page.fill("#search textarea", "a small star to the left of a large triangle")
    page.press("#search textarea", "Enter")
    page.wait_for_selector("#found figure")


def _side_by_side(page: Page, pictures: list[Path]) -> None:
    page.get_by_role("tab", name="Side by side").click()
    _ask(page, pictures[1], "Describe the image.", box="#compare_box")


def _error(page: Page, _: list[Path]) -> None:
    page.set_input_files(
        "#box input[type=file]", {"name": "holiday.png", "mimeType": "image/png", "buffer": b"not a picture"}
    )
    page.wait_for_selector("#box img, #box .thumbnail-item")
    page.fill("#box textarea", "What is in it?")
    page.press("#box textarea", "Enter")
    page.get_by_text("Cannot read holiday.png").first.wait_for()


if __name__ == "__main__":
    main()
