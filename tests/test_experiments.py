"""Every experiment there is, at its smoke size, from training to samples."""

from pathlib import Path

import pytest

from hdlm_jax import config as configs
from hdlm_jax import lm
from hdlm_jax.training import train

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(path for path in (ROOT / "experiments").rglob("*.py"))
# one of each kind of layout, process and loss is trained in the first tier
FIRST = {"quickstart", "ar", "mdlm", "bd3lm", "gamma_slide", "d3pm_uniform"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] * (path.stem not in FIRST or path.parent.name == "paper"))
        for path in EXPERIMENTS
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_smoke(path, tmp_path, docs_windows):
    config = configs.load(f"{path}:smoke", {"data.prepared": str(docs_windows)})
    assert train.train(config, tmp_path) == 0
    model = lm.load(tmp_path)
    assert model.step == config.training.steps
    bound, unigram = model.held_out(tmp_path, draws=2, batch=8, windows=8)
    assert 0 < bound.bits_per_byte < 20 and 4 < unigram < 5
    assert bound.standard_error > 0 or model.parts.hs.kind == "quenched"  # AR's bound has no noise
    out = model.generate(num_samples=2)
    assert out.tokens.shape == (2, config.data.length)
    assert out.tokens.max() < model.parts.process.num_tokens, "a finished text holds no mask"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_header_says_how_to_run_it(path):
    relative = path.relative_to(ROOT)
    assert f"--config {relative}" in path.read_text()
