"""The page as its users meet it, in a headless Chromium."""

import base64
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install playwright)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt-get install chromium)"),
]
# The background-networking flags keep Chromium itself from looking for hosts outside.
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)
_SECONDS = 30_000


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    """One browser for all tests: its cache saves loading the page's scripts again."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(_FLAGS))
        yield browser.new_context(viewport={"width": 1360, "height": 860})
        browser.close()


class Page:
    """One user's page, by what a user does."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.requests: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.set_default_timeout(_SECONDS)
        page.goto(url)
        page.wait_for_selector("#box textarea")

    def ask(self, text: str, *pictures: Path) -> None:
        if pictures:
            self.page.set_input_files("#box input[type=file]", [str(path) for path in pictures])
            self.page.wait_for_selector("#box img")
        self.page.fill("#box textarea", text)
        self.page.press("#box textarea", "Enter")

    @property
    def answers(self) -> list[str]:
        return [" ".join(text.split()) for text in self.page.locator("#window .bot.message").all_inner_texts()]

    def wait_until_idle(self) -> None:
        self.page.wait_for_selector("#box button.submit-button")

    def answer_length(self, tokens: int) -> None:
        field = self.page.get_by_label("number input for Answer length, tokens at most").locator("visible=true")
        if not field.count():
            self.page.get_by_role("button", name="Answer settings").locator("visible=true").click()
        field.fill(str(tokens))
        field.press("Enter")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()


@pytest.fixture
def page(context: Any, served: Any) -> Iterator[Page]:
    page = Page(context.new_page(), served.url)
    yield page
    page.page.close()


def expected(served: Any, question: str, *names: str, tokens: int) -> str:
    pictures = [Image.open(served.pictures / name) for name in names]
    return served.service.chat.generate([{"role": "user", "content": question}], pictures, max_new_tokens=tokens)


def test_blank_page_explains_itself_and_asks_nothing_of_other_hosts(page: Page, served: Any) -> None:
    assert "Ask about a picture" in page.page.inner_text("#window")
    assert "Send a picture" in page.page.inner_text("#experts")
    # The second example has a question of its own.
    assert page.page.get_by_text("Is there a star?").is_visible()
    elsewhere = [url for url in page.requests if not url.startswith((served.url, "data:", "blob:"))]
    assert not elsewhere


def test_colors_follow_the_systems_light_or_dark(page: Page, served: Any) -> None:
    brightness = {}
    for scheme in ("light", "dark"):
        page.page.emulate_media(color_scheme=scheme)
        page.page.reload()
        page.page.wait_for_selector("#box textarea")
        color = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness[scheme] = sum(int(value) for value in re.findall(r"\d+", color)[:3])
    assert brightness["light"] > 600 > 150 > brightness["dark"]


def test_answer_streams_beside_the_experts_and_can_be_tried_again_edited_and_undone(page: Page, served: Any) -> None:
    page.answer_length(40)
    page.page.evaluate(
        """() => {
            window.lengths = new Set();
            new MutationObserver(() => {
                const message = document.querySelector("#window .bot.message");
                if (message) window.lengths.add(message.innerText.trim().length);
            }).observe(document.querySelector("#window"), {subtree: true, childList: true, characterData: true});
        }"""
    )
    page.ask("what is it", served.pictures / "a.png")
    page.page.wait_for_selector("#window .bot.message")
    page.wait_until_idle()
    answer = expected(served, "what is it", "a.png", tokens=40)
    assert page.answers == [answer]
    assert len(page.page.evaluate("[...window.lengths]")) > 3
    assert page.page.locator("#experts rect.patch").count() == 16

    page.page.get_by_role("button", name="Retry").click()
    page.page.wait_for_selector("#box button.stop-button")
    page.wait_until_idle()
    assert page.answers == [answer]

    page.page.get_by_role("button", name="Edit").click()
    page.page.locator("#window textarea").fill("is it a")
    page.page.get_by_role("button", name="Submit").first.click()
    page.page.wait_for_selector("#box button.stop-button")
    page.wait_until_idle()
    # The picture stayed with the edited message.
    assert page.answers == [expected(served, "is it a", "a.png", tokens=40)]

    page.page.get_by_role("button", name="Undo").click()
    page.page.wait_for_selector("#box img")
    assert page.page.input_value("#box textarea") == "is it a"
    assert page.answers == []


def test_layer_slider_changes_the_patches_and_pointing_at_an_expert_fades_the_others(page: Page, served: Any) -> None:
    page.answer_length(4)
    page.ask("what is it", served.pictures / "a.png")
    page.page.wait_for_selector("#experts rect.patch")
    page.wait_until_idle()
    routing = served.service.routing(Image.open(served.pictures / "a.png"))
    for layer, block in ((2, 2), (1, 0)):
        page.page.locator("#layer input[type=number]").fill(str(layer))
        page.page.locator("#layer input[type=number]").press("Enter")
        page.page.get_by_text(f"Layer {layer}, block {block} of the tower").wait_for()
        classes = page.page.locator("#experts rect.patch").evaluate_all("found => found.map(it => it.classList[1])")
        assert classes == [f"e{expert}" for expert in routing.expert_maps[layer - 1].ravel()]
    used = int(routing.expert_maps[0][0, 0])
    page.page.locator(f"#experts .bar-row.e{used}").first.hover()
    other = next(expert for expert in range(4) if expert != used and (routing.expert_maps[0] == expert).any())
    faded = page.page.locator(f"#experts rect.patch.e{other}").first
    playwright.expect(faded).to_have_css("fill-opacity", "0.04")


