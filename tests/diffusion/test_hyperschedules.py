"""Hyperschedules against loops that follow the definitions word by word."""

import math
import pickle
from fractions import Fraction

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from hdlm_jax.diffusion import hyperschedules as hss
from hdlm_jax.errors import UserError

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, database=None)
MAX_L, STEPS = 14, np.arange(-2, 100)  # every schedule drawn here ends within these steps

# ---- the definitions, as loops


def starts_of(kind, length, **f):
    """start_i of the closed forms."""
    rate, width, restart = Fraction(f.get("rate", 1)), f.get("width", 1), f.get("block")
    tau_max = f["steps"] if kind == "flat" else int(width / rate)
    start = {
        "quenched": lambda i: i,
        "flat": lambda i: 0,
        "block": lambda i: tau_max * (i // width),
        "slide": lambda i: math.floor(i / rate),
        "block_slide": lambda i: (
            (i // restart) * (math.floor((restart - 1) / rate) + tau_max) + math.floor((i % restart) / rate)
        ),
    }[kind]
    return [start(i) for i in range(length)], tau_max


def levels_of(starts, tau_max):
    """tau [T+1, L], one entry at a time."""
    T = max(starts) + tau_max
    tau = np.zeros((T + 1, len(starts)), int)
    for step in range(T + 1):
        for i, start in enumerate(starts):
            tau[step, i] = min(max(start + tau_max - step, 0), tau_max)
    return tau


def regions_of(tau, step):
    """0 settled, 1 active, 2 worthless: started once the first call that changes the position has come."""
    T, L = tau.shape[0] - 1, tau.shape[1]
    region = []
    for i in range(L):
        changing = [k for k in range(T) if tau[k + 1, i] < tau[k, i]]
        settled = tau[min(max(step, 0), T), i] == 0
        region.append(0 if settled else 1 if changing[0] <= step else 2)
    return region


def window_of(tau, step):
    region = regions_of(tau, step)
    active = [i for i, r in enumerate(region) if r == 1]
    if active:
        return active[0], active[-1] + 1
    waiting = [i for i, r in enumerate(region) if r != 0]
    return (waiting[0],) * 2 if waiting else (tau.shape[1],) * 2


# ---- random schedules


@st.composite
def configs(draw, kinds=("quenched", "flat", "block", "slide", "block_slide")):
    """(kind, length, fields): all (width, rate) that exist have the form (w, w / tau_max)."""
    kind, length = draw(st.sampled_from(kinds)), draw(st.integers(1, MAX_L))
    if kind == "quenched":
        return kind, length, {}
    tau_max = draw(st.integers(1, 5))
    if kind == "flat":
        return kind, length, {"steps": tau_max}
    block = draw(st.integers(1, length))
    width = draw(st.integers(1, block if kind == "block_slide" else length))
    fields = {"width": width, "rate": Fraction(width, tau_max)}
    return kind, length, fields | ({"block": block} if kind == "block_slide" else {})


@st.composite
def tables(draw):
    """Levels [T+1, L] that wait, skip, come in any order, some positions given."""
    T, L, tau_max = draw(st.integers(1, 7)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    columns = []
    for _ in range(L):
        middle = sorted(draw(st.lists(st.integers(0, tau_max), min_size=T - 1, max_size=T - 1)), reverse=True)
        columns.append([0] * (T + 1) if draw(st.integers(0, 4)) == 0 else [tau_max, *middle, 0])
    columns[0] = columns[0] if any(map(any, columns)) else [tau_max] * T + [0]
    return np.array(columns).T


def build(config):
    kind, length, fields = config
    return hss.build(kind, length, **fields)


def prompted(starts, tau_max, n):
    """The definition for L - n, moved right by n."""
    free = len(starts) - n
    tail = levels_of(starts[:free], tau_max) if free else np.zeros((1, 0), int)
    return np.concatenate([np.zeros((len(tail), n), int), tail], axis=1)


# ---- closed forms


@SETTINGS
@given(configs(), st.data())
def test_levels_starts_and_steps_follow_the_definition(config, data):
    hs, (starts, tau_max) = build(config), starts_of(config[0], config[1], **config[2])
    n = data.draw(st.integers(0, hs.length))
    tau, given_hs = prompted(starts, tau_max, n), hs.with_prompt(n)
    assert hs.starts.tolist() == starts and hs.starts.dtype == np.int32
    assert given_hs.starts.tolist() == [-tau_max] * n + starts[: hs.length - n]
    assert (given_hs.num_steps, given_hs.tau_max, given_hs.length) == (len(tau) - 1, tau_max, hs.length)
    steps, positions = np.arange(len(tau)), np.arange(hs.length)
    assert np.array_equal(given_hs.level_of(positions[None], steps[:, None]), tau)
    assert given_hs.validate() is given_hs


@SETTINGS
@given(configs(), st.integers(0, MAX_L))
def test_jax_and_numpy_compute_the_same(config, n):
    hs = build(config)
    hs = hs.with_prompt(min(n, hs.length))
    grid = np.meshgrid(np.arange(-2, MAX_L + 3), STEPS)
    assert np.array_equal(hs.level_of(*map(jnp.asarray, grid)), hs.level_of(*grid))
    assert np.array_equal(hs.start_of(jnp.asarray(grid[0])), hs.start_of(grid[0]))
    start_T, stop_T = hs.window(jnp.asarray(STEPS))
    assert start_T.dtype == stop_T.dtype == jnp.int32
    assert list(zip(start_T.tolist(), stop_T.tolist(), strict=True)) == [hs.window(int(s)) for s in STEPS]


@SETTINGS
@given(configs(), st.integers(0, MAX_L))
def test_windows_hold_exactly_the_active_positions(config, n):
    hs, (starts, tau_max) = build(config), starts_of(config[0], config[1], **config[2])
    n = min(n, hs.length)
    tau, hs = prompted(starts, tau_max, n), hs.with_prompt(n)
    for step in range(-2, len(tau) + 2):
        assert hs.window(step) == window_of(tau, step)
        start, stop = hs.window(step)
        assert regions_of(tau, step) == [0] * start + [1] * (stop - start) + [2] * (hs.length - stop)
    widest = max(stop - start for start, stop in map(hs.window, range(len(tau))))
    assert (hs.width, hs.rate) == (widest, Fraction(widest, tau_max))
    if n == 0 and "width" in config[2]:
        assert (hs.width, hs.rate) == (config[2]["width"], config[2]["rate"])


@SETTINGS
@given(configs(kinds=("slide",)))
def test_the_window_of_a_slide_is_the_published_closed_form(config):
    _, L, f = config
    hs, rate = build(config), f["rate"]
    assert hs.num_steps == math.floor((L - 1) / rate) + hs.tau_max
    for step in range(hs.num_steps):
        edge = math.ceil(rate * (step + 1))
        assert hs.window(step) == (min(max(edge - f["width"], 0), L), min(L, edge))


@SETTINGS
@given(configs(kinds=("quenched", "block", "slide", "block_slide")))
def test_the_tiling_covers_every_position_once_at_every_phase(config):
    hs = build(config)
    P, (starts, tau_max) = hs.period, starts_of(config[0], config[1], **config[2])
    tau = levels_of(starts, tau_max)
    active = np.array([[r == 1 for r in regions_of(tau, step)] for step in range(hs.num_steps)])
    assert tau_max == P and hs.settles_prefix
    for phase in range(P):
        assert (active[phase::P].sum(0) == 1).all()
        windows = [hs.window(step) for step in range(phase, hs.num_steps, P)]
        assert all(a[1] <= b[0] for a, b in zip(windows, windows[1:], strict=False))
    for shorter in range(1, P):  # no shorter period keeps the windows apart
        assert any(active[phase::shorter].sum(0).max() > 1 for phase in range(shorter))


@SETTINGS
@given(configs())
def test_groups_never_share_a_window(config):
    hs = build(config)
    group = hs.group_of(np.arange(hs.length))
    assert set(group) == set(range(hs.num_groups))
    assert hs.num_groups == (-(-hs.length // hs.width) if config[0] == "block" else hs.num_groups)
    for step in range(hs.num_steps):
        start, stop = hs.window(step)
        assert len(set(group[start:stop])) == 1


@SETTINGS
@given(configs(), st.integers(0, MAX_L))
def test_a_table_of_the_levels_is_the_same_schedule(config, n):
    hs = build(config)
    hs = hs.with_prompt(min(n, hs.length - 1))
    table = hss.from_levels(hs.level_of(np.arange(hs.length)[None], np.arange(hs.num_steps + 1)[:, None]))
    for name in ("length", "tau_max", "num_steps", "width", "rate", "settles_prefix", "cost"):
        assert getattr(table, name) == getattr(hs, name), name
    assert table.period == (hs.period if config[0] != "flat" else hs.tau_max)
    assert np.array_equal(table.starts, hs.starts)
    for step in range(-2, hs.num_steps + 2):
        assert table.window(step) == hs.window(step)


# ---- tables


@SETTINGS
@given(tables(), st.data())
def test_tables_against_the_definitions(tau, data):
    n = data.draw(st.integers(0, tau.shape[1]))
    hs = hss.from_levels(tau).with_prompt(n)
    free = tau[:, : tau.shape[1] - n]
    T = len(tau) - 1 if n == 0 else next(k for k in range(len(tau)) if not free[k].any())
    tau = np.concatenate([np.zeros((T + 1, n), int), free[: T + 1]], axis=1)
    assert hs.num_steps == T
    assert np.array_equal(hs.level_of(np.arange(hs.length)[None], np.arange(T + 1)[:, None]), tau)
    regions = np.array([regions_of(tau, step) for step in range(T + 1)])
    windows = [hs.window(step) for step in range(T + 1)]
    assert windows == [window_of(tau, step) for step in range(T + 1)]
    assert hs.window(-1) == window_of(tau, -1) and hs.window(T + 5) == (hs.length, hs.length)
    assert hs.width == max(stop - start for start, stop in windows)
    assert hs.settles_prefix == bool((np.diff(regions, axis=1) >= 0).all())
    active = regions == 1
    covered = lambda P: all((active[p::P].sum(0) == (active.any(0))).all() for p in range(P))
    tiles = hs.settles_prefix and active.any()
    assert hs.period == (next((P for P in range(1, T + 1) if covered(P)), None) if tiles else None)
    assert hs.cost * max(active.any(0).sum(), 1) == sum(stop - start for start, stop in windows)


def test_a_table_in_jax():
    tau = np.array([[3, 0, 3], [3, 0, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0]])
    hs = hss.from_levels(jnp.asarray(tau))
    assert np.array_equal(hs.levels, tau) and hs.levels.dtype == jnp.int32
    got = jax.jit(lambda step: (hs.levels_at(step), hs.window(step), hs.regions(step)))
    for step in range(5):
        levels_L, window, regions_L = got(step)
        assert np.array_equal(levels_L, tau[step])
        assert tuple(map(int, window)) == window_of(tau, step)
        assert regions_L.tolist() == regions_of(tau, step)
    assert not hs.settles_prefix and hs.period is None
    assert hs.starts.tolist() == [1, -3, 0]


def test_from_function_broadcasts():
    hs = hss.from_function(lambda step, i: 5 - step, length=3, num_steps=5)
    assert np.array_equal(hs.levels, hss.flat(3, 5).levels)
    reverse = hss.from_function(lambda step, i: 1 * (i < 4 - step), length=4, num_steps=4)
    assert not reverse.settles_prefix
    assert [reverse.window(step) for step in range(4)] == [(3, 4), (2, 3), (1, 2), (0, 1)]


# ---- AR-Diffusion


@pytest.mark.parametrize(("N", "tau_max"), [(1, 1), (1, 4), (5, 1), (6, 7), (9, 4), (13, 30)])
def test_ar_diffusion_is_the_rounded_line(N, tau_max):
    hs = hss.ar_diffusion(N, N - 1 + tau_max)
    assert (hs.num_steps, hs.tau_max, hs.settles_prefix, hs.period) == (N - 1 + tau_max, tau_max, True, None)
    expected = []
    for k in range(N - 1 + tau_max, -1, -1):  # the source's sentence step, noise first
        n_s, t_s = max(N - 1 - k, 0), max(k - (N - 1), 0)
        n_e, t_e = 2 * N, tau_max
        line = [Fraction((n - n_e) * (t_s - t_e), n_s - n_e) + t_e for n in range(N)]
        expected.append([min(max(round(value), 0), tau_max) for value in line])
    assert np.array_equal(hs.levels, expected)
    for step in range(len(expected)):
        assert hs.window(step) == window_of(np.array(expected), step)
    if N > 2:
        shorter = hss.ar_diffusion(N - 2, N - 3 + tau_max)
        assert np.array_equal(hs.with_prompt(2).levels[:, 2:], shorter.levels)


# ---- corner cases by hand


def test_length_not_a_multiple_of_the_width():
    hs = hss.block(length=7, width=3, rate=3)
    assert hs.starts.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert (hs.num_steps, hs.tau_max, hs.num_groups) == (3, 1, 3)
    assert [hs.window(step) for step in range(4)] == [(0, 3), (3, 6), (6, 7), (7, 7)]


def test_rate_below_one():
    hs = hss.slide(length=3, width=1, rate=0.5)
    assert hs.levels.tolist() == [[2, 2, 2], [1, 2, 2], [0, 2, 2], [0, 1, 2], [0, 0, 2], [0, 0, 1], [0, 0, 0]]


def test_rate_of_three_halves_with_width_six():
    hs = hss.slide(length=9, width=6, rate="3/2")
    assert hs.tau_max == 4 and hs.starts.tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5]
    windows = [(0, 2), (0, 3), (0, 5), (0, 6), (2, 8), (3, 9), (5, 9), (6, 9), (8, 9)]
    assert [hs.window(step) for step in range(hs.num_steps)] == windows


def test_a_rate_of_one_third_is_exact():
    """floor(i / (1/3)) in floats loses calls."""
    hs = hss.slide(length=1000, width=1, rate=1 / 3)
    assert hs.rate == Fraction(1, 3)
    assert hs.starts.tolist() == [3 * i for i in range(1000)]


@pytest.mark.parametrize("tau_max", [1, 3])
def test_width_of_the_whole_length(tau_max):
    block, flat = hss.block(5, 5, Fraction(5, tau_max)), hss.flat(5, tau_max)
    assert np.array_equal(block.levels, flat.levels)
    assert (block.period, flat.period, flat.width, flat.rate) == (tau_max, None, 5, Fraction(5, tau_max))


def test_one_position():
    for hs in (
        hss.quenched(1),
        hss.flat(1, 1),
        hss.block(1, 1, 1),
        hss.slide(1, 1, 1),
        hss.block_slide(1, 1, 1, 1),
    ):
        assert hs.levels.tolist() == [[1], [0]] and hs.window(0) == (0, 1) and hs.window(1) == (1, 1)


def test_block_slide_restarts():
    hs = hss.block_slide(length=5, block=3, width=2, rate=1)
    assert hs.starts.tolist() == [0, 1, 2, 4, 5]
    windows = [(0, 1), (0, 2), (1, 3), (2, 3), (3, 4), (3, 5), (4, 5), (5, 5)]
    assert [hs.window(step) for step in range(8)] == windows
    assert np.array_equal(hss.block_slide(9, 9, 4, 2).levels, hss.slide(9, 4, 2).levels)
    assert np.array_equal(hss.block_slide(10, 4, 4, 4).levels, hss.block(10, 4, 4).levels)


def test_quenched_is_every_kind_at_width_one():
    levels = hss.quenched(6).levels
    assert np.array_equal(levels, np.arange(6)[None] >= np.arange(7)[:, None])
    for hs in (hss.block(6, 1, 1), hss.slide(6, 1, 1)):
        assert np.array_equal(levels, hs.levels)


@pytest.mark.parametrize("n", [0, 7, 8])
def test_prompts_of_nothing_all_but_one_and_everything(n):
    slide = hss.slide(8, 4, 2)
    hs = slide.with_prompt(n)
    assert (hs.num_steps, hs.width) == {0: (5, 4), 7: (2, 1), 8: (0, 0)}[n]
    tail = {0: slide.levels, 7: [[2], [1], [0]], 8: np.zeros((1, 0))}[n]
    assert np.array_equal(hs.levels[:, n:], tail) and not hs.levels[:, :n].any()
    assert hs.window(0) == {0: (0, 2), 7: (7, 8), 8: (8, 8)}[n]
    assert hs.with_prompt(0) == slide and hs.with_prompt(3) == slide.with_prompt(3)


@pytest.mark.parametrize("hs", [hss.ar_diffusion(4, 6), hss.from_levels([[1, 1], [0, 1], [0, 0]])])
def test_a_prompt_of_everything_leaves_nothing_to_do(hs):
    hs = hs.with_prompt(hs.length)
    assert hs.levels.tolist() == [[0] * hs.length]
    assert (hs.num_steps, hs.width, hs.rate, hs.period) == (0, 0, 0, None)
    assert hs.window(0) == (hs.length, hs.length)


def test_the_prompt_of_a_flat_schedule_narrows_it():
    hs = hss.flat(6, 4).with_prompt(2)
    assert (hs.num_steps, hs.width, hs.rate) == (4, 4, Fraction(1))


# ---- inside jit


CASES = [
    hss.quenched(9),
    hss.flat(9, 4),
    hss.block(9, 4, 2),
    hss.slide(9, 6, "3/2"),
    hss.block_slide(9, 4, 3, "3/2"),
    hss.ar_diffusion(9, 12),
    hss.slide(9, 4, 2).with_prompt(2),
]


@pytest.mark.parametrize("hs", CASES, ids=repr)
def test_everything_under_jit_with_a_traced_step(hs):
    tau = np.asarray(hs.levels)
    assert hs.levels.dtype == jnp.int32 and tau.shape == (hs.num_steps + 1, hs.length)
    steps = jnp.arange(len(tau))
    levels, (start, stop), regions = jax.jit(
        lambda: jax.vmap(lambda s: (hs.levels_at(s), hs.window(s), hs.regions(s)))(steps)
    )()
    assert np.array_equal(levels, tau) and levels.dtype == jnp.int32
    assert regions.dtype == jnp.int8
    for step in range(len(tau)):
        assert regions[step].tolist() == regions_of(tau, step) == hs.regions(step).tolist()
        assert (start[step], stop[step]) == window_of(tau, step) == hs.window(step)


def test_a_static_argument_and_python_ints_inside_jit():
    traces = []

    def f(hs, step):
        traces.append(hs)
        start, stop = hs.window(3)
        assert isinstance(start, int) and isinstance(stop, int)
        return hs.levels_at(step)[start:stop]

    f = jax.jit(f, static_argnums=0)
    table = [[1, 1], [1, 1], [1, 1], [0, 1], [0, 0]]
    assert f(hss.slide(9, 4, 2), 4).tolist() == [0, 0, 1, 1]
    assert f(hss.slide(9, 4, 2.0), 3).tolist() == [1, 1, 2, 2]
    assert f(hss.from_levels(table), 0).tolist() == f(hss.from_levels(np.array(table)), 0).tolist() == [1]
    assert len(traces) == 2


@pytest.mark.parametrize("hs", CASES, ids=repr)
def test_levels_at_holds_nothing_larger_than_the_text(hs):
    eqns = jax.make_jaxpr(lambda step: (hs.levels_at(step), hs.window(step)))(3)
    sizes = [v.aval.size for eqn in eqns.eqns for v in eqn.outvars]
    assert max(sizes) == hs.length
    if not isinstance(hs.law, hss.Line):
        assert not eqns.consts
        window = jax.make_jaxpr(hs.window)(jnp.int32(3))
        assert {v.aval.size for eqn in window.eqns for v in eqn.outvars} <= {1}


@pytest.mark.parametrize("hs", [*CASES, hss.from_levels([[1, 1], [0, 1], [0, 0]])], ids=repr)
def test_integers_stay_int32_in_x64_mode(hs):
    with jax.enable_x64():
        step, position_L = jax.ShapeDtypeStruct((), "int64"), jax.ShapeDtypeStruct((3,), "int64")
        outputs = jax.eval_shape(
            lambda s, i: (hs.levels, hs.levels_at(s), hs.window(s), hs.start_of(i), hs.level_of(i, s)),
            *(step, position_L),
        )
        assert {output.dtype for output in jax.tree.leaves(outputs)} == {jnp.dtype("int32")}
        assert jax.eval_shape(hs.regions, step).dtype == jnp.int8


def test_large_schedules_are_exact_up_to_the_refused_size():
    hs = hss.slide(length=1_000_000, width=7_000, rate=Fraction(7_000, 999))
    j = np.array([0, 6_999, 7_000, 123_457, 999_999])
    exact = [int(i) * 999 // 7_000 for i in j]
    assert hs.start_of(jnp.asarray(j)).tolist() == exact
    step = exact[-1]
    assert tuple(map(int, hs.window(jnp.int32(step)))) == hs.window(step)
    with pytest.raises(UserError, match="hyperschedule.length: got 1000000"):
        hss.slide(length=1_000_000, width=7_000, rate=Fraction(7_000, 1999))
    with pytest.raises(UserError, match="hyperschedule.steps"):
        hss.ar_diffusion(2**16, 2**17)


# ---- values


def test_schedules_are_values():
    same = hss.slide(8, 4, 2), hss.build("slide", 8, width=4, rate="2", block=None)
    assert same[0] == same[1] and hash(same[0]) == hash(same[1])
    assert len({*same, hss.slide(8, 4, 1), same[0].with_prompt(1), hss.block(8, 4, 2)}) == 4
    assert pickle.loads(pickle.dumps(same[0])) == same[0]
    with pytest.raises(AttributeError):
        same[0].length = 9


@pytest.mark.parametrize("hs", CASES, ids=repr)
def test_repr_evaluates_to_the_same(hs):
    assert eval(repr(hs), hss.BUILDERS.copy()) == hs


def test_one_line_description():
    line = "slide: L=64, prompt 4, width 16, rate 2, tau_max 8, T=37 calls, 8 window rows per token"
    hs = hss.slide(64, 16, 2).with_prompt(4)
    assert str(hs) == hs.describe() == line
    assert str(hss.ar_diffusion(8, 20)).endswith("T=20 calls, 16.5 window rows per token")


# ---- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hss.build("slyde", 8), r"hyperschedule\.kind: got 'slyde' \(did you mean 'slide'\?\)"),
        (lambda: hss.build("slide", 8, widht=4), r"hyperschedule\.widht: .*did you mean 'width'"),
        (lambda: hss.build("slide", 8, width=4), r"hyperschedule\.rate: got None"),
        (lambda: hss.build("slide", 8, rate=1, width=None), r"hyperschedule\.width: got None"),
        (lambda: hss.build("quenched", 8, width=4), r"hyperschedule\.width: got 4; allowed: nothing"),
        (lambda: hss.quenched(0), r"hyperschedule\.length: got 0"),
        (lambda: hss.quenched(True), r"hyperschedule\.length: got True"),
        (lambda: hss.flat(8, 2.5), r"hyperschedule\.steps: got 2\.5"),
        (lambda: hss.slide(8, 9, 1), r"hyperschedule\.width: got 9; allowed: .* 1 to 8 \(the length\)"),
        (lambda: hss.block_slide(8, 3, 4, 1), r"hyperschedule\.width: got 4; allowed: .* \(the block\)"),
        (lambda: hss.block_slide(8, 9, 4, 1), r"hyperschedule\.block: got 9"),
        (
            lambda: hss.slide(8, 4, 5),
            r"hyperschedule\.rate: got '5'; allowed: above 0 and at most the width \(4\)",
        ),
        (lambda: hss.slide(8, 4, 0), r"hyperschedule\.rate: got '0'"),
        (lambda: hss.slide(8, 4, "two"), r"hyperschedule\.rate: got 'two'"),
        (lambda: hss.slide(8, 4, math.pi), r"hyperschedule\.rate: got 3\.14"),
        (lambda: hss.slide(8, 4, math.inf), r"hyperschedule\.rate: got inf"),
        (lambda: hss.slide(64, 16, 3), r"width 16, rate 16/5 or 8/3; with rate 3, width 15 or 18$"),
        (lambda: hss.slide(16, 16, 3), r"width 16, rate 16/5 or 8/3; with rate 3, width 15$"),
        (lambda: hss.slide(9, 6, "5/2"), r"width 6, rate 3 or 2; with rate 5/2, width 5$"),
        (lambda: hss.slide(9, 6, 2).with_prompt(10), r"hyperschedule\.prompt: got 10"),
        (lambda: hss.slide(9, 6, 2).with_prompt(-1), r"hyperschedule\.prompt: got -1"),
        (lambda: hss.ar_diffusion(8, 7), r"hyperschedule\.steps: got 7; allowed: a whole number from 8"),
        (
            lambda: hss.from_levels([[2, 2], [1, 2], [2, 1], [0, 0]]),
            "2 after 1 at step 2, position 0.*never rise",
        ),
        (
            lambda: hss.from_levels([[2, 1], [1, 1], [0, 0]]),
            "1, tau_max 2 at step 0, position 1.*start at tau_max",
        ),
        (lambda: hss.from_levels([[2, 2], [0, 1]]), "1 after 2 at step 1, position 1.*end at 0"),
        (lambda: hss.from_levels([[0, 2], [1, 1], [0, 0]]), "1 after 0 at step 1, position 0.*never rise"),
        (lambda: hss.from_levels([[1, 1], [-1, 0]]), "-1 after 1 at step 1, position 0.*end at 0"),
        (lambda: hss.from_levels([[0, 0], [0, 0]]), "starts above level 0"),
        (lambda: hss.from_levels([[1.0], [0.0]]), r"float64\[2, 1\].*integers \[T\+1, L\]"),
        (lambda: hss.from_levels([[1, 1], [0]]), "integers"),
        (lambda: hss.from_levels([1, 0]), "integers"),
        (lambda: hss.from_function(lambda step, i: step[:2], 3, 4), r"integers \[5, 3\]"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_the_nearest_rates_and_widths_do_work():
    for rate in ("16/5", "8/3"):
        hss.slide(64, 16, rate)
    for width in (15, 18):
        hss.slide(64, width, 3)
