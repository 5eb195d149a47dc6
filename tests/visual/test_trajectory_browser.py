"""The page works in a real browser: it loads in silence, the scrubber moves it, tokens tell their history."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from hdlm_jax.diffusion import hyperschedules
from hdlm_jax.visual import trajectory_html
from tests.visual.trajectories import AWKWARD, made

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
TRAJECTORY = made(hyperschedules.slide(30, 8, 2), len(AWKWARD) + 20, prompts=(0, 4))
TEXT = 1
STATES = ("settled", "active", "worthless", "given")


def text_of(token: int) -> str:
    return AWKWARD[token] if token < len(AWKWARD) else f" word{token}"


class Opened(NamedTuple):
    """A page in the browser, and what it complained about."""

    page: object
    complaints: list[str]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """A headless browser of the system."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser found: none of {', '.join(BROWSERS)} is on the PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path: Path) -> Iterator[Opened]:
    """The page of the trajectory, at its last step; whatever it complains about fails the test."""
    path = trajectory_html.save(trajectory_html.html(TRAJECTORY, text_of, TEXT, "A <title>"), tmp_path / "x.html")
    yield from _open(browser, path)


def _open(browser, path: Path) -> Iterator[Opened]:
    page, complaints = browser.new_page(viewport={"width": 900, "height": 900}), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: request.url == path.as_uri() or complaints.append(request.url))
    page.goto(path.as_uri())
    page.locator(".token[data-position='0']").wait_for()
    yield Opened(page, complaints)
    page.close()
    assert complaints == []


def tokens(page) -> list[str]:
    """The text of every position; the mask as it is shown."""
    return page.locator("#text .token").evaluate_all("all => all.map(token => token.textContent)")


def assert_shows(page, frame: int) -> None:
    """Tokens, states, marks and counts are those of the frame."""
    ids, states = TRAJECTORY.tokens[frame, TEXT], trajectory_html.states(TRAJECTORY, TEXT)[frame]
    corrected = TRAJECTORY.corrected()[: frame + 1, TEXT]
    expected = []
    for token, state in zip(ids, states, strict=True):
        text = "\u00b7" if token == TRAJECTORY.mask else trajectory_html.visible(text_of(int(token)))
        expected.append(text.replace("\n", "") if STATES[state] == "worthless" else text)
    expected = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in expected]
    assert tokens(page) == expected
    classes = page.locator("#text .token").evaluate_all("all => all.map(token => [...token.classList])")
    assert [STATES.index(next(name for name in of if name in STATES)) for of in classes] == states.tolist()
    assert ["mask" in of for of in classes] == (ids == TRAJECTORY.mask).tolist()
    assert ["corrected" in of for of in classes] == corrected.any(0).tolist()
    assert ["fresh" in of for of in classes] == corrected[-1].tolist()
    counts = {name: int(page.locator(f"#count-{name}").inner_text()) for name in (*STATES, "masked")}
    assert counts == {name: int((states == i).sum()) for i, name in enumerate(STATES)} | {
        "masked": int((ids == TRAJECTORY.mask).sum())
    }
    assert int(page.locator("#count-corrections-so-far").inner_text()) == corrected.sum()
    assert page.locator("#now").inner_text() == f"step {frame} of {len(TRAJECTORY.steps) - 1}"
    start, stop = TRAJECTORY.windows()[frame, TEXT]
    where = f"next window: {start} \u2013 {stop - 1}" if stop > start else "finished"
    assert page.locator("#window").inner_text() == where


def test_the_page_opens_at_the_end_under_its_title(opened: Opened):
    assert opened.page.title() == "A <title>"
    assert opened.page.locator("h1").inner_text() == "A <title>"
    assert_shows(opened.page, len(TRAJECTORY.steps) - 1)


def test_the_slider_goes_to_every_step(opened: Opened):
    for frame in range(len(TRAJECTORY.steps)):
        opened.page.locator("#step").fill(str(frame))
        assert_shows(opened.page, frame)


def test_arrow_keys_and_buttons_step(opened: Opened):
    page, last = opened.page, len(TRAJECTORY.steps) - 1
    page.keyboard.press("ArrowLeft")
    assert_shows(page, last - 1)
    page.keyboard.press("Home")
    assert_shows(page, 0)
    page.keyboard.press("ArrowRight")
    page.locator("#on").click()
    assert_shows(page, 2)
    page.locator("#back").click()
    assert_shows(page, 1)
    page.locator("#step").focus()
    page.keyboard.press("ArrowRight")  # the slider's own key: one step, not two
    assert_shows(page, 2)
    page.keyboard.press("End")
    assert_shows(page, last)


