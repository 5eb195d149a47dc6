"""PyTorch against JAX: scores of exported networks, and the law of the texts that their `generate` draws.

Needs torch and transformers, here or in the interpreter that TORCH_PYTHON names:

    TORCH_PYTHON=/path/to/python python -m pytest tests/interop/test_huggingface_torch.py -s
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from hdlm_jax import config as configs
from hdlm_jax import lm
from hdlm_jax.data import tokenizers
from hdlm_jax.generation import sampling
from hdlm_jax.generation.chain import trailing_row
from hdlm_jax.models import parts as builders
from tests.generation.chains import random_params, recomputed_scores

HERE = all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))
PYTHON = os.environ.get("TORCH_PYTHON") or (sys.executable if HERE else "")
REASON = "torch and transformers are not installed here, and TORCH_PYTHON names no interpreter that has them"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason=REASON)]
SAMPLES = 5000

PREFIX = {"model.visibility": "prefix", "noising.epsilon": 0.2}
SLIDE = PREFIX | {"hyperschedule.kind": "slide", "hyperschedule.width": 2, "hyperschedule.rate": "1"}
BLOCK = PREFIX | {"hyperschedule.kind": "block", "hyperschedule.width": 2, "hyperschedule.rate": "1/2"}
ABSORB = {"noising.kind": "absorb", "loss.kind": "absorb_nelbo", "sampler.kind": "ancestral"}
SEEN = {"model.conditioning": 8, "model.interpolation": 0.3}
SMALL = {"data.length": 4, "model.hidden": 8, "model.blocks": 2, "model.heads": 2, "sampler.steps": 3}
SMALL |= {"sampler.eta": 0.7, "model.vocabulary_multiple": 4}
SHIFTED = {"model.prediction": "shifted"}
LARGER = {"data.length": 64, "model.hidden": 96, "model.blocks": 4, "model.heads": 3, "model.mlp_ratio": 3}
GAMMA = {"noising.kind": "gamma_hybrid", "noising.gamma": 0.1, "loss.kind": "score_entropy", "noise_schedule.eps": 1e-3}
# name -> (ordinary tokens, what is changed)
MODELS = {
    "flat": (3, {"noising.epsilon": 0.2}),
    "flat_shifted": (3, ABSORB | SHIFTED | {"noise_schedule.kind": "cosine"}),
    "flat_keeps": (3, {"noising.epsilon": 0.2, "noise_schedule.eps": 0.1, "sampler.kind": "acs_published"} | SEEN),
    "filtered": (3, {"noising.epsilon": 0.2, "sampler.temperature": 0.5, "sampler.top_k": 2, "sampler.top_p": 0.8}),
    "slide": (3, SLIDE),
    "slide_shifted": (3, SLIDE | SHIFTED | SEEN | {"noise_schedule.kind": "polynomial", "noise_schedule.w": 2.0}),
    "block_shifted": (3, BLOCK | SHIFTED | {"model.context_group": 2}),
    "quenched": (3, PREFIX | ABSORB | SHIFTED | {"noising.epsilon": None, "hyperschedule.kind": "quenched"}),
    "block_slide": (
        3,
        SLIDE
        | {"hyperschedule.kind": "block_slide", "hyperschedule.block": 3, "noise_schedule.kind": "clipped"}
        | {"noise_schedule.base": "cosine", "noise_schedule.eps": 0.05},
    ),
    "line": (3, PREFIX | {"hyperschedule.kind": "ar_diffusion", "hyperschedule.steps": 6}),
    "gamma": (11, GAMMA | SEEN | {"sampler.kind": "ancestral", "sampler.eta": 0.0}),
    "larger": (1000, SLIDE | SHIFTED | SEEN | LARGER | {"hyperschedule.width": 16, "model.rotary_base": 500.0}),
    "larger_flat": (1000, {"noising.epsilon": 0.01} | LARGER),
}


def build(num_tokens, changes):
    config = configs.override(configs.default(), SMALL | {name: x for name, x in changes.items() if x is not None})
    made = builders.build(config, num_tokens, num_tokens - 1)
    params = jax.tree.map(lambda x: 0.7 * x, random_params(made.model))
    return lm.LanguageModel(config, made, params, tokenizers.tokens_only(num_tokens), 0)


def chain_of(model):
    return sampling.chain(model.parts, model.parts.hs, model.config.sampler)


def inputs_of(name, model):
    net, hs, rng = model.parts.model, model.parts.hs, np.random.default_rng(0)
    inputs = {"tokens": rng.integers(0, net.vocabulary, (3, net.length))}
    chain = chain_of(model)
    for step in {0, hs.num_steps // 2, hs.num_steps - 1}:
        inputs[f"window_{step}"] = np.array([*hs.window(step), trailing_row(chain)], np.int64)
        if net.conditioning:
            levels = jnp.broadcast_to(chain.sigma(chain.alpha(hs.levels_at(step)))[None], (3, net.length))
            inputs |= {"sigma": rng.uniform(0, 6, (3, net.length)).astype(np.float32)}
            inputs |= {f"sigma/window_{step}": np.array(levels)}
    if name != "gamma" and not name.startswith("larger"):
        inputs["settings"] = json.dumps({"num_return_sequences": SAMPLES})
        prompts = rng.integers(0, 3, (3, 3))
        kept = np.array([[0, 0, 1], [1, 1, 0], [1, 1, 1]])
        inputs |= {"prompts": np.where(prompts == 2, 3, prompts), "kept": kept}  # 3 is the mask: filled in
    return inputs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name -> (model, inputs, what PyTorch gave)."""
    place = tmp_path_factory.mktemp("torch")
    models = {name: build(*spec) for name, spec in MODELS.items()}
    inputs = {name: inputs_of(name, model) for name, model in models.items()}
    for name, model in models.items():
        model.export(place / name, "huggingface")
        np.savez(place / f"{name}.npz", **inputs[name])
    program = Path(__file__).with_name("torch_program.py")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HOME": str(place / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [PYTHON, str(program), str(place), *MODELS]
    done = subprocess.run(command, env=env, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: (models[name], inputs[name], dict(np.load(place / f"{name}-out.npz"))) for name in MODELS}


