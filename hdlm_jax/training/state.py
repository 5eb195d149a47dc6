"""The training state: its shape first, then where it lies, then its values, made in place."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from hdlm_jax.errors import choose
from hdlm_jax.training.sharding import RULES, Rules, placed


class TrainState(NamedTuple):
    """All that training carries from step to step.

    There is no random state in it: data and noise are functions of the seed, `step` and the global row.

    Attributes:
      step: int32 scalar, steps done.
      params: the weights, a nested dict of arrays.
      optimizer: the state of the optimizer.
      ema: the running mean of the weights, the tree of `params`; None when it is switched off.
    """

    step: Array
    params: Any
    optimizer: optax.OptState
    ema: Any


def abstract(
    init_fn: Callable[[], Any],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rules: Rules = RULES,
    ema: bool = True,
) -> TrainState:
    """Shapes, dtypes and shardings of the state that `create` would make; nothing is allocated.

    Raises:
      UserError: a parameter that no rule matches, or one that does not divide by the mesh.
    """
    shapes = jax.eval_shape(_fresh(init_fn, tx, ema))
    return placed(mesh, shapes, rules)


def create(
    init_fn: Callable[[], Any],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rules: Rules = RULES,
    ema: bool = True,
) -> TrainState:
    """The state at step 0, each array made directly where it lies; the same values on every mesh.

    Args:
      init_fn: makes the parameters, e.g. `lambda: transformer.init(config, rng)`.
      tx: the optimizer.
      mesh: from `sharding.mesh`.
      rules: ordered (pattern of a parameter path, partition).
      ema: whether to carry the running mean of the weights.

    Raises:
      UserError: as `abstract`.
    """
    places = jax.tree.map(lambda x: x.sharding, abstract(init_fn, tx, mesh, rules, ema))
    return jax.jit(_fresh(init_fn, tx, ema), out_shardings=places)()


def weights(state: TrainState, which: str = "ema") -> Any:
    """The weights to evaluate or sample with: their running mean ('ema') or the last ones ('raw').

    Without a running mean the last ones are all there is, and 'ema' gives them too.

    >>> state = TrainState(jnp.int32(0), params={"w": 1}, optimizer=(), ema=None)
    >>> weights(state, "ema")
    {'w': 1}
    """
    mean = state.params if state.ema is None else state.ema
    return choose("weights", which, {"ema": mean, "raw": state.params})


def _fresh(init_fn: Callable[[], Any], tx: optax.GradientTransformation, ema: bool) -> Callable[[], TrainState]:
    def fresh():
        params = init_fn()
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), params if ema else None)

    return fresh
