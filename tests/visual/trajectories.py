"""Trajectories made by hand: tokens are drawn and redrawn at random inside the windows of a hyperschedule."""

import numpy as np

from hdlm_jax.diffusion.hyperschedules import Hyperschedule
from hdlm_jax.generation.trajectory import Trajectory

# Texts that would break a page that is careless with one of them.
AWKWARD = [
    "</script><script>alert(1)</script>",
    "<!--",
    "\"quoted\" & 'single'",
    "a\nb\r\n",
    "{{script}}",
    "\\xe2\\x80",
    "\ud800",
    "\u202eright to left",
    "\u0301",
    "\x00\x1b",
    "\u2028",
    "",
    "  ",
    "naïve 語 😀",
]


def made(hs: Hyperschedule, num_tokens: int, prompts=(0,), masked: bool = True, seed: int = 0) -> Trajectory:
    """Frames of len(prompts) texts under `hs`: every call draws about half of its window anew; given tokens stay."""
    rng = np.random.default_rng(seed)
    origin_B = np.array(prompts, np.int32)
    B, L, T = len(prompts), hs.length + max(prompts), hs.num_steps
    position_BxL = np.arange(L)[None, :] - origin_B[:, None]
    given_BxL = position_BxL < 0
    x_BxL = rng.integers(0, num_tokens, (B, L))
    x_BxL = np.where(given_BxL | (not masked), x_BxL, num_tokens)
    confidence_BxL = np.full((B, L), np.nan)
    tokens, confidences = [x_BxL], [confidence_BxL]
    for step in range(T):
        start, stop = hs.window(step)
        inside_BxL = (position_BxL >= start) & (position_BxL < stop)
        ends_BxL = hs.level_of(np.maximum(position_BxL, 0), step + 1) == 0
        drawn_BxL = inside_BxL & ((rng.random((B, L)) < 0.5) | (ends_BxL & (tokens[-1] == num_tokens)))
        tokens.append(np.where(drawn_BxL, rng.integers(0, num_tokens, (B, L)), tokens[-1]))
        confidences.append(np.where(inside_BxL, rng.random((B, L)), confidences[-1]))
    mask = num_tokens if masked else None
    stacked = np.stack(tokens).astype(np.int32), np.stack(confidences).astype(np.float32)
    return Trajectory(np.arange(T + 1, dtype=np.int32), *stacked, given_BxL, origin_B, hs, mask)
