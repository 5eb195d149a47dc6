"""FLOPs counted from the program, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from hdlm_jax.models import transformer
from hdlm_jax.models.attention import dense
from hdlm_jax.models.transformer import TransformerConfig
from hdlm_jax.training import flops

A, B = jnp.zeros((2, 3)), jnp.zeros((3, 4))
ONE = 2 * 2 * 3 * 4  # a multiplication and an addition for each of 2 x 3 x 4


class Device:
    def __init__(self, kind):
        self.device_kind = kind


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        (lambda a, b: a @ b, (A, B), ONE),
        (lambda a, b: a + 1, (A, B), 0),
        (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (jnp.zeros((5, 2, 3)), jnp.zeros((5, 3, 4))), 5 * ONE),
        (lambda a, b: jnp.einsum("hij,jk->hik", a, b), (jnp.zeros((5, 2, 3)), B), 5 * ONE),
        (jax.jit(lambda a, b: a @ b), (A, B), ONE),
        (lambda a, b: jax.lax.map(lambda x: x @ b, a[:, None]), (A, B), ONE),
        (lambda a, b: jax.lax.scan(lambda c, x: (c, [x @ b, x @ b]), 0, jnp.stack([a] * 7)), (A, B), 14 * ONE),
        (
            lambda a, b: jax.lax.map(lambda x: jax.lax.map(lambda y: y @ b, x), jnp.zeros((5, 7, 2, 3))),
            (A, B),
            35 * ONE,
        ),
        (jax.grad(lambda a, b: (a @ b).sum()), (A, B), 2 * ONE),  # the product itself and its transpose
        (jax.grad(lambda a, b: jnp.square(a @ b).sum(), argnums=(0, 1)), (A, B), 3 * ONE),
        (jax.grad(jax.checkpoint(lambda a, b: jnp.sin(jnp.sin(a @ b) @ b.T).sum())), (A, B), 6 * ONE),
        (lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: jnp.zeros((2, 4))), (A, B), ONE),
        (lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: a @ b @ b.T @ b), (A, B), 3 * ONE),
    ],
)
def test_counts_by_hand(function, arguments, expected):
    assert flops.count(function, *arguments) == expected


def test_a_forward_pass_of_the_transformer_costs_what_its_shapes_say():
    R, D, F, V, blocks = 6, 16, 64, 24, 3
    model = TransformerConfig(num_tokens=20, length=R, hidden=D, blocks=blocks, heads=2, vocabulary_multiple=8)
    params = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    tokens = jnp.zeros((5, R), jnp.int32)

    def scores(params):
        hidden, _ = transformer.forward(model, params, tokens, tokens, dense())
        return transformer.logits(model, params, hidden)

    per_row = blocks * (3 * D * D + D * D + 2 * D * F + 2 * R * D) + D * V
    assert flops.count(scores, params) == 2 * 5 * R * per_row


def test_the_peak_of_known_devices_adds_up_and_of_others_is_not_known():
    assert flops.peak([Device("NVIDIA H200")] * 4) == 4 * 989e12
    assert flops.peak([Device("TPU v4")]) == 275e12
    assert flops.peak(jax.devices("cpu")) is None
