"""Language models on the whole line between autoregression and diffusion, in JAX and Flax.

Letters used throughout: B batch, L positions, T generation steps, N ordinary tokens, V = N + 1 (the mask
is token N), D width, H heads, F MLP width, W window rows, S cached rows. Arrays that cross a function's
border carry their letters: `x0_BxL`, `logits_BxLxV`. Words: a position has a *level* (0 clean, tau_max pure
noise) at every generation *step*; it is settled, active or worthless; *alpha* is the survival of a token.

>>> import hdlm_jax as hdlm
>>> hs = hdlm.hyperschedules.slide(length=64, width=16, rate=2)
>>> hs.tau_max, hs.num_steps
(8, 39)
"""

import importlib

from hdlm_jax.errors import UserError

__version__ = "0.1.0"

_MODULES = {
    "hyperschedules": "hdlm_jax.diffusion.hyperschedules",
    "noise_schedules": "hdlm_jax.diffusion.noise_schedules",
    "noising": "hdlm_jax.diffusion.noising",
    "reverse": "hdlm_jax.diffusion.reverse",
    "losses": "hdlm_jax.diffusion.losses",
    "visibility": "hdlm_jax.diffusion.visibility",
    "transformer": "hdlm_jax.models.transformer",
}
__all__ = ["UserError", "load", *_MODULES]


def load(folder, weights: str = "ema"):
    """Opens a run folder as a `LanguageModel`; see `hdlm_jax.lm.load`."""
    from hdlm_jax import lm

    return lm.load(folder, weights)


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'hdlm_jax' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_MODULES])
