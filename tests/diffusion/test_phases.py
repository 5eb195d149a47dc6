"""Phases against the steps of the hyperschedule, by enumeration, and against their law."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from hdlm_jax.diffusion import hyperschedules, noise_schedules, noising, phases

L = 11
ROWS, STEPS = 6, 24  # of every batch of phases, so that one compilation serves all
LINEAR = noise_schedules.linear()
TILEABLE = [
    hyperschedules.quenched(L),
    hyperschedules.block(L, 4, 2),
    hyperschedules.block(L, 4, "4/3"),
    hyperschedules.slide(L, 4, 2),
    hyperschedules.slide(L, 6, "3/2"),
    hyperschedules.slide(L, 2, "1/2"),
    hyperschedules.block_slide(L, 5, 4, 2),
    hyperschedules.from_function(lambda step, i: (i // 3 + 2 - step).clip(0, 2), L, 5),
]
NAMES = [f"{hs.kind}-{hs.width}-{hs.rate}".replace("/", ":") for hs in TILEABLE]


def enumerated(monkeypatch, hs, origin):
    """The tiled phase of every phase 0..P-1, all groups at the same one; fields [P, L]."""
    P = hs.period
    fraction_B = 1 - (jnp.arange(ROWS) % P + 0.5) / P
    monkeypatch.setattr(phases, "stratified", lambda rng, count: jnp.tile(fraction_B, count // ROWS))
    phase = phases.tiled(jax.random.key(0), jnp.full(ROWS, origin), hs, LINEAR, 1.0)
    return jax.tree.map(lambda x: np.asarray(x)[:P], phase)


def over_steps(hs, origin):
    """The plain phase of every step; fields [T, L]."""
    phase = phases.at_step(jnp.arange(STEPS), jnp.full(STEPS, origin), L, hs, LINEAR, 1.0)
    return jax.tree.map(lambda x: np.asarray(x)[: hs.num_steps], phase)


def ended(phase, end):
    """The phases of a text that ends at `end`."""
    cut = jax.tree.map(lambda x: x[:, :end], phase)
    return cut._replace(stop=np.minimum(cut.stop, end))


continuous = jax.jit(phases.continuous, static_argnums=(1, 2, 3, 4, 5))
at_step = jax.jit(phases.at_step, static_argnums=(2, 3, 4, 5))
tiled = jax.jit(phases.tiled, static_argnums=(2, 3, 4, 5))


def calls_of(phase, position, share):
    """What the draws ask of one position, as a sorted list, with the weights of one draw in `share`."""
    changes = phase.last_weight[:, position] + phase.mask_weight[:, position] > 0
    weights = [phase.mask_weight * share, phase.last_weight * share, phase.steps * share]
    alphas = np.stack([phase.alpha_t, phase.alpha_s, *weights])
    columns = np.concatenate([alphas, [phase.start, phase.stop]])[:, changes, position]
    return sorted(map(tuple, columns.T.round(6)))


@pytest.mark.parametrize("hs", TILEABLE, ids=NAMES)
@pytest.mark.parametrize("origin", [0, 4])
def test_the_phases_together_are_the_steps(monkeypatch, hs, origin):
    """Every call of a position stands in one phase, with its levels, its window, and P times its weight."""
    together, after = enumerated(monkeypatch, hs, origin), over_steps(hs, origin)
    before = ended(over_steps(hs, 0), origin)
    for i in range(L):
        one_by_one = calls_of(before, i, 1 / hs.num_steps) if i < origin else calls_of(after, i, 1 / hs.num_steps)
        assert len(one_by_one) == hs.period
        assert calls_of(together, i, 1 / hs.period) == one_by_one


@pytest.mark.parametrize("hs", TILEABLE, ids=NAMES)
def test_plain_phases_are_the_levels_and_windows_moved_right_by_the_origin(hs):
    levels = np.asarray(hs.levels)
    for origin in (0, 3, L - 1):
        phase = over_steps(hs, origin)
        moved = np.concatenate([np.zeros((len(levels), origin), int), levels[:, : L - origin]], 1)
        np.testing.assert_allclose(phase.alpha_t, 1 - moved[:-1] / hs.tau_max, atol=1e-6)
        np.testing.assert_allclose(phase.alpha_s, 1 - moved[1:] / hs.tau_max, atol=1e-6)
        windows = np.array([hs.window(step) for step in range(hs.num_steps)])
        np.testing.assert_array_equal(phase.start, np.repeat(windows[:, :1] + origin, L, 1))
        np.testing.assert_array_equal(phase.stop, np.repeat(np.minimum(windows[:, 1:] + origin, L), L, 1))
        masked = np.where(moved[:-1] > 0, moved[:-1], 1) / hs.tau_max
        expected = hs.num_steps * (moved[:-1] - moved[1:]) / hs.tau_max / masked
        np.testing.assert_allclose(phase.mask_weight, expected, rtol=1e-5)
        settles = (moved[:-1] > 0) & (moved[1:] == 0)
        np.testing.assert_array_equal(phase.last_weight, np.where(settles, hs.num_steps, 0))
        np.testing.assert_array_equal(phase.steps, np.where(moved[1:] < moved[:-1], hs.num_steps, 0))


@pytest.mark.parametrize("hs", [TILEABLE[i] for i in (1, 4)], ids=[NAMES[i] for i in (1, 4)])
def test_every_level_of_every_position_is_drawn_equally_often(hs):
    B, draws, P = 3, 3000, hs.period
    origin_B = jnp.array([0, 4, 9])
    draw = jax.jit(jax.vmap(lambda rng: phases.tiled(rng, origin_B, hs, LINEAR, 1.0).alpha_t))
    alpha_RxBxL = np.asarray(draw(jax.random.split(jax.random.key(1), draws)))
    level_RxBxL = ((1 - alpha_RxBxL) * P).round().astype(int)
    assert level_RxBxL.min() == 1 and level_RxBxL.max() == P
    counts = [np.bincount(level_RxBxL[:, b, i] - 1, minlength=P) for b in range(B) for i in range(L)]
    assert min(chisquare(count).pvalue for count in counts) > 1e-4 / len(counts)


def test_phases_spread_evenly_over_a_text_and_over_the_batch():
    """The mean level of a text's blocks, and of a batch, varies far less than that of independent draws."""
    hs, draws = hyperschedules.block(32, 2, "1/8"), 400
    P, G = hs.period, hs.num_groups

    def mean_levels(B):
        level = lambda rng: 16 * (1 - phases.tiled(rng, jnp.zeros(B, jnp.int32), hs, LINEAR, 1.0).alpha_t)
        return np.asarray(jax.jit(jax.vmap(lambda rng: level(rng).mean(1)))(jax.random.split(jax.random.key(2), draws)))

    for level_RxB in (mean_levels(1), mean_levels(3)):
        independent = np.sqrt((P**2 - 1) / 12 / G)
        assert (level_RxB.std(0) < 0.5 * independent).all()
        assert level_RxB.mean(1).std() < 0.5 * independent / level_RxB.shape[1] ** 0.5
        assert abs(level_RxB.mean() - (P + 1) / 2) < 4 * level_RxB.std() / level_RxB.size**0.5


