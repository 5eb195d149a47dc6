"""AdamW with warm-up, a learning-rate schedule, clipping and decay on matrices; the weights' running mean."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from hdlm_jax.errors import choose, require

DECAYS = {
    "cosine": lambda x: (1 + jnp.cos(jnp.pi * x)) / 2,
    "linear": lambda x: 1 - x,
    "constant": jnp.ones_like,
}
STACKED = "blocks"  # the parameter group whose leaves carry a leading axis of blocks


def build(block: Any, total_steps: int) -> optax.GradientTransformation:
    """The optimizer of an experiment: clip, then AdamW at the scheduled learning rate.

    The state is a dict with one entry per part (`clip`, `adam`, `decay`, `rate`). Weight decay is decoupled
    (AdamW) and falls on `is_matrix` parameters only.

    Args:
      block: the experiment's `optimizer` block.
      total_steps: optimizer steps of the whole run, where the schedule ends.

    Raises:
      UserError: a field out of its range, by name.
    """
    check(block)
    clip = optax.clip_by_global_norm(block.clip) if block.clip else optax.identity()
    return optax.named_chain(
        ("clip", clip),
        ("adam", optax.scale_by_adam(b1=block.beta1, b2=block.beta2, eps=block.eps)),
        ("decay", optax.add_decayed_weights(block.weight_decay, mask=matrices)),
        ("rate", optax.scale_by_learning_rate(learning_rate(block, total_steps))),
    )


def check(block: Any) -> None:
    """Raises `UserError` naming the first field of the `optimizer` block that is out of its range."""
    choose("optimizer.schedule", block.schedule, DECAYS)
    for field in ("beta1", "beta2", "ema"):
        require(0 <= getattr(block, field) < 1, f"optimizer.{field}", getattr(block, field), "a number in [0, 1)")
    for field in ("learning_rate", "eps"):
        require(
            0 < getattr(block, field) < float("inf"),
            f"optimizer.{field}",
            getattr(block, field),
            "a positive number",
        )
    for field in ("weight_decay", "clip"):
        require(
            0 <= getattr(block, field) < float("inf"),
            f"optimizer.{field}",
            getattr(block, field),
            "0 or a positive number",
        )
    require(0 <= block.final_share <= 1, "optimizer.final_share", block.final_share, "a number in [0, 1]")
    require(block.warmup >= 0, "optimizer.warmup", block.warmup, "0 or a positive number of steps")


def learning_rate(block: Any, total_steps: int) -> Callable[[Array | int], Array]:
    """The learning rate of the update that follows `count` finished ones.

    Warm-up: peak (count + 1) / warmup, so that the first update already moves. After it, with
    x = (count - warmup) / (total_steps - warmup) in [0, 1] and f = final_share:
    peak (f + (1 - f) decay(x)), decay = (1 + cos(pi x)) / 2, 1 - x, or 1. A run shorter than its warm-up
    ends inside it.

    >>> from hdlm_jax.config import default
    >>> block = default().optimizer
    >>> rate = learning_rate(block, total_steps=1000)
    >>> [round(float(rate(n)) / block.learning_rate, 3) for n in (0, 49, 99, 100, 550, 1000)]
    [0.01, 0.5, 1.0, 1.0, 0.55, 0.1]
    """
    decay = choose("optimizer.schedule", block.schedule, DECAYS)
    final = 1.0 if block.schedule == "constant" else block.final_share

    def rate(count):
        count = jnp.asarray(count, jnp.result_type(float))
        warm = jnp.minimum(1.0, (count + 1) / max(1, block.warmup))
        x = jnp.clip((count - block.warmup) / max(1, total_steps - block.warmup), 0.0, 1.0)
        return block.learning_rate * warm * (final + (1 - final) * decay(x))

    return rate


def matrices(params: Any) -> Any:
    """True at the parameters that weight decay shrinks, same tree: the matrices.

    A leaf counts as a matrix when it has two axes or more besides the axis of stacked blocks. The embedding
    and the head are matrices and decay too; norms and biases do not.

    >>> params = {"embedding": jnp.ones((4, 2)), "blocks": {"norm": jnp.ones((3, 2))}}
    >>> matrices(params)
    {'blocks': {'norm': False}, 'embedding': True}
    """

    def is_matrix(path, leaf):
        stacked = jax.tree_util.keystr(path[:1], simple=True) == STACKED
        return leaf.ndim - stacked >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def ema(block: Any, ema: Any, params: Any, step: Array | int) -> Any:
    """The running mean of the weights after one optimizer step: m ema + (1 - m) params.

    m = min(d, (1 + n) / (10 + n)) with d = optimizer.ema and n = `step`, the optimizer steps done, this one
    included. Written with 1 - m = max(1 - d, 9 / (10 + n)), which loses no digits for d near 1.

    Args:
      block: the experiment's `optimizer` block.
      ema: the mean before the step, the tree of `params`; None (switched off) stays None.
      params: the weights after the step.
      step: n, a positive integer.
    """
    if ema is None:
        return None
    n = jnp.asarray(step, jnp.result_type(float))
    share = jnp.maximum(1 - block.ema, 9 / (10 + n))
    return jax.tree.map(lambda mean, new: mean + share.astype(mean.dtype) * (new - mean), ema, params)
