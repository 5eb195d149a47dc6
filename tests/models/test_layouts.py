"""Layouts: the tiled pass is the plain layout of every call, split attention is the dense mask, nothing leaks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.diffusion import hyperschedules, noise_schedules, phases, visibility
from hdlm_jax.models import layouts
from hdlm_jax.models.attention import dense
from hdlm_jax.models.transformer import TransformerConfig, forward, init, logits

L, N, BOS, WIDTH = 14, 5, 3, 4  # three chunks of the widest window are shorter than the text: the band is used
WINDOWS, PHASES, STEPS = L, 4, 30  # trailing rows, phases and steps of every batch: one compilation serves all
ORIGINS = (0, 5)
LINEAR = noise_schedules.linear()
TILEABLE = [
    hyperschedules.quenched(L),
    hyperschedules.block(L, 4, 2),
    hyperschedules.block(L, 3, 1),
    hyperschedules.slide(L, 4, 2),
    hyperschedules.slide(L, 4, "4/3"),
    hyperschedules.slide(L, 2, "1/2"),
    hyperschedules.block_slide(L, 5, 4, 2),
]
# shifted models have a trailing row where the window's last token may carry information, and always if told so
CASES = [("aligned", hs, False) for hs in TILEABLE]
CASES += [("shifted", hs, visibility.trailing_row_matters(hs, LINEAR)) for hs in TILEABLE]
CASES += [("shifted", TILEABLE[0], True), ("shifted", TILEABLE[3], True)]
NAMES = [
    f"{prediction}-{hs.kind}-{hs.width}-{hs.rate}{'-trailing' * trailing}".replace("/", ":")
    for prediction, hs, trailing in CASES
]
# settled rows that see whole groups: half a block, a block, what a call of a slide settles
GROUPS = [("aligned", TILEABLE[1], 2), ("shifted", TILEABLE[1], 4), ("shifted", TILEABLE[3], 2)]


@pytest.fixture(autouse=True)
def small_chunks_in_float64(monkeypatch):
    monkeypatch.setattr(layouts, "MIN_CHUNK", 1)
    with jax.enable_x64(True):
        yield


def config_of(prediction, visible="prefix", group=1):
    """A network conditioned on the noise level, so that the level each row is given counts too."""
    return TransformerConfig(
        num_tokens=N,
        length=L,
        hidden=8,
        blocks=2,
        heads=2,
        prediction=prediction,
        visibility=visible,
        context_group=group,
        bos_id=BOS,
        conditioning=4,
        interpolation=0.2,
        remat="none",
        vocabulary_multiple=1,
    )


@pytest.fixture(scope="module")
def params():
    """Random parameters; both kinds of prediction have the same."""
    shapes = jax.eval_shape(lambda: init(config_of("aligned"), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape) * 0.5, shapes)


def run(config, params, rows, attention=None):
    """Hidden rows [B, R, D] and the scores [B, L, V] of the predicting ones."""
    params, sigma = jax.tree.map(jnp.asarray, params), LINEAR.sigma(rows.alpha)
    attention = rows.attention if attention is None else attention
    hidden, _ = forward(config, params, rows.tokens, rows.positions, attention, sigma_BxR=sigma)
    first, end = rows.predicting
    return hidden, logits(config, params, hidden[:, first:end])[..., :N]


@partial(jax.jit, static_argnums=(0, 1))
def run_tiled(config, trailing, params, x0_BxL, zt_BxL, phase):
    return run(config, params, layouts.tiled(config, x0_BxL, zt_BxL, phase, WIDTH, WINDOWS * trailing))


@partial(jax.jit, static_argnums=0)
def attend_both_ways(windows, phase, trailing_start_BxW, qkv):
    """The attention of a tiled layout on random rows: split, and dense under the whole mask."""
    zt_BxL = jnp.zeros(phase.start.shape, jnp.int32)
    rows = layouts.tiled(config_of("shifted" if windows else "aligned"), zt_BxL, zt_BxL, phase, WIDTH, windows)
    whole = dense(layouts.tiled_visible(phase.start, trailing_start_BxW if windows else None))
    return rows.attention(*qkv, None, None), whole(*qkv, None, None)


@partial(jax.jit, static_argnums=(0, 1))
def run_plain(config, trailing, params, zt_BxL, phase):
    return run(config, params, layouts.plain(config, zt_BxL, phase, trailing))[1]


def all_phases(monkeypatch, hs, origins=ORIGINS):
    """Tiled phases [2 PHASES, L]: phases 0..3 modulo the period, with each origin in turn."""
    origin_B = jnp.repeat(jnp.array(origins), PHASES)
    fraction_B = 1 - (jnp.arange(2 * PHASES) % PHASES % hs.period + 0.5) / hs.period
    monkeypatch.setattr(phases, "stratified", lambda rng, count: jnp.tile(fraction_B, count // len(fraction_B)))
    return phases.tiled(jax.random.key(0), origin_B, hs, LINEAR, 1.0)


def noised_texts(phase, seed=0):
    """Clean texts, and noised ones with masks and shuffled tokens wherever the level is above 0."""
    rng, shape = np.random.default_rng(seed), phase.alpha_t.shape
    x0, noise = rng.integers(0, N, shape), rng.integers(0, N + 1, shape)
    return x0.astype(np.int32), np.where(np.asarray(phase.alpha_t) < 1, noise, x0).astype(np.int32)


def trailing_starts(phase):
    """[B, WINDOWS]: the start of each window in order, -1 where there are no more."""
    out = np.full((len(phase.start), WINDOWS), -1)
    for row, start_L in zip(out, np.asarray(phase.start), strict=True):
        starts = np.unique(start_L)
        row[: len(starts)] = starts
    return jnp.asarray(out)


@pytest.mark.parametrize("trailing", [False, True])
@pytest.mark.parametrize("hs", TILEABLE, ids=lambda hs: f"{hs.kind}-{hs.width}-{hs.rate}".replace("/", ":"))
def test_split_attention_is_the_dense_mask(monkeypatch, hs, trailing):
    phase, windows = all_phases(monkeypatch, hs), WINDOWS * trailing
    rng = np.random.default_rng(0)
    qkv = [rng.normal(size=(2 * PHASES, 2, 2 * L + windows, 4)) for _ in range(3)]
    split, whole = attend_both_ways(windows, phase, trailing_starts(phase), qkv)
    np.testing.assert_allclose(split, whole, atol=1e-13)


@pytest.mark.parametrize(("prediction", "hs", "trailing"), CASES, ids=NAMES)
def test_every_window_of_a_tiled_pass_is_the_plain_layout_at_its_step(monkeypatch, params, prediction, hs, trailing):
    """Same levels, same noise: what training shows a window is what generation feeds at that call.

    What precedes an origin is generated as a text of its own, which ends there.
    """
    check_windows(monkeypatch, params, config_of(prediction), hs, trailing, ORIGINS)


@pytest.mark.parametrize(("prediction", "hs", "group"), GROUPS)
def test_so_it_is_where_settled_rows_see_whole_groups(monkeypatch, params, prediction, hs, group):
    """Every window starts where a group does, at an origin too."""
    trailing = prediction == "shifted" and visibility.trailing_row_matters(hs, LINEAR)
    config = config_of(prediction, group=group)
    check_windows(monkeypatch, params, config, hs, trailing, (0, 4))
    phase = all_phases(monkeypatch, hs, (0, 4))
    zt_BxL, qkv = jnp.zeros(phase.start.shape, jnp.int32), np.random.default_rng(0).normal(size=(3, 8, 2, 2 * L, 4))
    split = layouts.tiled(config, zt_BxL, zt_BxL, phase, WIDTH).attention(*qkv, None, None)
    whole = dense(layouts.tiled_visible(phase.start, group=group))(*qkv, None, None)
    np.testing.assert_allclose(split, whole, atol=1e-13)


def check_windows(monkeypatch, params, config, hs, trailing, origins):
    phase = all_phases(monkeypatch, hs, origins)
    x0, zt = noised_texts(phase)
    scores = np.asarray(run_tiled(config, trailing, params, x0, zt, phase)[1])
    covered = np.zeros((2 * PHASES, L), int)
    step_T = np.arange(STEPS)
    for first_row, origin, end in [(0, 0, L), (PHASES, origins[1], L), (PHASES, 0, origins[1])]:
        call = phases.at_step(jnp.asarray(step_T), jnp.full(STEPS, origin), L, hs, LINEAR, 1.0)
        call = call._replace(stop=jnp.minimum(call.stop, end))
        row_T = first_row + step_T % hs.period
        start_T, stop_T = np.asarray(call.start)[:, 0], np.asarray(call.stop)[:, 0]
        place = np.arange(L)[None]
        text = np.where(place < start_T[:, None], x0[row_T], np.where(place < stop_T[:, None], zt[row_T], N))
        theirs = np.asarray(run_plain(config, trailing, params, text.astype(np.int32), call))
        for step in range(hs.num_steps):
            window = slice(start_T[step], max(start_T[step], stop_T[step]))
            np.testing.assert_allclose(scores[row_T[step], window], theirs[step, window], atol=1e-12)
            covered[row_T[step], window] += 1
    period = np.arange(2 * PHASES) % PHASES < hs.period
    np.testing.assert_array_equal(covered, np.repeat(period[:, None], L, 1))  # every position, once in every phase


def changed_rows(outputs_of, tokens):
    """[R, R] whether row i of the output moves, at all, when the token of row j does."""
    base = np.asarray(outputs_of(tokens))
    moves = []
    for j in range(tokens.shape[1]):
        other = np.asarray(outputs_of(np.where(np.arange(tokens.shape[1]) == j, (tokens + 1) % N, tokens)))
        moves.append((other != base).any(-1))
    return np.stack(moves, -1)


@pytest.mark.parametrize(
    ("prediction", "hs", "trailing"),
    [
        pytest.param("aligned", TILEABLE[3], False, id="aligned-slide", marks=pytest.mark.slow),
        pytest.param("shifted", TILEABLE[1], True, id="shifted-block-trailing"),
        pytest.param("shifted", TILEABLE[4], False, id="shifted-slide", marks=pytest.mark.slow),
    ],
)
def test_tiled_rows_move_with_what_they_may_see_and_with_nothing_else(monkeypatch, params, prediction, hs, trailing):
    phase = jax.tree.map(lambda x: x[jnp.array([1, 6])], all_phases(monkeypatch, hs))
    config = config_of(prediction)
    rows = layouts.tiled(config, *noised_texts(phase), phase, WIDTH, WINDOWS * trailing)
    moved = changed_rows(jax.jit(lambda tokens: run(config, params, rows._replace(tokens=tokens))[0]), rows.tokens)
    starts = trailing_starts(phase) if trailing else None
    np.testing.assert_array_equal(moved, layouts.tiled_visible(phase.start, starts))


@pytest.mark.parametrize("prediction", [pytest.param("aligned", marks=pytest.mark.slow), "shifted"])
def test_plain_rows_move_with_what_they_may_see_and_with_nothing_else(params, prediction):
    hs, config = TILEABLE[3], config_of(prediction)
    phase = phases.at_step(jnp.array([0, 3]), jnp.array([2, 0]), L, hs, LINEAR, 1.0)
    rows = layouts.plain(config, noised_texts(phase)[1], phase)
    moved = changed_rows(jax.jit(lambda tokens: run(config, params, rows._replace(tokens=tokens))[0]), rows.tokens)
    row_R, extra = np.arange(rows.tokens.shape[1]), prediction == "shifted"
    for b in range(2):
        start, stop = int(phase.start[b, 0]), int(phase.stop[b, 0]) + extra
        assert 0 < start < stop < L
        np.testing.assert_array_equal(moved[b], visibility.one_text(row_R[:, None], row_R[None], start, stop))


def test_a_full_model_sees_everything_and_feeds_its_last_token(params):
    zt = np.arange(2 * L, dtype=np.int32).reshape(2, L) % N
    phase = phases.continuous(jnp.array([0.3, 0.6]), L, LINEAR, 1.0)
    assert layouts.plain(config_of("aligned", "full"), zt, phase).tokens.shape == (2, L)
    config = config_of("shifted", "full")
    rows = layouts.plain(config, zt, phase, trailing=False)
    assert rows.tokens.shape == (2, L + 1) and rows.predicting == (0, L)
    moved = changed_rows(jax.jit(lambda tokens: run(config, params, rows._replace(tokens=tokens))[0]), rows.tokens)
    assert moved.all()
    np.testing.assert_array_equal(rows.tokens, np.pad(zt, ((0, 0), (1, 0)), constant_values=BOS))
    np.testing.assert_array_equal(rows.positions, np.broadcast_to(np.arange(-1, L), (2, L + 1)))
    np.testing.assert_allclose(rows.alpha, np.repeat([[1.0, *[0.7] * L], [1.0, *[0.4] * L]], 1, 0), rtol=1e-12)
    whole = layouts.whole_window(config, zt)
    np.testing.assert_array_equal(whole.tokens, rows.tokens)
    assert (whole.alpha == 1).all()


@pytest.mark.parametrize("width", [4, 3, 1])
def test_block_visibility_is_block_diffusions(width):
    """BD3-LM's mask on [clean; noised] copies, blocks b(i): noised rows see their block and earlier clean blocks.

    Clean rows are causal here, block-causal there; with blocks of one token that is the same.
    """
    ours = np.asarray(layouts.tiled_visible(jnp.arange(L)[None] // width * width))[0]
    block, clean = np.tile(np.arange(L) // width, 2), np.repeat([True, False], L)
    (bq, cq), (bk, ck) = (block[:, None], clean[:, None]), (block[None], clean[None])
    diagonal = (bq == bk) & (cq == ck)
    offset = (bq > bk) & ~cq & ck
    causal = (bq >= bk) & cq & ck
    theirs = diagonal | offset | causal
    np.testing.assert_array_equal(ours[L:], theirs[L:])
    in_order = np.arange(2 * L)[:, None] >= np.arange(2 * L)[None]
    np.testing.assert_array_equal(ours[:L], (theirs & in_order)[:L])
    assert (width > 1) or (ours == theirs).all()


def test_windows_of_one_row_are_a_causal_language_model(monkeypatch, params):
    """quenched + absorb + shifted: one causal pass is the tiled pass, and a GPT: BOS, then each token."""
    hs, config = TILEABLE[0], config_of("shifted")
    phase = all_phases(monkeypatch, hs)
    x0, _ = noised_texts(phase)
    masks = np.full_like(x0, N)

    def gpt(params, x0):
        """Nothing of layouts: tokens moved right by one, a lower triangle."""
        tokens = jnp.concatenate([jnp.full((len(x0), 1), BOS, jnp.int32), x0[:, :-1]], 1)
        positions = jnp.broadcast_to(jnp.arange(-1, L - 1), tokens.shape)
        sigma = LINEAR.sigma(jnp.ones(tokens.shape))
        sees = dense(jnp.tril(jnp.ones((1, L, L), bool)))
        hidden, _ = forward(config, params, tokens, positions, sees, sigma_BxR=sigma)
        return logits(config, params, hidden)[..., :N]

    both = jax.jit(lambda params, x0: (run(config, params, layouts.causal(config, x0))[1], gpt(params, x0)))
    causal, theirs = both(jax.tree.map(jnp.asarray, params), x0)
    np.testing.assert_allclose(causal, theirs, atol=1e-12)
    np.testing.assert_allclose(causal, run_tiled(config, False, params, x0, masks, phase)[1], atol=1e-12)


@pytest.mark.parametrize(
    "hs",
    [
        hyperschedules.quenched(L),
        hyperschedules.block(L, 3, 1),
        hyperschedules.slide(L, 3, "1/2"),
        hyperschedules.block_slide(L, 4, 3, "1/2"),
        hyperschedules.from_function(lambda step, i: (2 * np.maximum(i - 7, 0) + 2 - step).clip(0, 2), L, 14),
    ],
    ids=lambda hs: f"{hs.kind}-{hs.width}-{hs.rate}".replace("/", ":"),
)
def test_there_are_never_more_windows_than_trailing_rows(hs):
    draw = jax.jit(lambda rng: phases.tiled(rng, jnp.arange(L), hs, LINEAR, 1.0).start)
    starts = np.concatenate([draw(jax.random.key(seed)) for seed in range(5)])
    most = max(len(np.unique(start_L)) for start_L in starts)
    assert most <= layouts.most_windows(hs) <= L
