"""The optimizer against AdamW written out in numpy, the schedule against its formula, the running mean."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.config import default
from hdlm_jax.errors import UserError
from hdlm_jax.models import transformer
from hdlm_jax.training import optimizer


def block(**fields):
    made = default().optimizer
    made.update(fields)
    return made


def numpy_adamw(b, params, gradients, rates, decayed):
    """Clip to the global norm, Adam with bias correction, decoupled decay: float64, one tensor at a time."""
    m, v = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    for n, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        scale = min(1.0, b.clip / norm) if b.clip else 1.0
        for name, g in gradient.items():
            m[name] = b.beta1 * m[name] + (1 - b.beta1) * g * scale
            v[name] = b.beta2 * v[name] + (1 - b.beta2) * (g * scale) ** 2
            update = m[name] / (1 - b.beta1**n) / (np.sqrt(v[name] / (1 - b.beta2**n)) + b.eps)
            params[name] = params[name] - rate * (update + b.weight_decay * params[name] * (name in decayed))
    return params


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_build_is_adamw_with_clipping_and_decay_of_matrices(clip):
    b, steps = block(clip=clip, weight_decay=0.3, learning_rate=0.05, warmup=2), 6
    rng = np.random.default_rng(0)
    shapes = {"embedding": (3, 4), "norm": (4,)}
    draw = lambda: {name: rng.normal(size=shape) for name, shape in shapes.items()}
    start, gradients = draw(), [draw() for _ in range(steps)]
    with jax.enable_x64():
        tx = optimizer.build(b, total_steps=steps)
        params = jax.tree.map(jnp.asarray, start)
        state = tx.init(params)
        for gradient in gradients:
            updates, state = tx.update(jax.tree.map(jnp.asarray, gradient), state, params)
            params = jax.tree.map(jnp.add, params, updates)
        rates = [float(optimizer.learning_rate(b, steps)(n)) for n in range(steps)]
        wanted = numpy_adamw(b, dict(start), gradients, rates, decayed={"embedding"})
        for name in shapes:
            np.testing.assert_allclose(params[name], wanted[name], rtol=1e-10)


def test_the_state_is_named_by_part():
    state = optimizer.build(block(), 10).init({"embedding": jnp.ones((2, 2))})
    assert sorted(state) == ["adam", "clip", "decay", "rate"]


@pytest.mark.parametrize(
    ("schedule", "decay"),
    [("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2), ("linear", lambda x: 1 - x), ("constant", None)],
)
def test_the_schedule_warms_up_then_decays_to_the_final_share(schedule, decay):
    b, steps = block(schedule=schedule, warmup=10, final_share=0.2, learning_rate=2e-3), 60
    counts = jnp.arange(steps + 20)
    rates = jax.jit(jax.vmap(optimizer.learning_rate(b, steps)))(counts)
    for n, rate in enumerate(rates):
        x = min(1.0, (n - 10) / 50)
        after = 1.0 if decay is None else 0.2 + 0.8 * decay(x)
        assert float(rate) == pytest.approx(2e-3 * ((n + 1) / 10 if n < 10 else after), rel=1e-5), n
    assert float(rates[steps]) == pytest.approx(2e-3 * (1.0 if decay is None else 0.2), rel=1e-6)


def test_a_run_shorter_than_its_warm_up_and_one_without():
    assert float(optimizer.learning_rate(block(warmup=100, learning_rate=1.0), 10)(9)) == pytest.approx(0.1)
    assert float(optimizer.learning_rate(block(warmup=0, learning_rate=1.0), 10)(0)) == pytest.approx(1.0)


def test_decay_falls_on_the_matrices_of_the_transformer():
    config = transformer.TransformerConfig(num_tokens=7, length=4, hidden=8, blocks=2, heads=2, conditioning=8)
    params = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    flags = jax.tree_util.tree_leaves_with_path(optimizer.matrices(params))
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): flag for path, flag in flags}
    assert {name.rpartition("/")[2] for name, flag in names.items() if flag} == {"kernel", "embedding", "head_kernel"}
    assert {name.rpartition("/")[2] for name, flag in names.items() if not flag} == {"bias", "scale", "head_bias"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schedule", "cosin"),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("warmup", -1),
        ("final_share", 1.5),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("clip", float("inf")),
        ("ema", 1.0),
    ],
)
def test_bad_fields_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"optimizer.{field}: got"):
        optimizer.build(block(**{field: value}), 10)


def test_ema_follows_the_decay_that_grows_with_the_steps():
    b = block(ema=0.4)
    mean, want = {"w": jnp.zeros(2)}, np.zeros(2)
    for n in range(1, 12):
        new = np.array([n, -2.0 * n])
        mean = optimizer.ema(b, mean, {"w": jnp.asarray(new, jnp.float32)}, jnp.int32(n))
        decay = min(0.4, (1 + n) / (10 + n))
        want = decay * want + (1 - decay) * new
    np.testing.assert_allclose(mean["w"], want, rtol=1e-6)


def test_ema_keeps_small_steps_at_a_decay_near_one():
    mean = optimizer.ema(block(ema=0.9999), {"w": jnp.float32(0)}, {"w": jnp.float32(1)}, 10**7)
    assert float(mean["w"]) == pytest.approx(1e-4, rel=1e-6)


def test_ema_switched_off_stays_none():
    assert optimizer.ema(block(ema=0.0), None, {"w": jnp.ones(1)}, 1) is None
