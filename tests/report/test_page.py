"""The page of a report in a browser: what it shows, and how it is used without a mouse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvpager.recording.reader import Recording
from kvpager.recording.replay import ReplayedState
from kvpager.report.writer import write_report
from tests.support.browsers import launched
from tests.support.recordings import write_recording

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.browser

NUM_STEPS = 60
EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from launched()


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return write_recording(
        folder / "run.jsonl", num_steps=NUM_STEPS, every=1.2, tiers=("disk",), model=EVIL
    )


class Page:
    """A page that is open, and what it sent and said since."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.messages: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("dialog", lambda dialog: self.messages.append(dialog.message))
        self.page.goto(file.as_uri())
        self.page.locator("html[data-ready=yes]").wait_for()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def figures(self, side: str) -> str:
        return self.text(f"#{side} .verdict")


@pytest.fixture(scope="module")
def report(recording: Path) -> Path:
    write_report(recording, recording.with_suffix(".html"))
    return recording.with_suffix(".html")


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Page]:
    page = Page(browser, report)
    yield page
    page.context.close()
    assert page.messages == []  # no error, no warning, no dialog
    assert page.requests == [report.as_uri()]


def test_verdict_is_that_of_the_recorded_counts(opened: Page, recording: Path) -> None:
    source = Recording(recording)
    state = ReplayedState(source.header)
    opened.page.locator("#step").focus()
    opened.page.keyboard.press("Home")
    for step in source:
        state.apply(step)
        if step.step % 20 == 19:
            share = 100 * state.counts.tokens / (state.counts.held * source.header.block_size)
            assert opened.figures("paged").startswith(f"{share:.0f}%")
            assert opened.text("#step-label").startswith(f"step {step.step} of {NUM_STEPS - 1},")
        opened.page.keyboard.press("ArrowRight")


def test_slider_goes_to_the_ends_by_keyboard(opened: Page) -> None:
    slider = opened.page.locator("#step")
    slider.focus()
    opened.page.keyboard.press("End")
    last = opened.figures("reserved")
    assert slider.get_attribute("aria-valuetext").startswith(f"step {NUM_STEPS - 1} of")
    opened.page.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext").startswith("step 0 of")
    assert opened.figures("reserved") != last


def test_play_moves_the_step_until_it_is_paused(opened: Page) -> None:
    button = opened.page.get_by_role("button", name="Play")
    opened.page.locator("#step").fill("0")
    button.click()
    sync_api.expect(opened.page.locator("#step-label")).not_to_contain_text("step 0 of")
    opened.page.get_by_role("button", name="Pause").click()
    sync_api.expect(button).to_be_visible()
    assert 0 < int(opened.page.locator("#step").input_value()) < NUM_STEPS


def test_play_starts_again_after_the_last_step_and_stops_there(opened: Page) -> None:
    slider = opened.page.locator("#step")
    slider.fill(str(NUM_STEPS - 3))
    opened.page.locator("#play").click()
    sync_api.expect(slider).to_have_value(str(NUM_STEPS - 1))
    sync_api.expect(opened.page.get_by_role("button", name="Play")).to_be_visible()
    opened.page.locator("#play").click()
    sync_api.expect(slider).not_to_have_value(str(NUM_STEPS - 1))


@pytest.mark.parametrize("side", ["reserved", "paged"])
def test_arrow_keys_move_between_blocks_and_say_each(opened: Page, side: str) -> None:
    said = opened.page.locator("#said")
    opened.page.locator(f"#{side} canvas").focus()
    assert said.inner_text().startswith("Block 0 ")
    opened.page.keyboard.press("ArrowRight")
    assert said.inner_text().startswith("Block 1 ")
    opened.page.keyboard.press("End")
    assert said.inner_text().startswith("Block 63 ")
    opened.page.keyboard.press("ArrowRight")
    assert said.inner_text().startswith("Block 63 ")
    opened.page.keyboard.press("Escape")
    assert opened.page.locator("#tip").is_hidden()