def test_stop_ends_the_generation_and_leaves_what_was_said(
    page: Page, served: Any, generating: Callable[[], bool]
) -> None:
    page.answer_length(600)
    page.ask("what is it", served.pictures / "a.png")
    page.page.wait_for_selector("#window .bot.message")
    assert generating()
    page.page.click("#box button.stop-button")
    page.wait_until_idle()
    page.page.wait_for_timeout(300)
    assert not generating()
    (said,) = page.answers
    assert 0 < len(said.split()) < 600
    page.answer_length(4)
    page.ask("is it")
    page.page.wait_for_function("document.querySelectorAll('#window .bot.message').length == 2")


def test_bad_file_is_told_by_its_content_and_the_next_one_works(page: Page, served: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"<svg>no picture</svg>")
    page.ask("what is it", tmp_path / "bad.png")
    page.page.get_by_text("Cannot read bad.png: its content is not a known picture").first.wait_for()
    assert page.answers == []
    page.page.reload()
    page.page.wait_for_selector("#box textarea")
    page.answer_length(4)
    page.ask("what is it", served.pictures / "a.png")
    page.page.wait_for_selector("#window .bot.message")


def test_conversation_too_long_for_the_model_says_so_in_its_place(page: Page) -> None:
    page.ask("it " * 660)
    page.page.get_by_text("the model reads at most 640; shorten it").wait_for()
    page.wait_until_idle()


def test_pasted_and_camera_pictures_arrive_in_the_message(page: Page, served: Any) -> None:
    encoded = base64.b64encode((served.pictures / "a.png").read_bytes()).decode()
    page.page.evaluate(
        """encoded => {
            const bytes = Uint8Array.from(atob(encoded), it => it.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "pasted.png", {type: "image/png"}));
            document.querySelector("#box textarea").dispatchEvent(
                new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true}));
        }""",
        encoded,
    )
    page.page.wait_for_selector("#box img")
    page.page.get_by_role("button", name="Camera").click()
    page.page.locator("#camera").get_by_text("Click to Access Webcam").click()
    page.page.locator("#camera button[aria-label='capture photo']").click()
    page.page.wait_for_function("document.querySelectorAll('#box img').length == 2")


def test_finished_conversation_is_kept_and_opened_again(page: Page, served: Any) -> None:
    page.answer_length(4)
    page.ask("is it kept", served.pictures / "a.png")
    page.page.wait_for_selector("#window .bot.message")
    page.wait_until_idle()
    answers = page.answers
    page.page.locator("#history button.toggle-button").click()
    page.page.get_by_role("button", name="New conversation").click()
    page.page.wait_for_function("document.querySelectorAll('#window .bot.message').length == 0")
    page.page.locator("#history").get_by_text("is it kept").click()
    page.page.wait_for_selector("#window .bot.message")
    assert page.answers == answers
    assert page.page.locator("#window img").count() == 1
    page.page.wait_for_selector("#experts rect.patch")


def test_comparison_gives_both_models_own_answers(page: Page, served: Any) -> None:
    page.tab("Side by side")
    page.answer_length(12)
    page.page.set_input_files("#compare_box input[type=file]", str(served.pictures / "a.png"))
    page.page.wait_for_selector("#compare_box img")
    page.page.fill("#compare_box textarea", "what is it")
    page.page.press("#compare_box textarea", "Enter")
    page.page.wait_for_selector("#compare_box button.stop-button")
    page.page.wait_for_selector("#compare_box button.submit-button", timeout=_SECONDS)
    messages, images = [{"role": "user", "content": "what is it"}], [Image.open(served.pictures / "a.png")]
    for number, chat in enumerate((served.service.chat, served.service.compared)):
        said = " ".join(page.page.inner_text(f"#answer_{number}").split())
        assert said == chat.generate(messages, images, max_new_tokens=12)


def test_experts_of_a_folder_and_of_a_sentence(page: Page) -> None:
    page.tab("Experts")
    page.page.wait_for_selector("#survey .surest-row")
    assert page.page.locator("#survey .surest-row").count() == 4
    assert page.page.locator("#survey img").count() > 4
    page.page.fill("#sentence textarea", "a red circle")
    page.page.press("#sentence textarea", "Enter")
    page.page.wait_for_selector("#tokens .token")
    words = page.page.locator("#tokens .token").all_inner_texts()
    assert [re.sub(r"\s*\d$", "", word).strip() for word in words][1:4] == ["a", "red", "circle"]


def test_search_shows_the_nearest_pictures_of_both_encoders(page: Page, served: Any) -> None:
    page.tab("Search")
    page.page.fill("#search textarea", "a red circle")
    page.page.press("#search textarea", "Enter")
    page.page.wait_for_selector("#found figure")
    found = served.service.search.nearest("a red circle", 8)
    titles = page.page.locator("#found img").evaluate_all("found => found.map(it => it.title)")
    names = [served.service.search.pictures.name(hit.picture) for hits in found.values() for hit in hits]
    assert titles == names
