"""The notebooks run from top to bottom; what is kept in them is small, whole and of no machine."""

import base64
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="running notebooks needs packages (extra notebooks)")

import nbclient
import nbformat

from tests import notebooks

NAMES = ["1_hyperschedules", "2_noising", "3_generate", "4_scale"]
REPOSITORY = "https://colab.research.google.com/github/hdlm-jax/hdlm_jax/blob/main/experiments/notebooks/"
PICTURES = {"1_hyperschedules": 10, "2_noising": 12, "3_generate": 4, "4_scale": 1}  # at least
SAID = {  # what a notebook must find, whatever its size
    "1_hyperschedules": [r"regions:", r"allowed: calls that each lower some level", r"for a 'prefix' model"],
    "2_noising": [r"standard errors"],
    "3_generate": [r"prefix: the ending is seen from 6 of", r"full: the ending is seen from (\d+) of \1 positions"],
    "4_scale": [r"8 devices", r"fresh start", r"resumed at step 4", r"bit for bit the same: True"],
}


def path_of(name):
    return notebooks.FOLDER / f"{name}.ipynb"


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def said(notebook):
    """All text that was printed or shown, as one line."""
    texts = [output.get("text", "") for output in outputs(notebook)]
    return " ".join(" ".join(texts).split())


def pictures(notebook):
    found = [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert all(base64.b64decode(png).startswith(b"\x89PNG") for png in found)
    return found


def assert_tells_its_story(name, notebook):
    assert len(pictures(notebook)) >= PICTURES[name]
    for words in SAID[name]:
        assert re.search(words, said(notebook)), f"{name} does not say {words!r}"


def test_these_are_all():
    assert sorted(path.stem for path in notebooks.FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_runs_at_the_smoke_size(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HDLM_RUN", str(tmp_path / "none"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    assert_tells_its_story(name, notebooks.run(path_of(name), smoke=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_at_its_full_size(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HDLM_RUN", str(tmp_path / "none"))
    assert_tells_its_story(name, notebooks.run(path_of(name), smoke=False))


def test_a_cell_that_fails_is_told(tmp_path):
    bad = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(bad, tmp_path / "bad.ipynb")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        notebooks.run(tmp_path / "bad.ipynb", smoke=True)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept(name):
    text = path_of(name).read_text(encoding="utf-8")
    assert len(text.encode()) < notebooks.MAX_BYTES
    assert re.search(r"/(home|root|tmp|work|Users)/", text) is None, "a path of some machine"
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert {output.get("name") for output in outputs(notebook)} <= {None, "stdout"}
    assert [output for output in outputs(notebook) if output.output_type == "error"] == []


@pytest.mark.parametrize("name", NAMES)
def test_opens_in_colab_and_installs_first(name):
    first, install, size = nbformat.read(path_of(name), as_version=4).cells[:3]
    assert first.cell_type == "markdown" and f"]({REPOSITORY}{name}.ipynb)" in first.source
    assert 'find_spec("hdlm_jax") is None' in install.source and "%pip install" in install.source
    assert 'os.environ.get("HDLM_NOTEBOOK") == "smoke"' in size.source


@pytest.mark.parametrize("name", NAMES)
def test_its_links_lead_somewhere(name):
    cells = json.loads(path_of(name).read_text(encoding="utf-8"))["cells"]
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\((\d_\w+\.ipynb)\)", prose):
        assert (notebooks.FOLDER / target).is_file(), target


def test_pictures_are_kept_with_fewer_colours():
    from io import BytesIO

    import numpy as np
    from PIL import Image

    rng, out = np.random.default_rng(0), BytesIO()
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(out, "PNG")
    shown = {"image/png": base64.b64encode(out.getvalue()).decode()}
    cell = nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output("display_data", shown)])
    cell.outputs.append(nbformat.v4.new_output("stream", name="stderr", text=str(Path("/work"))))
    kept = notebooks.slim(nbformat.v4.new_notebook(cells=[cell]))
    image = Image.open(BytesIO(base64.b64decode(pictures(kept)[0])))
    assert image.size == (32, 32) and len(image.convert("RGB").getcolors()) <= 64
    assert len(outputs(kept)) == 1
