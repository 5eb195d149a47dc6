"""Models whose answers are known: the exact posterior of independent tokens."""

import jax
import numpy as np

from tests.models import tiny

LAW = np.array([0.6, 0.25, 0.1, 0.05])  # of independent tokens
N, L, EPSILON = len(LAW), 6, 0.2
EPS = {"noising__epsilon": EPSILON, "loss__kind": "epsilon_nelbo", "sampler__steps": 8}
BLOCK = {"model__visibility": "prefix", "hyperschedule__kind": "block", "hyperschedule__width": 3}
BLOCK |= {"hyperschedule__rate": "1", "loss__origin_share": 0.0}


def texts(count, seed=0):
    return np.random.default_rng(seed).choice(N, (count, L), p=LAW).astype(np.int32)


def knowing(made, sharpness=1.0):
    """The network that predicts `LAW` whatever it sees: exact for independent tokens under the reading 'cavity'."""
    params = jax.tree.map(np.zeros_like, tiny.random_params(made.model))
    bias = np.append(sharpness * np.log(LAW), np.zeros(made.model.padded_vocabulary - N))
    return params | {"head_bias": bias.astype(np.float32)}