def test_hover_over_a_block_says_what_is_in_it(opened: Page) -> None:
    opened.page.locator("#paged canvas").hover(position={"x": 8, "y": 8})
    assert re.fullmatch(r"Block 0 (is|belongs to) .*\.", opened.text("#tip"))


def test_each_element_that_can_be_focused_explains_itself_in_one_sentence(opened: Page) -> None:
    page, seen = opened.page, 0
    for element in page.locator("[tabindex='0']:visible, button.chip:visible").all():
        if element.get_attribute("role") in ("application", "region"):
            assert element.get_attribute("aria-label") or element.get_attribute("aria-labelledby")
            continue
        element.focus()
        words = opened.text("#tip")
        assert words.endswith("."), words
        assert len(words) < 200
        seen += 1
    assert seen > 20


def test_enter_on_a_block_shows_the_life_of_its_request(opened: Page) -> None:
    page = opened.page
    page.locator("#paged canvas").focus()
    for _ in range(63):
        if found := re.search(r"belongs to request (\d+)", opened.text("#said")):
            break
        page.keyboard.press("ArrowRight")
    assert found is not None
    page.keyboard.press("Enter")
    assert page.locator("#request").input_value() == found[1]
    assert page.get_by_role("group", name=f"The life of request {found[1]}").count() == 1


def test_choosing_a_request_draws_its_life(opened: Page) -> None:
    opened.page.locator("#request").select_option("3")
    bar = opened.page.locator("#life rect[role=img]").first
    assert bar.get_attribute("aria-label").startswith("Request 3 ")


def test_arrow_keys_on_a_chart_move_the_step(opened: Page) -> None:
    opened.page.locator("#step").fill("10")
    opened.page.locator("#occupancy svg").focus()
    opened.page.keyboard.press("ArrowRight")
    assert opened.page.locator("#step").input_value() == "11"
    assert opened.text("#said").startswith("Step 11: ")


def test_dark_mode_changes_page_and_maps(browser: Any, report: Path, opened: Page) -> None:
    dark = Page(browser, report, color_scheme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    pixels = "document.querySelector('#paged canvas').toDataURL()"
    for what in (colour, pixels):
        assert dark.page.evaluate(what) != opened.page.evaluate(what)
    before = opened.page.evaluate(pixels)
    opened.page.emulate_media(color_scheme="dark")  # while it is open
    opened.page.locator("#step").fill("1")
    assert opened.page.evaluate(colour) == dark.page.evaluate(colour)
    assert opened.page.evaluate(pixels) != before
    dark.context.close()


def test_page_does_not_scroll_sideways_on_a_phone(browser: Any, report: Path) -> None:
    narrow = Page(browser, report, viewport={"width": 360, "height": 700})
    assert narrow.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert narrow.messages == []
    narrow.context.close()


def test_names_of_a_recording_stay_text(opened: Page) -> None:
    assert EVIL in opened.text("#run-name")
    assert opened.page.locator("img").count() == 0
    assert opened.page.locator("script").count() == 2


def test_policy_refuses_every_request(browser: Any, report: Path) -> None:
    page = Page(browser, report)
    for attempt in ("fetch('http://127.0.0.1:9/')", "fetch(location.href)"):
        assert page.page.evaluate(f"{attempt}.then(() => 'sent', () => 'refused')") == "refused"
    assert any("Content Security Policy" in message for message in page.messages)
    page.context.close()


def test_many_blocks_are_added_up_in_cells(browser: Any, tmp_path: Path) -> None:
    file = write_recording(
        tmp_path / "run.jsonl", num_steps=30, num_blocks=5000, every=1, prompt=600
    )
    write_report(file, tmp_path / "run.html")
    page = Page(browser, tmp_path / "run.html")
    page.page.locator("#paged canvas").focus()
    assert re.match(r"Blocks 0 to 4: of their slots, \d+% hold tokens", page.text("#said"))
    assert "1 cell = 5 blocks" in page.text("#legend")
    assert page.messages == []
    page.context.close()
