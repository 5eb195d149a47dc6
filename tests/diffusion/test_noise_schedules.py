"""Noise schedules: formulas, ends, derivatives, precision, sigma."""

import math
import pickle

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from hdlm_jax.diffusion import noise_schedules as nss
from hdlm_jax.errors import UserError

SETTINGS = settings(max_examples=30, deadline=None, derandomize=True, database=None)

# (schedule, alpha in float64, alpha(0), alpha(1))
TABLE = [
    (nss.linear(), lambda u: 1 - u, 1.0, 0.0),
    (nss.linear(1e-3), lambda u: 1 - (1 - 1e-3) * u, 1.0, 1e-3),
    (nss.cosine(), lambda u: 1 - np.cos(np.pi / 2 * (1 - u)), 1.0, 0.0),
    (nss.polynomial(1), lambda u: 1 - u, 1.0, 0.0),
    (nss.polynomial(2.5), lambda u: 1 - u**2.5, 1.0, 0.0),
    (nss.polynomial(0.5), lambda u: 1 - u**0.5, 1.0, 0.0),
    (nss.geometric(1e-4, 20), lambda u: np.exp(-((1e-4) ** (1 - u)) * 20**u), math.exp(-1e-4), math.exp(-20)),
    (nss.clipped(nss.cosine(), 0.01), lambda u: 0.98 * (1 - np.cos(np.pi / 2 * (1 - u))) + 0.01, 0.99, 0.01),
]
EXACT_ENDS = TABLE[:6]
IDS = [row[0].name for row in TABLE]
U = np.linspace(0, 1, 129)


@pytest.mark.parametrize(("schedule", "formula", "first", "last"), TABLE, ids=IDS)
def test_alpha_is_the_formula_and_never_rises(schedule, formula, first, last):
    alpha = np.asarray(schedule.alpha(jnp.asarray(U, jnp.float32)), np.float64)
    np.testing.assert_allclose(alpha, formula(U.astype(np.float32).astype(float)), atol=2e-7, rtol=2e-6)
    assert (np.diff(alpha) < 0).all()
    np.testing.assert_allclose(alpha[[0, -1]], [first, last], rtol=1e-5, atol=0)
    with jax.enable_x64():
        np.testing.assert_allclose(schedule(jnp.asarray(U)), formula(U), atol=1e-15, rtol=1e-13)


@pytest.mark.parametrize(("schedule", "_", "first", "last"), EXACT_ENDS, ids=IDS[:6])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_ends_are_exact(schedule, _, first, last, dtype):
    with jax.enable_x64():
        u = jnp.array([0.0, 1.0], dtype)
        for alpha in (schedule.alpha(u), jax.jit(schedule.alpha)(u)):
            assert alpha.tolist() == [first, float(jnp.asarray(last, dtype))]
            assert not np.signbit(np.asarray(alpha, np.float64)).any()


@pytest.mark.parametrize(("schedule", "formula", "_", "__"), TABLE, ids=IDS)
def test_the_derivative_against_central_differences(schedule, formula, _, __):
    with jax.enable_x64():
        u, h = jnp.linspace(0.01, 0.99, 50), 1e-5
        central = (schedule.alpha(u + h) - schedule.alpha(u - h)) / (2 * h)
        derivative = schedule.derivative(u)
        assert derivative.shape == u.shape and derivative.dtype == u.dtype
        np.testing.assert_allclose(derivative, central, rtol=1e-6, atol=1e-8)


def test_the_derivative_at_the_ends():
    ends = jnp.array([0.0, 1.0])
    assert nss.linear(0.25).derivative(ends).tolist() == [-0.75, -0.75]
    np.testing.assert_allclose(nss.cosine().derivative(ends), [-math.pi / 2, 0.0], rtol=1e-6)
    assert nss.polynomial(1).derivative(ends).tolist() == [-1.0, -1.0]
    assert nss.polynomial(3).derivative(ends).tolist() == [0.0, -3.0]
    assert nss.polynomial(0.5).derivative(ends).tolist() == [-math.inf, -0.5]


