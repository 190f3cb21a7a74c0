"""The page as its users meet it, in a headless Chromium."""

import base64
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytestmark = pytest.mark.browser


@pytest.fixture
def slow_model(served: Any) -> Iterator[None]:
    """At most four tokens a second: an answer of 600 takes longer than finding the stop button."""
    hook = served.service.chat.model.register_forward_pre_hook(lambda *_: time.sleep(0.25))
    yield
    hook.remove()


def expected(served: Any, question: str, *names: str, tokens: int) -> str:
    pictures = [Image.open(served.pictures / name) for name in names]
    return served.service.chat.generate([{"role": "user", "content": question}], pictures, max_new_tokens=tokens)


def test_blank_page_explains_itself_and_asks_nothing_of_other_hosts(page: Any, served: Any) -> None:
    assert "Ask about a picture" in page.page.inner_text("#window")
    assert "Send a picture" in page.page.inner_text("#experts")
    # The second example has a question of its own.
    assert page.page.get_by_text("Is there a star?").is_visible()
    elsewhere = [url for url in page.requests if not url.startswith((served.url, "data:", "blob:"))]
    assert not elsewhere


def test_colors_follow_the_systems_light_or_dark(page: Any, served: Any) -> None:
    brightness = {}
    for scheme in ("light", "dark"):
        page.page.emulate_media(color_scheme=scheme)
        page.page.reload()
        page.page.wait_for_selector("#box textarea")
        color = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness[scheme] = sum(int(value) for value in re.findall(r"\d+", color)[:3])
    assert brightness["light"] > 600 > 150 > brightness["dark"]


def test_answer_streams_beside_the_experts_and_can_be_tried_again_edited_and_undone(page: Any, served: Any) -> None:
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
    page.page.locator("#window").get_by_role("button", name="Submit").click()
    page.page.wait_for_selector("#box button.stop-button")
    page.wait_until_idle()
    # The picture stays before the edited text.
    assert page.page.locator("#window img").count() == 1
    assert page.answers == [expected(served, "is it a", "a.png", tokens=40)]

    page.page.get_by_role("button", name="Undo").click()
    page.page.wait_for_selector("#box img")
    assert page.page.input_value("#box textarea") == "is it a"
    assert page.answers == []


def test_layer_slider_changes_the_patches_and_pointing_at_an_expert_fades_the_others(page: Any, served: Any) -> None:
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
    faded.wait_for()
    page.page.wait_for_function("it => getComputedStyle(it).fillOpacity == '0.04'", arg=faded.element_handle())


def test_example_with_its_picture_and_question_is_one_click(page: Any, served: Any) -> None:
    page.answer_length(4)
    page.page.get_by_text("Is there a star?").click()
    page.page.wait_for_selector("#window .bot.message")
    page.wait_until_idle()
    assert page.page.locator("#window .user img").count() == 1
    assert page.answers == [expected(served, "Is there a star?", "b.png", tokens=4)]


def test_stop_ends_the_generation_and_leaves_what_was_said(
    page: Any, served: Any, generating: Callable[[], bool], slow_model: None
) -> None:
    page.answer_length(600)
    page.ask("what is it", served.pictures / "a.png")
    # Several words: a stop before the first one leaves no answer at all.
    said = "(document.querySelector('#window .bot.message')?.innerText ?? '').trim().split(/\\s+/).length > 2"
    page.page.wait_for_function(said)
    assert generating()
    page.page.locator("#box button.stop-button").dispatch_event("click")
    page.wait_until_idle()
    # The whole answer would take minutes; what runs ends with the token that it is at.
    deadline = time.monotonic() + 20
    while generating() and time.monotonic() < deadline:
        page.page.wait_for_timeout(100)
    assert not generating()
    (said,) = page.answers
    assert 0 < len(said.split()) < 600
    page.answer_length(4)
    page.ask("is it")
    page.page.wait_for_function("document.querySelectorAll('#window .bot.message').length == 2")
    page.wait_until_idle()


def test_bad_file_is_told_by_its_content_and_the_next_one_works(page: Any, served: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"<svg>no picture</svg>")
    page.ask("what is it", tmp_path / "bad.png")
    page.page.get_by_text("Cannot read bad.png: its content is not a known picture").first.wait_for()
    assert page.answers == []
    page.page.reload()
    page.page.wait_for_selector("#box textarea")
    page.answer_length(4)
    page.ask("what is it", served.pictures / "a.png")
    page.page.wait_for_selector("#window .bot.message")


def test_conversation_too_long_for_the_model_says_so_in_its_place(page: Any) -> None:
    page.ask("it " * 660)
    page.page.get_by_text("the model reads at most 640; shorten it").wait_for()
    page.wait_until_idle()


def test_pasted_and_camera_pictures_arrive_in_the_message(page: Any, served: Any) -> None:
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
    page.page.wait_for_function("document.querySelector('#camera video')?.readyState >= 2")
    page.page.locator("#camera button[aria-label='capture photo']").click()
    page.page.wait_for_function("document.querySelectorAll('#box img').length == 2")


def test_finished_conversation_is_kept_and_opened_again(page: Any, served: Any) -> None:
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


def test_comparison_gives_both_models_own_answers(page: Any, served: Any) -> None:
    page.tab("Side by side")
    page.answer_length(12)
    page.page.set_input_files("#compare_box input[type=file]", str(served.pictures / "a.png"))
    page.page.wait_for_selector("#compare_box img")
    page.page.fill("#compare_box textarea", "what is it")
    page.page.press("#compare_box textarea", "Enter")
    page.page.wait_for_selector("#compare_box button.stop-button")
    page.page.wait_for_selector("#compare_box button.submit-button")
    messages, images = [{"role": "user", "content": "what is it"}], [Image.open(served.pictures / "a.png")]
    for number, chat in enumerate((served.service.chat, served.service.compared)):
        said = " ".join(page.page.inner_text(f"#answer_{number}").split())
        assert said == chat.generate(messages, images, max_new_tokens=12)


def test_experts_of_a_folder_and_of_a_sentence(page: Any) -> None:
    page.tab("Experts")
    page.page.wait_for_selector("#survey .surest-row")
    assert page.page.locator("#survey .surest-row").count() == 4
    assert page.page.locator("#survey img").count() > 4
    page.page.fill("#sentence textarea", "a red circle")
    page.page.press("#sentence textarea", "Enter")
    page.page.wait_for_selector("#tokens .token")
    words = page.page.locator("#tokens .token").all_inner_texts()
    assert [re.sub(r"\s*\d$", "", word).strip() for word in words][1:4] == ["a", "red", "circle"]


def test_search_shows_the_nearest_pictures_of_both_encoders(page: Any, served: Any) -> None:
    page.tab("Search")
    page.page.fill("#search textarea", "a red circle")
    page.page.press("#search textarea", "Enter")
    page.page.wait_for_selector("#found figure")
    found = served.service.search.nearest("a red circle", 8)
    titles = page.page.locator("#found img").evaluate_all("found => found.map(it => it.title)")
    names = [served.service.search.pictures.name(hit.picture) for hits in found.values() for hit in hits]
    assert titles == names
