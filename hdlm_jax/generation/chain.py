"""The chain that generates: network, hyperschedule, noising and rule, and the rows that its calls feed.

Letters as in generation/loop.py.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from hdlm_jax.diffusion import phases, visibility
from hdlm_jax.diffusion.hyperschedules import Hyperschedule
from hdlm_jax.diffusion.noise_schedules import NoiseSchedule
from hdlm_jax.diffusion.noising import NoisingProcess
from hdlm_jax.diffusion.rules import Rule
from hdlm_jax.models.transformer import TransformerConfig


class Chain(NamedTuple):
    """What defines the chain that generates; a static argument of compiled programs.

    Attributes:
      config: the network.
      hs: the hyperschedule.
      schedule: survival of noise fractions.
      process: the noising process.
      rule: how a call moves its window.
      shape_logits: (scores_BxWxV, x_BxL) -> scores: temperature, top-k, top-p, forbidden tokens and the like.
      every_row: whether that asks for all rows of the window at once.
      cache_dtype: of keys and values; '' is that of the activations.
      guidance: w of classifier-free guidance; 0 is off.
      end: the token after which a text is finished; None: texts have their full length.
    """

    config: TransformerConfig
    hs: Hyperschedule
    schedule: NoiseSchedule
    process: NoisingProcess
    rule: Rule
    shape_logits: Callable[[Array, Array], Array] = lambda scores, x_BxL: scores
    every_row: bool = False
    cache_dtype: str = ""
    guidance: float = 0.0
    end: int | None = None

    @property
    def has_cache(self) -> bool:
        """Whether settled rows are kept: those of `full` models, and of inexact contexts, may change."""
        return self.config.visibility == "prefix" and not self.config.inexact_context

    def alpha(self, level: Array) -> Array:
        """Survival of levels."""
        return phases.survival(level, self.hs.tau_max, self.schedule, self.process.alpha_max)

    def sigma(self, alpha_BxR: Array) -> Array | None:
        """Noise levels for a conditioned network, else None."""
        return self.schedule.sigma(alpha_BxR) if self.config.conditioning else None


def origins(chain: Chain, given_BxL: Array) -> Array:
    """int32 [B]: where generation starts, behind the tokens given at the front.

    Where settled rows see whole groups, the last group of a prompt may lack tokens: it is generated with the window.
    """
    group = 1 if chain.config.inexact_context else chain.config.context_group
    return jnp.cumprod(given_BxL.astype(jnp.int32), axis=1).sum(1) // group * group


def settling_rows(chain: Chain) -> int:
    """C, the most rows that one call settles; 0 where the window's one row is its own settled row."""
    return 0 if lone_row(chain) else _most_settled(chain.hs)


def lone_row(chain: Chain) -> bool:
    """Whether the window is one row of a shifted model: it holds a settled token and enters the cache itself."""
    return chain.config.prediction == "shifted" and chain.hs.width == 1 and not trailing_row(chain)


@functools.cache
def _most_settled(hs: Hyperschedule) -> int:
    starts = [hs.window(step)[0] for step in range(hs.num_steps)]
    return max((b - a for a, b in itertools.pairwise(starts)), default=0)


def trailing_row(chain: Chain) -> bool:
    """Whether the window of a shifted model is followed by the row that holds its last token."""
    return chain.config.prediction == "shifted" and visibility.trailing_row_matters(chain.hs, chain.schedule)