def test_stratified_draws_are_uniform_and_one_in_each_stratum():
    count, draws = 7, 4000
    draw = jax.jit(jax.vmap(partial(phases.stratified, count=count)))
    u_RxC = np.asarray(draw(jax.random.split(jax.random.key(0), draws)))
    assert u_RxC.min() >= 0 and u_RxC.max() < 1
    for u_R in u_RxC.T:
        assert chisquare(np.histogram(u_R, 20, (0, 1))[0]).pvalue > 1e-3 / count
    # without its stratum's place each draw lies on the same arc, one stratum long
    offset_RxC = np.exp(2j * np.pi * (u_RxC - np.arange(count) / count))
    arc_R = np.ptp(np.angle(offset_RxC / offset_RxC[:, :1]), 1) / (2 * np.pi)
    assert arc_R.max() < 1 / count + 1e-6


@pytest.mark.parametrize(
    "schedule", [LINEAR, noise_schedules.cosine(), noise_schedules.geometric(0.01, 4.0)], ids=lambda s: s.name
)
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_continuous_weights_integrate_to_the_schedule(schedule, share):
    """The mean over u of weight x P(mask) is alpha(0) - alpha(1), whatever the share shown at 0+."""
    u_B = (jnp.arange(4000) + 0.5) / 4000
    alpha_max = noising.epsilon_hybrid(3, 0.1).alpha_max
    phase = jax.tree.map(np.asarray, continuous(u_B, 2, schedule, alpha_max, share))
    at_zero = np.asarray(u_B) < share
    least = min(float(schedule.alpha(jnp.zeros(()))), np.float32(alpha_max))
    np.testing.assert_array_equal(phase.alpha_t[at_zero], np.float32(least))
    np.testing.assert_array_equal(phase.steps[at_zero], 0)
    np.testing.assert_allclose(phase.steps, phase.mask_weight * (1 - phase.alpha_t), rtol=1e-5)
    np.testing.assert_array_equal(phase.mask_weight[at_zero], 0)
    np.testing.assert_allclose(phase.last_weight.mean(), 1.0 if share else 0.0, rtol=1e-6)
    np.testing.assert_array_equal(phase.last_weight[~at_zero], 0)
    ends = np.asarray(schedule.alpha(jnp.array([0.0, 1.0])))
    np.testing.assert_allclose((phase.mask_weight * (1 - phase.alpha_t)).mean(), ends[0] - ends[1], rtol=1e-3)
    u = (np.asarray(u_B)[~at_zero] - share) / (1 - share)
    np.testing.assert_allclose(phase.alpha_t[~at_zero, 0], schedule.alpha(jnp.asarray(u)), atol=1e-5)
    assert (phase.start == 0).all() and (phase.stop == 2).all()


