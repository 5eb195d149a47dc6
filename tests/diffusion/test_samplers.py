"""Samplers by name: what they are called with, and what is refused."""

import pytest

from hdlm_jax import config as configs
from hdlm_jax.diffusion import hyperschedules, noise_schedules, noising, samplers
from hdlm_jax.errors import UserError

N = 3
ABSORB, EPSILON_HYBRID = noising.absorb(N), noising.epsilon_hybrid(N, 0.2)
GAMMA = noising.gamma_hybrid(N, 0.1)
OF_SCORES = ("euler",)
CORRECTING = ("acs", "acs_published")
SAVING = ("confidence", "margin", "entropy", "threshold", "factor", "first_hitting")


@pytest.mark.parametrize("kind", samplers.SAMPLERS)
def test_every_sampler_is_built_by_its_name_with_its_defaults(kind):
    process = EPSILON_HYBRID if kind in CORRECTING else ABSORB
    reading = "score" if kind in OF_SCORES else None
    eta = {"eta": 0.2} if kind in CORRECTING else {}
    rule = samplers.build(kind, process, reading, **eta)
    assert rule.name == kind
    assert (rule.chance is not None and rule.draw is None) == (kind in SAVING)
    assert (rule.memory is not None) == (kind in ("remdm_conf", "mask_predict"))
    assert (rule.warp is not None) == (kind == "remdm_loop")


def test_every_dial_is_a_field_of_the_experiment():
    assert set(samplers.DIALS) <= set(configs.default().sampler)
    assert {name for kind in samplers.SAMPLERS for name in samplers.dials_of(kind)} == set(samplers.DIALS)


@pytest.mark.parametrize(
    ("kind", "process", "dials", "message"),
    [
        ("ACS", EPSILON_HYBRID, {"eta": 0.1}, "sampler.kind: got 'ACS'"),
        ("acs", ABSORB, {"eta": 0.1}, "sampler.kind.*learns to correct"),
        ("acs_published", GAMMA, {"eta": 0.1}, "sampler.kind"),
        ("acs", EPSILON_HYBRID, {"eta": 1.5}, "sampler.eta"),
        ("acs", EPSILON_HYBRID, {"eta": float("nan")}, "sampler.eta"),
        ("acs", EPSILON_HYBRID, {}, "sampler.eta"),
        ("ancestral", EPSILON_HYBRID, {"eta": 0.1}, "sampler.eta"),
        ("acs", EPSILON_HYBRID, {"reading": "mean", "eta": 0.1}, "noising.reading"),
        ("ancestral", noising.uniform(N), {"reading": "hybrid"}, "noising.reading"),
        ("remdm_cap", noising.uniform(N), {}, "sampler.kind: got 'remdm_cap' with noising.kind 'uniform'"),
        ("remdm_loop", GAMMA, {}, "sampler.kind: got 'remdm_loop' with noising.kind 'gamma_hybrid'"),
        ("confidence", noising.gidd(N, 0.1), {}, "sampler.kind: got 'confidence' with noising.kind 'gidd'"),
        ("mask_predict", noising.uniform(N), {}, "sampler.kind: got 'mask_predict'"),
        ("entropy", ABSORB, {"reading": "score"}, "sampler.kind: got 'entropy' for a network that learned scores"),
        ("threshold", noising.gidd(N, 0.1), {}, "sampler.kind: got 'threshold'"),
        ("first_hitting", EPSILON_HYBRID, {}, "sampler.kind: got 'first_hitting'.*without shuffled tokens"),
        ("remdm_cap", ABSORB, {"eta": -0.1}, "sampler.eta: got -0.1"),
        ("remdm_conf", ABSORB, {"eta": 0.1}, "sampler.eta"),
        ("remdm_switch", ABSORB, {"t_switch": 0}, r"sampler.t_switch: got 0; allowed: a number in \(0, 1\]"),
        (
            "remdm_switch",
            ABSORB,
            {"t_on": 0.5},
            "sampler.t_on: got 0.5; allowed: nothing: 'remdm_switch' has the dials eta, t_switch",
        ),
        ("remdm_loop", ABSORB, {"t_on": 1.0}, "sampler.t_on: got 1.0"),
        ("remdm_loop", ABSORB, {"t_off": 0.55}, r"sampler.t_off: got 0.55; allowed: .*below t_on"),
        ("remdm_loop", ABSORB, {"alpha_on": 1}, "sampler.alpha_on: got 1"),
        ("confidence", ABSORB, {"rounding": "half"}, "sampler.rounding: got 'half'; allowed: 'down', 'up'"),
        ("margin", ABSORB, {"order_temperature": -1}, "sampler.order_temperature: got -1"),
        ("threshold", ABSORB, {"threshold": 0}, "sampler.threshold: got 0"),
        ("threshold", ABSORB, {"factor": 1.0}, "sampler.factor: got 1.0; allowed: nothing"),
        ("factor", ABSORB, {"factor": 0}, "sampler.factor: got 0"),
        ("first_hitting", ABSORB, {"threshold": 0.9}, "sampler.threshold: got 0.9; allowed: nothing"),
    ],
)
def test_bad_input_names_its_field(kind, process, dials, message):
    with pytest.raises(UserError, match=message):
        samplers.build(kind, process, **dials)


@pytest.mark.parametrize(
    ("kind", "hs", "conditioned", "message"),
    [
        ("remdm_cap", hyperschedules.quenched(8), False, "hyperschedule: .*masked again in a position's only call"),
        ("mask_predict", hyperschedules.block(8, 4, 4), False, "hyperschedule: .*tau_max of 2 or more"),
        ("first_hitting", hyperschedules.flat(8, 4), False, "hyperschedule: .*one token a call"),
        ("first_hitting", hyperschedules.slide(8, 4, 1), False, "hyperschedule: .*one token a call"),
        ("first_hitting", hyperschedules.flat(8, 8), True, "sampler.kind: got 'first_hitting'.*sees the noise level"),
    ],
)
def test_a_hyperschedule_that_makes_no_sense_is_refused(kind, hs, conditioned, message):
    with pytest.raises(UserError, match=message):
        samplers.check(kind, hs, conditioned)


def test_what_makes_sense_is_allowed():
    for hs in (hyperschedules.quenched(8), hyperschedules.flat(8, 8), hyperschedules.block(8, 4, 1)):
        samplers.check("first_hitting", hs, conditioned=False)
    samplers.check("remdm_loop", hyperschedules.slide(8, 4, 2), conditioned=True)
    samplers.check("threshold", hyperschedules.quenched(8), conditioned=True)


def test_the_schedule_of_the_loop_comes_with_its_rule():
    warp = samplers.build("remdm_loop", ABSORB, t_on=0.5, t_off=0.25, alpha_on=0.75).warp
    schedule = warp(noise_schedules.linear())
    assert schedule == noise_schedules.plateau(noise_schedules.linear(), 0.5, 0.25, 0.75)
