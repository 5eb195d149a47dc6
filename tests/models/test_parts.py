"""Parts: what an experiment's blocks make together, and the pairs that are refused."""

import pytest

from hdlm_jax import config
from hdlm_jax.errors import UserError
from hdlm_jax.models import parts
from tests.models import tiny

EPSILON = {"noising__kind": "epsilon_hybrid", "noising__epsilon": 0.1}
PREFIX = {"model__visibility": "prefix"}


def staircase(kind, **fields):
    return {f"hyperschedule__{name}": value for name, value in {"kind": kind, **fields}.items()}


FLAT, BLOCK = staircase("flat", steps=4), staircase("block", width=4, rate="2")
SLIDE = staircase("slide", width=4, rate="2")


@pytest.mark.parametrize(
    ("fields", "layout"),
    [
        (FLAT, "continuous"),
        (FLAT | PREFIX, "plain"),
        (staircase("ar_diffusion", steps=12) | PREFIX, "plain"),
        (BLOCK | PREFIX, "tiled"),
        (SLIDE | PREFIX, "tiled"),
        (SLIDE | PREFIX | {"model__context_group": 2}, "tiled"),
        (SLIDE | PREFIX | {"model__context_group": 4, "model__inexact_context": True}, "plain"),
        (staircase("quenched") | PREFIX, "tiled"),
        (staircase("block_slide", block=8, width=4, rate="2") | PREFIX, "tiled"),
    ],
)
def test_the_layout_follows_from_visibility_and_hyperschedule(fields, layout):
    assert tiny.build(5, 8, **EPSILON, **fields).layout == layout


def test_the_default_experiment_is_a_flat_full_epsilon_model():
    given = config.override(config.default(), {"noising.epsilon": "0.01"})
    made = parts.build(given, num_tokens=100, bos_id=None)
    assert (made.model.num_tokens, made.model.length, made.model.hidden) == (100, 128, 256)
    assert (made.hs.kind, made.hs.num_steps) == ("flat", given.sampler.steps)
    assert (made.process.name, made.process.epsilon) == ("epsilon_hybrid", 0.01)
    assert (made.schedule.name, made.loss.name, made.loss.reading) == (
        "linear(eps=0)",
        "hybrid_cross_entropy",
        "hybrid",
    )
    assert made == parts.build(given, num_tokens=100, bos_id=None)._replace(process=made.process, loss=made.loss)


def test_shares_are_kept_where_they_mean_something():
    full, prefix = tiny.build(5, 8, **EPSILON, **FLAT), tiny.build(5, 8, **EPSILON, **SLIDE, **PREFIX)
    assert (full.origin_share, prefix.origin_share) == (0.0, 0.5)
    bound = {"loss__kind": "epsilon_nelbo"}
    shown = [
        tiny.build(5, 8, **EPSILON, **fields).reconstruction_share
        for fields in (FLAT | bound, FLAT, SLIDE | bound | PREFIX)
    ]
    assert shown == [0.1, 0.0, 0.0]


def test_samplers_get_the_dials_that_they_have():
    made = tiny.build(5, 8, **EPSILON, **FLAT)
    for kind in ("acs", "acs_published", "ancestral"):
        sampler = config.override(config.default(), {"sampler.kind": kind}).sampler
        assert parts.build_rule(sampler, made.process, made.loss.reading).name == kind


def test_the_dials_of_another_sampler_are_refused():
    made = tiny.build(5, 8, **EPSILON, **FLAT)
    sampler = config.override(config.default(), {"sampler.kind": "remdm_cap", "sampler.threshold": 0.9}).sampler
    with pytest.raises(UserError, match="sampler.threshold: got 0.9; allowed: nothing: 'remdm_cap' has the dials eta"):
        parts.build_rule(sampler, made.process, made.loss.reading)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (BLOCK, r"hyperschedule.kind: got 'block' with model.visibility 'full'; allowed: 'flat'"),
        (FLAT | {"loss__noise_range": (0.5, 0.2)}, r"loss.noise_range: got \(0.5, 0.2\); allowed: two numbers"),
        (SLIDE | PREFIX | {"loss__noise_range": (0.2, 0.9)}, r"loss.noise_range: .*kind 'slide' with .*'prefix'"),
        (FLAT | PREFIX | {"loss__noise_range": (0.2, 0.9)}, r"loss.noise_range: .*kind 'flat' with .*'prefix'"),
        (
            SLIDE | PREFIX | {"loss__context_weight": 0.5},
            r"loss.context_weight: got 0.5; allowed: 0 unless .*'shifted'",
        ),
        (FLAT | {"loss__context_weight": -1.0}, r"loss.context_weight: got -1.0; allowed: a number >= 0"),
        (FLAT | {"loss__kind": "acs_nelbo"}, r"loss.kind: got 'acs_nelbo'; allowed: another loss for flat"),
        (FLAT | {"model__interpolation": 0.1}, r"model.interpolation: got 0.1; allowed: 0 for a network that does not"),
        (FLAT | {"model__rotary_base": 0.0}, r"model.rotary_base: got 0.0; allowed: a positive number"),
        (FLAT | {"model__dtype": "float64"}, r"model.dtype: got 'float64'.*JAX_ENABLE_X64"),
        (FLAT | {"loss__reconstruction_share": 1.0}, r"loss.reconstruction_share: got 1.0"),
        (
            SLIDE | PREFIX | {"model__context_group": 4},
            r"model.context_group: got 4 under slide: .*; allowed: 1, 2 \(every window",
        ),
        (FLAT | {"loss__origin_share": 1.5}, r"loss.origin_share: got 1.5; allowed: a number in \[0, 1\]"),
        (FLAT | {"loss__rows_per_chunk": 0}, r"loss.rows_per_chunk: got 0; allowed: a positive integer"),
        (FLAT | {"loss__kind": "absorb_nelbo"}, r"loss.kind: got 'absorb_nelbo' with noising.kind 'epsilon_hybrid'"),
        (FLAT | {"noise_schedule__kind": "sigmoid"}, r"noise_schedule.kind: got 'sigmoid'"),
        (
            staircase("slide", width=16, rate="1"),
            r"hyperschedule.width: got 16; allowed: .* from 1 to 8 \(the length\)",
        ),
        (staircase("slide", width=4), r"hyperschedule.rate: got None"),
    ],
)
def test_fields_out_of_range_and_parts_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        tiny.build(5, 8, **EPSILON, **fields)


def test_a_noise_range_is_allowed_where_it_is_used():
    for fields in (FLAT, BLOCK | PREFIX):
        assert tiny.build(5, 8, **EPSILON, **fields, loss__noise_range=(0.2, 0.9)).noise_range == (0.2, 0.9)