def test_a_continuous_time_of_zero_has_a_finite_weight():
    phase = continuous(jnp.zeros(1), 1, LINEAR, 1.0)
    assert 0 < float(phase.mask_weight[0, 0]) < 2e6 and float(phase.alpha_t[0, 0]) < 1


def test_noise_range_limits_the_draws_and_keeps_their_weights():
    low, high = 0.3, 0.8
    u_B = (jnp.arange(64) + 0.5) / 64
    phase = jax.tree.map(np.asarray, continuous(u_B, 1, LINEAR, 1.0, 0.25, (low, high)))
    noised = phase.last_weight[:, 0] == 0
    assert noised.sum() == 48  # the share at 0+ is what it is without a range
    masked = 1 - phase.alpha_t[noised, 0]
    np.testing.assert_allclose(np.sort(masked), low + (high - low) * (np.arange(48) + 0.5) / 48, rtol=1e-5)
    np.testing.assert_allclose(phase.mask_weight[noised, 0], 1 / masked / 0.75, rtol=1e-5)

    hs = hyperschedules.block(L, 4, "2/5")  # 10 levels
    phase = tiled(jax.random.key(0), jnp.zeros(200, jnp.int32), hs, LINEAR, 1.0, (low, high))
    level = np.asarray((1 - phase.alpha_t) * hs.period).round().astype(int)
    assert set(level.ravel()) == {4, 5, 6, 7, 8}
    np.testing.assert_allclose(phase.mask_weight, hs.period / level, rtol=1e-5)


def test_survival_is_exact_at_the_ends_and_follows_the_dtype():
    alpha_max = noising.epsilon_hybrid(3, 0.1).alpha_max
    nearly = noise_schedules.polynomial(8)
    alpha = phases.survival(jnp.arange(4), 3, nearly, alpha_max)
    assert alpha[0] == 1 and alpha[1] < 1 and alpha[3] == 0
    assert phases.survival(jnp.array(1), 1000, nearly, alpha_max) == np.float32(alpha_max)
    with jax.enable_x64(True):
        alpha = phases.survival(jnp.arange(4, dtype=jnp.int32), 3, LINEAR, 1.0)
        np.testing.assert_allclose(alpha, 1 - np.arange(4) / 3, rtol=1e-15)


def test_pure_noise_keeps_nothing_in_a_compiled_program_either():
    """XLA would multiply by 1 / tau_max and fuse: 1 - 3 (1/3) is below 0 without a rounding in between."""

    def fused(tau_max):
        level = jnp.arange(tau_max + 1)
        alpha = phases.survival(level, tau_max, LINEAR, 1.0)
        return alpha, jnp.where(level == 0, 1.0, 0.7 * alpha)

    for alphas in jax.jit(lambda: [fused(tau_max) for tau_max in (1, 3, 7, 11, 41, 47)])():
        for alpha in alphas:
            assert alpha[0] == 1 and alpha[-1] == 0 and (np.diff(alpha) < 0).all()


def test_weights_are_finite_where_a_schedule_rounds_to_one():
    hs = hyperschedules.flat(2, 256)
    polynomial = noise_schedules.polynomial(4)
    phase = at_step(jnp.arange(256), jnp.zeros(256, jnp.int32), 2, hs, polynomial, 1.0)
    assert (phase.alpha_t[-1] == 1).all()
    assert all(bool(jnp.isfinite(field).all()) for field in phase)