def test_scores_agree(runs):
    """The README's figure: the largest difference over all networks, of scores with a deviation of about 1."""
    largest = 0.0
    for name, (model, inputs, found) in runs.items():
        N = model.parts.model.num_tokens
        ours = np.asarray(model.logits(jnp.asarray(inputs["tokens"], jnp.int32), inputs.get("sigma")))
        assert np.isneginf(found["logits"][..., N]).all(), name
        assert ours[..., :N].std() > 0.3, name
        largest = max(largest, np.abs(found["logits"][..., :N] - ours[..., :N]).max())
    print(f"largest difference of scores: {largest:.1e}")
    assert largest < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_scores_of_windows_agree(runs, name):
    """At the first, a middle and the last step of generation, where rows see what the hyperschedule lets them."""
    model, inputs, found = runs[name]
    chain, N = chain_of(model), model.parts.model.num_tokens
    tokens = jnp.asarray(inputs["tokens"], jnp.int32)
    given = jnp.zeros(tokens.shape, bool)
    scores = jax.jit(recomputed_scores, static_argnums=0)
    for key in (key for key in inputs if key.startswith("window")):
        start, stop, _ = inputs[key]
        _, ours = scores(chain, model.params, tokens, given, jnp.array(int(key.split("_")[1])))
        np.testing.assert_allclose(found[key][:, start:stop, :N], np.asarray(ours)[:, start:stop, :N], atol=1e-4)


def counts(texts):
    return np.bincount(texts @ 3 ** np.arange(4), minlength=81)


@pytest.mark.parametrize("name", [name for name, (num_tokens, _) in MODELS.items() if num_tokens == 3])
def test_texts_follow_the_same_law(runs, name):
    """Two samples of texts of 4 tokens, by the chi-square test of homogeneity."""
    model, _, found = runs[name]
    assert found["texts"].shape == (SAMPLES, 4) and found["texts"].max() < 3
    table = np.stack([counts(found["texts"]), counts(model.generate(num_samples=SAMPLES, seed=1).tokens)])
    rare = table.sum(0) < 10
    table = np.concatenate([table[:, ~rare], table[:, rare].sum(1, keepdims=True)], 1)
    assert table.shape[1] > 5
    assert stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 1e-4


@pytest.mark.parametrize("name", [name for name, (num_tokens, _) in MODELS.items() if num_tokens == 3])
def test_what_is_given_stays_and_masks_are_filled_in(runs, name):
    _, inputs, found = runs[name]
    for text, prompt, kept in zip(found["continued"], inputs["prompts"], inputs["kept"].astype(bool), strict=True):
        given = prompt[kept]
        assert (text < 3).all() and (text[: len(given)] == given)[given < 3].all()


def test_settings_that_do_not_fit_are_refused_by_name(runs):
    said = {name: " ".join(found["refusals"]) for name, (_, _, found) in runs.items()}
    assert "{}: generate: this file knows no way back for noising 'gamma_hybrid'" in said["gamma"]
    assert "sampler: got 'asc'; allowed: 'ancestral'" in said["flat"]
    assert "eta: got 2.0; allowed: a number in [0, 1]" in said["flat"]
    assert "sampler: got 'acs'; allowed: 'ancestral' for noising 'absorb'" in said["quenched"]
    assert "hyperschedule: got ['width']; allowed: width, rate (slide)" in said["flat"]
    assert "hyperschedule: got 'width 3'; allowed: at most 2, the widest window of training" in said["slide"]
