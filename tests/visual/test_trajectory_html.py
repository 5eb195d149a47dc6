"""The page holds the trajectory exactly, whatever its tokens are, in little room and with nothing from outside."""

import base64
import html as markup
import json
import re
import zlib
from importlib import resources

import numpy as np
import pytest

from hdlm_jax.data.tokenizers import bytes_tokenizer
from hdlm_jax.diffusion import hyperschedules
from hdlm_jax.errors import UserError
from hdlm_jax.generation.trajectory import Trajectory
from hdlm_jax.visual import trajectory_html
from hdlm_jax.visual.token_texts import token_texts, visible
from tests.visual.trajectories import AWKWARD, made

CASES = {
    "slide": made(hyperschedules.slide(12, 4, 2), len(AWKWARD), prompts=(0, 3)),
    "flat, no mask": made(hyperschedules.flat(9, 7), 300, masked=False),
    "many levels": made(hyperschedules.slide(40, 30, "1/20"), 5),
    "table": made(hyperschedules.from_levels(np.array([[2, 2, 2], [2, 1, 2], [1, 0, 2], [0, 0, 0]])), 3),
    "all given": made(hyperschedules.slide(6, 2, 1).with_prompt(6), 4),
}


def text_of(token: int) -> str:
    return AWKWARD[token] if token < len(AWKWARD) else f" {token}"


def read(page: str) -> dict:
    """The data of a page, as trajectory.js reads them."""
    packed = re.search(r'<script id="data" type="text/plain">([\w+/=]*)</script>', page)[1]
    data = zlib.decompress(base64.b64decode(packed))
    size = int.from_bytes(data[:4], "little")
    run, at = json.loads(data[4 : 4 + size]), 4 + size
    shape = len(run["steps"]), run["length"]
    for name, planes in run["arrays"]:
        end = at + planes * shape[0] * shape[1]
        bytes_PxFxL = np.frombuffer(data[at:end], np.uint8).reshape(planes, *shape).astype(int)
        differences = sum(plane << 8 * i for i, plane in enumerate(bytes_PxFxL))
        run[name], at = np.cumsum(differences, axis=0) % 256**planes, end
    assert at == len(data)
    return run


def assert_holds(page: str, trajectory: Trajectory, text: int, frames: np.ndarray) -> None:
    run, ids = read(page), trajectory.tokens[frames, text]
    hs, origin = trajectory.hyperschedule, trajectory.origins[text]
    np.testing.assert_array_equal(run["steps"], trajectory.steps[frames])
    np.testing.assert_array_equal(run["tokens"] == run["mask"], ids == trajectory.mask)
    shown = np.array(run["texts"])[run["tokens"]]
    known = np.vectorize(lambda token: visible(text_of(token)), otypes=[object])(ids)
    np.testing.assert_array_equal(shown[ids != trajectory.mask], known[ids != trajectory.mask])
    confidence = trajectory.confidence[frames, text]
    np.testing.assert_array_equal(run["confidence"] == trajectory_html.UNKNOWN, np.isnan(confidence))
    np.testing.assert_allclose(
        run["confidence"][~np.isnan(confidence)] / 100, confidence[~np.isnan(confidence)], atol=0.00501
    )
    for frame, step in enumerate(trajectory.steps[frames]):
        levels, regions = np.asarray(hs.levels_at(step)), np.asarray(hs.regions(step))
        given = trajectory.given[text]
        free = hs.length - max(0, origin + hs.length - len(given))
        np.testing.assert_array_equal(run["levels"][frame][origin : origin + free], levels[:free])
        expected = np.where(given[origin : origin + free], trajectory_html.GIVEN, regions[:free])
        np.testing.assert_array_equal(run["states"][frame][origin : origin + free], expected)
        assert (run["states"][frame][:origin] == trajectory_html.GIVEN).all()
        start, stop = hs.window(int(step))
        length = len(given)
        assert run["windows"][frame] == [min(start + origin, length), min(stop + origin, length)]