@SETTINGS
@given(st.floats(0, 0.9), st.floats(0.3, 8), st.floats(1e-5, 1), st.floats(1.5, 30), st.floats(0, 0.49))
def test_random_parameters(eps, w, smin, ratio, clip):
    u = U[1:-1]
    cases = [
        (nss.linear(eps), 1 - (1 - eps) * u, (eps - 1) + 0 * u),
        (nss.polynomial(w), 1 - u**w, -w * u ** (w - 1)),
        (nss.clipped(nss.polynomial(w), clip), (1 - 2 * clip) * (1 - u**w) + clip, None),
    ]
    sigma = smin ** (1 - u) * (smin * ratio) ** u
    cases += [(nss.geometric(smin, smin * ratio), np.exp(-sigma), -np.exp(-sigma) * sigma * np.log(ratio))]
    with jax.enable_x64():
        for schedule, alpha, derivative in cases:
            np.testing.assert_allclose(schedule.alpha(u), alpha, rtol=1e-12, atol=1e-15)
            if derivative is not None:
                np.testing.assert_allclose(schedule.derivative(u), derivative, rtol=1e-12)


@pytest.mark.parametrize("schedule", [nss.cosine(), nss.polynomial(2), nss.linear()], ids=lambda s: s.name)
def test_float32_keeps_its_digits_near_pure_noise(schedule):
    u = 1 - np.logspace(-6, -1, 30).astype(np.float32)
    with jax.enable_x64():
        exact = np.asarray(schedule.alpha(u.astype(np.float64)))
    np.testing.assert_allclose(schedule.alpha(u), exact, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("schedule", [row[0] for row in TABLE], ids=IDS)
def test_the_dtype_and_the_shape_are_the_input_s(schedule, dtype):
    u = jax.ShapeDtypeStruct((2, 3), dtype)
    for f in (schedule.alpha, schedule.derivative, schedule.sigma):
        out = jax.eval_shape(f, u)
        assert (out.shape, out.dtype) == ((2, 3), jnp.dtype(dtype))
        assert jax.eval_shape(f, jax.ShapeDtypeStruct((), "int32")).dtype == jnp.float32


# ---- sigma


@pytest.mark.parametrize(("schedule", "formula", "_", "__"), TABLE, ids=IDS)
def test_sigma_is_clipped_to_the_range_of_the_schedule(schedule, formula, _, __):
    low, high = -np.log(formula(np.array([1e-4, 1 - 1e-4])))
    np.testing.assert_allclose(nss.sigma_range(schedule), [low, high], rtol=1e-8)
    alpha = np.array([1.0, 0.7, 0.3, 0.0])
    expected = np.clip(-np.log(np.maximum(alpha, 1e-300)), low, high)
    np.testing.assert_allclose(jax.jit(schedule.sigma)(alpha), expected, rtol=1e-6)
    with jax.enable_x64():
        np.testing.assert_allclose(jax.jit(schedule.sigma)(alpha), expected, rtol=1e-8)
    np.testing.assert_allclose(schedule.sigma(jnp.asarray(alpha, "bfloat16")), expected, rtol=0.01)


def test_sigma_with_another_margin_and_for_a_schedule_of_one_s_own():
    low, high = nss.sigma_range(nss.linear(), 0.25)
    assert (low, high) == (-math.log(0.75), -math.log(0.25))
    assert nss.linear().sigma(jnp.array([1.0, 0.0]), margin=0.25).tolist() == pytest.approx([low, high])
    square = nss.NoiseSchedule("square", lambda u: jnp.square(1 - u), lambda u: 2 * u - 2)
    assert nss.sigma_range(square)[1] == pytest.approx(-2 * math.log(1e-4))


# ---- the plateau, for sampling


@pytest.mark.parametrize("base", [nss.linear(), nss.cosine(), nss.polynomial(2)], ids=lambda schedule: schedule.name)
def test_a_plateau_rises_to_its_alpha_rests_and_goes_on(base):
    schedule = nss.plateau(base, t_on=0.6, t_off=0.25, alpha_on=0.8)
    with jax.enable_x64():
        u = jnp.linspace(0, 1, 201)
        alpha = np.asarray(schedule.alpha(u))
        above, below = np.asarray(u) > 0.6, np.asarray(u) < 0.25
        np.testing.assert_allclose(alpha[above], 0.8 * base.alpha((u[above] - 0.6) / 0.4), rtol=1e-12)
        np.testing.assert_array_equal(alpha[~above & ~below], 0.8)
        np.testing.assert_allclose(alpha[below], 0.8 + 0.2 * base.alpha(u[below] / 0.25), rtol=1e-12)
        assert (np.diff(alpha) <= 0).all() and (alpha[0], alpha[-1]) == (1, 0)
        inner, h = jnp.array([0.03, 0.2, 0.3, 0.55, 0.65, 0.9]), 1e-6
        central = (schedule.alpha(inner + h) - schedule.alpha(inner - h)) / (2 * h)
        np.testing.assert_allclose(schedule.derivative(inner), central, rtol=1e-5, atol=1e-8)


def test_under_a_plateau_a_network_is_shown_the_noise_levels_that_it_knows():
    schedule = nss.plateau(nss.linear(), t_on=0.55, t_off=0.05, alpha_on=0.9)
    alpha = jnp.array([1.0, 0.9, 0.0])
    np.testing.assert_array_equal(schedule.sigma(alpha), nss.linear().sigma(alpha))
    assert schedule == nss.plateau(nss.linear(), t_on=0.55, t_off=0.05, alpha_on=0.9)


# ---- values, configs, bad input


def test_schedules_are_values():
    assert nss.linear() == nss.build("linear", eps=None) == nss.linear(eps=0)
    assert nss.polynomial(2) == nss.build("polynomial", w=2.0) == pickle.loads(pickle.dumps(nss.polynomial(2)))
    assert hash(nss.build("clipped", base="cosine", eps=0.1)) == hash(nss.clipped(nss.cosine(), 0.1))
    assert nss.polynomial(2) != nss.polynomial(3)


def test_the_fields_of_a_clipped_config_reach_its_base():
    schedule = nss.build("clipped", base="polynomial", w=3, eps=0.1)
    assert float(schedule.alpha(0.5)) == pytest.approx(0.8 * (1 - 0.125) + 0.1)
    assert nss.build("clipped", base=nss.polynomial(3), eps=0.1) == schedule


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nss.build("linaer"), r"noise_schedule\.kind: got 'linaer' \(did you mean 'linear'\?\)"),
        (lambda: nss.build("linear", w=1), r"noise_schedule\.w: .*allowed: 'eps'"),
        (lambda: nss.build("cosine", w=1), r"noise_schedule\.w: got 1; allowed: nothing"),
        (lambda: nss.build("polynomial"), r"noise_schedule\.w: got None"),
        (lambda: nss.build("polynomial", w=[1]), r"noise_schedule\.w: got \[1\]"),
        (lambda: nss.build("clipped", eps=0.1), r"noise_schedule\.base: got None"),
        (lambda: nss.build("clipped", base="cosine"), r"noise_schedule\.eps: got None"),
        (lambda: nss.build("clipped", base="cosin", eps=0.1), r"noise_schedule\.base: got 'cosin'"),
        (lambda: nss.build("clipped", base="clipped", eps=0.1), r"noise_schedule\.base: got 'clipped'"),
        (lambda: nss.build("clipped", base="cosine", eps=0.1, w=2), r"noise_schedule\.w: got 2"),
        (lambda: nss.build("clipped", base=3, eps=0.1), r"noise_schedule\.base: got 3"),
        (lambda: nss.linear(1.0), r"noise_schedule\.eps: got 1\.0; allowed: a number in \[0, 1\)"),
        (lambda: nss.linear(-0.1), r"noise_schedule\.eps: got -0\.1"),
        (lambda: nss.linear(math.nan), r"noise_schedule\.eps: got nan"),
        (lambda: nss.polynomial(0), r"noise_schedule\.w: got 0"),
        (lambda: nss.polynomial("2"), r"noise_schedule\.w: got '2'"),
        (lambda: nss.geometric(0, 1), r"noise_schedule\.smin: got 0"),
        (lambda: nss.geometric(2, 1), r"noise_schedule\.smax: got 1; allowed: a number above smin \(2\)"),
        (lambda: nss.geometric(2, math.inf), r"noise_schedule\.smax: got inf"),
        (lambda: nss.clipped(nss.cosine(), 0.5), r"noise_schedule\.eps: got 0\.5"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(UserError, match=message):
        call()
