"""Published configs and our experiments: every setting, both ways."""

import json
from pathlib import Path

import pytest

from hdlm_jax import config as configs
from hdlm_jax.errors import UserError
from hdlm_jax.interop import published_config
from hdlm_jax.interop.published_config import Published
from hdlm_jax.models import parts as builders

REFERENCE = Path(__file__).parents[1] / "reference"


def changed(family="epsilon", **changes):
    tree = json.loads((REFERENCE / f"{family}_tiny" / "config.json").read_text())
    for name, value in changes.items():
        *heads, leaf = name.split("__")
        block = tree
        for head in heads:
            block = block[head]
        block[leaf] = value
    return Published("config.json", tree)


def experiment(published):
    found = published_config.to_experiment(published)
    builders.build(found.config, found.num_tokens, found.num_tokens - 1)  # its parts fit each other
    return found


def test_the_flat_epsilon_models():
    """The published setting: one block as long as the text, as many steps as its levels."""
    found = experiment(changed(annealing__width=32, annealing__tau=64, annealing__eval_tau=64))
    c = found.config
    assert found.notes == () and found.num_tokens == 96
    assert (c.model.visibility, c.hyperschedule.kind, c.sampler.steps) == ("full", "flat", 64)
    assert (c.noising.kind, c.noising.epsilon, c.loss.kind) == ("epsilon_hybrid", 0.01, "hybrid_cross_entropy")
    assert (c.sampler.kind, c.loss.inverse_survival, c.noise_schedule.kind) == ("acs", True, "linear")
    assert (c.model.conditioning, c.model.interpolation) == (0, 0.0)
    assert builders.build(c, 96, 95).loss.reading == "hybrid"


def test_epsilon_0_and_the_plain_loss():
    zero = experiment(changed(training__epsilon=0.0)).config
    assert (zero.noising.kind, zero.noising.epsilon, zero.sampler.kind) == ("epsilon_hybrid", 0.0, "ancestral")
    assert builders.build(zero, 96, 95).loss.reading == "posterior"
    plain = experiment(changed(training__loss_type="standard")).config
    assert (plain.noising.kind, plain.noising.epsilon, plain.sampler.kind) == ("absorb", None, "ancestral")


def test_the_gamma_models():
    c = experiment(changed("gamma", annealing__width=32)).config
    assert (c.noising.kind, c.noising.gamma, c.model.interpolation) == ("gamma_hybrid", 0.1, 0.1)
    assert (c.model.conditioning, c.noise_schedule.eps, c.model.prediction) == (32, 5e-3, "aligned")
    assert (c.loss.kind, c.loss.settled_weight, c.sampler.kind) == ("published_score_entropy", 0.0, "analytic")
    assert builders.build(c, 96, 95).loss.reading == "published_score"
    assert experiment(changed("gamma", annealing__sampling_method="AR")).config.model.prediction == "shifted"
    c = experiment(changed("gamma", noise__type="geometric")).config.noise_schedule
    assert (c.kind, c.smin, c.smax, c.eps) == ("geometric", 1e-4, 10.0, None)


@pytest.mark.parametrize(
    ("changes", "kind", "fields", "inexact"),
    [
        ({}, "block", {"width": 8, "rate": "1"}, None),
        ({"annealing__eval_tau": 4}, "block", {"width": 8, "rate": "2"}, None),
        ({"annealing__eval_tau": 16}, "block", {"width": 8, "rate": "1/2"}, None),
        ({"annealing__type": "simple"}, "slide", {"width": 8, "rate": "1"}, None),
        ({"annealing__type": "simple", "annealing__eval_tau": 4}, "slide", {"width": 8, "rate": "2"}, None),
        ({"annealing__type": "simple", "annealing__eval_tau": 16}, "slide", {"width": 8, "rate": "1"}, "16 levels"),
        ({"annealing__type": "hybrid", "annealing__eval_tau": 4}, "block_slide", {"block": 8, "width": 4}, "4 levels"),
        ({"annealing__type": "simple_block"}, "block_slide", {"block": 8, "width": 8}, "8 levels"),
        ({"annealing__type": None}, "flat", {}, None),
    ],
    ids=str,
)
def test_orders_of_generation(changes, kind, fields, inexact):
    found = experiment(changed(annealing__attention={"context_type": "causal", "block_type": "full"}, **changes))
    assert found.config.hyperschedule.kind == kind
    assert fields.items() <= found.config.hyperschedule.to_dict().items()
    assert found.config.loss.inverse_survival == (kind == "flat")
    assert found.config.model.context_group == 1
    assert len(found.notes) == (inexact is not None) and all(inexact in note for note in found.notes)