@pytest.mark.parametrize("name", CASES)
def test_the_page_holds_every_frame(name: str):
    trajectory = CASES[name]
    for text in range(trajectory.tokens.shape[1]):
        page = trajectory_html.html(trajectory, text_of, text)
        assert_holds(page, trajectory, text, np.arange(len(trajectory.steps)))


def test_nothing_of_a_text_or_title_is_markup():
    title = "</title><script>alert('{{data}}')</script>"
    page = trajectory_html.html(CASES["slide"], text_of, text=1, title=title)
    template = resources.files("hdlm_jax.visual").joinpath("trajectory.html").read_text()
    assert page.lower().count("<script") == page.lower().count("</script") == template.count("<script") == 2
    assert page.count(markup.escape(title)) == 2
    assert title not in page


def test_nothing_comes_from_outside():
    page = trajectory_html.html(CASES["slide"], text_of)
    assert re.findall(r"https?:|//[a-z]|url\(|@import|\bsrc=|<link|<img|fetch\(|import\(", page) == []
    assert "default-src 'none'" in page


def largest(num_tokens: int, frames: int = 257, length: int = 1024) -> Trajectory:
    """Every token of every frame is another one: nothing can be left out."""
    rng, hs = np.random.default_rng(0), hyperschedules.flat(length, frames - 1)
    tokens = rng.integers(0, num_tokens, (frames, 1, length)).astype(np.int32)
    given, origins = np.zeros((1, length), bool), np.zeros(1, np.int32)
    return Trajectory(np.arange(frames, dtype=np.int32), tokens, rng.random(tokens.shape), given, origins, hs, None)


def test_256_calls_on_1024_tokens_of_8192_fit_into_a_megabyte():
    trajectory = largest(8192)
    page = trajectory_html.html(trajectory, text_of)
    assert len(page.encode()) < trajectory_html.MAX_BYTES
    assert_holds(page, trajectory, 0, np.arange(257))


def test_what_does_not_fit_loses_frames_but_neither_end():
    trajectory = largest(50257)
    page = trajectory_html.html(trajectory, text_of)
    assert len(page.encode()) < trajectory_html.MAX_BYTES
    assert_holds(page, trajectory, 0, np.arange(0, 257, 2))


@pytest.mark.parametrize("text", [-1, 2])
def test_a_text_that_is_not_there(text: int):
    with pytest.raises(UserError, match=f"text: got {text}; allowed: 0 .. 1"):
        trajectory_html.html(CASES["slide"], text_of, text)


def test_a_page_is_saved_whole_under_a_name_that_opens_in_a_browser(tmp_path):
    page = trajectory_html.html(CASES["slide"], text_of)
    path = trajectory_html.save(page, tmp_path / "new" / "x.html")
    assert path.read_text(encoding="utf-8") == page
    assert [entry.name for entry in path.parent.iterdir()] == ["x.html"]
    with pytest.raises(UserError, match=r"out: got .*x.png'; allowed: a file name ending in .html"):
        trajectory_html.save(page, tmp_path / "x.png")
    with pytest.raises(UserError, match="cannot be written"):
        trajectory_html.save(page, path / "x.html")


def test_a_notebook_gets_every_text_escaped_and_the_page_of_the_first():
    trajectory, tokenizer = CASES["slide"], bytes_tokenizer()
    output = trajectory_html.generation_html(["one <i>", "two"], trajectory, tokenizer, title="A & B")
    assert re.findall(r"<pre[^>]*>([^<]*)</pre>", output) == ["one &lt;i&gt;", "two"]
    assert "<b>A &amp; B</b>" in output
    (page,) = re.findall(r'srcdoc="([^"]*)"', output)
    assert markup.unescape(page) == trajectory_html.html(trajectory, token_texts(tokenizer), title="A & B")


def test_a_notebook_gets_texts_alone_where_nothing_was_recorded():
    assert "iframe" not in trajectory_html.generation_html(["one", "two"])