def test_play_runs_from_the_start_and_pauses(opened: Opened):
    page = opened.page
    page.locator("#play").click()
    page.locator("#now", has_text="step 2 of").wait_for()
    assert page.locator("#play").get_attribute("aria-label") == "Pause"
    page.keyboard.press("ArrowLeft")
    frame = int(page.locator("#step").input_value())
    page.wait_for_timeout(900)
    assert_shows(page, frame)
    assert page.locator("#play").get_attribute("aria-label") == "Play"


def history(position: int) -> list[str]:
    """The lines that tell what happened to a position."""
    lines = []
    shown = lambda token: "mask" if token == TRAJECTORY.mask else f"\u2423word{token}"
    for frame in range(1, len(TRAJECTORY.steps)):
        old, new = TRAJECTORY.tokens[frame - 1 : frame + 1, TEXT, position]
        if old != new:
            percent = round(100 * float(TRAJECTORY.confidence[frame, TEXT, position]))
            lines.append(f"step {frame} {shown(old)} \u2192 {shown(new)} {percent} %")
    return lines


def plain_and_corrected() -> int:
    """A position that was corrected and held none of the awkward tokens."""
    plain = (TRAJECTORY.tokens[:, TEXT] >= len(AWKWARD)).all(0)
    return int(np.flatnonzero(plain & TRAJECTORY.corrected()[:, TEXT].any(0))[0])


@pytest.mark.parametrize("way", ["hover", "focus"])
def test_a_corrected_token_tells_its_history(opened: Opened, way: str):
    page, position = opened.page, plain_and_corrected()
    assert page.locator("#tip").is_hidden()
    getattr(page.locator(f"[data-position='{position}']"), way)()
    tip = page.locator("#tip")
    assert tip.is_visible()
    lines = tip.locator("tr").evaluate_all("all => all.map(row => [...row.cells].map(c => c.textContent).join(' '))")
    assert lines == history(position)
    assert f"position {position}" in tip.inner_text()
    box = tip.bounding_box()
    assert 0 <= box["x"] <= 900 - box["width"]
    if way == "focus":
        page.keyboard.press("Escape")
    else:
        page.mouse.move(2, 2)
    assert tip.is_hidden()


def test_the_tab_key_stops_at_corrected_tokens_alone(opened: Opened):
    stops = opened.page.locator("#text [tabindex='0']").evaluate_all("all => all.map(token => +token.dataset.position)")
    assert stops == np.flatnonzero(TRAJECTORY.corrected()[:, TEXT].any(0)).tolist()


def test_the_window_is_marked_over_the_levels_of_the_step(opened: Opened):
    page, frame = opened.page, 5
    page.locator("#step").fill(str(frame))
    strip, box = page.locator("#strip").bounding_box(), page.locator("#strip .window").bounding_box()
    start, stop = TRAJECTORY.windows()[frame, TEXT]
    length = TRAJECTORY.tokens.shape[2]
    assert box["x"] - strip["x"] == pytest.approx(strip["width"] * start / length, abs=1)
    assert box["width"] == pytest.approx(strip["width"] * (stop - start) / length, abs=1)
    program = """canvas => {
      const row = canvas.getContext("2d").getImageData(0, 5, canvas.width, 1).data;
      const at = (i) => 4 * Math.floor((i + 0.5) / LENGTH * canvas.width);
      return Array.from({ length: LENGTH }, (_, i) => row.slice(at(i), at(i) + 3).join());
    }""".replace("LENGTH", str(length))
    colors = page.locator("#strip canvas").evaluate(program)
    levels = TRAJECTORY.levels()[frame, TEXT]
    assert len(set(zip(colors, levels.tolist(), strict=True))) == len(set(levels.tolist())) == len(set(colors))
    assert colors[0] == "47,95,158"  # settled: the first colour of the scale
    assert colors[-1] == "184,32,47"


def test_a_click_on_the_levels_goes_to_that_step(opened: Opened):
    page, frame = opened.page, 4
    box = page.locator("#map").bounding_box()
    page.mouse.click(box["x"] + 50, box["y"] + box["height"] * (frame + 0.5) / len(TRAJECTORY.steps))
    assert_shows(page, frame)


def test_the_page_works_inside_a_notebook(browser, tmp_path: Path):
    path = tmp_path / "cell.html"
    output = trajectory_html.generation_html(["one", "two <b>"], TRAJECTORY)
    path.write_text(f"<!doctype html><meta charset='utf-8'>{output}", encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    frame = page.frame_locator("iframe")
    assert frame.locator(".token[data-position='0']").inner_text() == str(TRAJECTORY.tokens[-1, 0, 0])
    frame.locator("#step").fill("3")
    assert frame.locator("#now").inner_text() == f"step 3 of {len(TRAJECTORY.steps) - 1}"
    assert "two <b>" in page.locator("body").inner_text()
    page.close()