@pytest.mark.parametrize(
    ("context", "prediction", "group"),
    [
        ("causal", "aligned", 1),
        ("block_causal", "aligned", 8),
        ("block_causal", "shifted", 9),
        ("full", "aligned", 32),
    ],
)
def test_what_settled_rows_see(context, prediction, group):
    attention = {"context_type": context, "block_type": "full"}
    found = experiment(changed(annealing__attention=attention, type=prediction))
    assert found.config.model.context_group == group
    parts = builders.build(found.config, 96, 95)
    assert parts.layout == ("tiled" if group == 1 else "plain")
    assert ["without a cache" in note for note in found.notes] == [True] * (group > 1)


# ---- ours, as published


def ours(**changes):
    small = {"data.length": 32, "model.hidden": 64, "model.blocks": 2, "model.heads": 4, "noising.epsilon": 0.1}
    return configs.override(configs.default(), small | {name.replace("__", "."): x for name, x in changes.items()})


PREFIX = {"model__visibility": "prefix"}
GAMMA = {
    "noising__kind": "gamma_hybrid",
    "noising__epsilon": None,
    "noising__gamma": 0.05,
    "model__conditioning": 16,
    "model__interpolation": 0.05,
    "loss__kind": "published_score_entropy",
    "noise_schedule__eps": 5e-3,
}
SLIDE = PREFIX | {"hyperschedule__kind": "slide", "hyperschedule__width": 8, "hyperschedule__rate": "2"}
BLOCK = PREFIX | {"hyperschedule__kind": "block", "hyperschedule__width": 8, "hyperschedule__rate": "1/2"}
GROUPED = {"model__inexact_context": True}  # their settled rows may change while others settle


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__prediction": "shifted"},
        SLIDE,
        BLOCK | GROUPED | {"model__context_group": 8},
        BLOCK | GROUPED | {"model__context_group": 33, "model__prediction": "shifted"},
        GAMMA,
        GAMMA | SLIDE | {"model__prediction": "shifted"},
    ],
    ids=str,
)
def test_our_experiments_come_back_from_a_published_config(changes):
    config = ours(**changes)
    tree = json.loads(json.dumps(published_config.of_experiment(config, 96)))
    found = experiment(Published("config.json", tree))
    assert found.num_tokens == 96
    for block in ("model", "hyperschedule", "noising", "noise_schedule"):
        there, here = found.config[block].to_dict(), config[block].to_dict()
        assert {name: there[name] for name in here if there[name] != here[name]} == {}
    assert found.config.data.length == 32


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"noising__kind": "uniform"}, "noising.kind .published format.: got 'uniform'; allowed: 'absorb'"),
        ({"model__mlp_ratio": 2}, "model.mlp_ratio, model.rotary_base: got .2, 10000.0.; allowed: 4 and 10000"),
        ({"model__conditioning": 16}, "model: got .*a noise-level embedding with drift 0.0 iff"),
        (GAMMA | {"model__interpolation": 0.0}, "model: got .*with drift 0.05"),
        ({"noise_schedule__kind": "cosine"}, "noise_schedule: got .*'geometric', or 'linear' with eps 0.0"),
        (GAMMA | {"noise_schedule__eps": 1e-3}, "noise_schedule: got .*with eps 0.005"),
        ({"hyperschedule__kind": "ar_diffusion"}, "hyperschedule.kind .published format.: got 'ar_diffusion'"),
        (SLIDE | {"hyperschedule__rate": "1/2"}, "hyperschedule.rate: got '1/2'; allowed: 1 or more in this format"),
        (BLOCK | {"model__context_group": 5}, "model.context_group: got 5; allowed: 1, 8 or 32 and more"),
    ],
    ids=str,
)
def test_what_the_authors_code_does_not_have_is_refused(changes, says):
    with pytest.raises(UserError, match=says):
        published_config.of_experiment(ours(**changes), 96)
