"""How a generation is cut into segments, each a scan over a cache that is little larger than what it holds."""

from typing import NamedTuple

from hdlm_jax.diffusion.hyperschedules import Hyperschedule

SEGMENTS, SLOTS = 8, 64  # a scan is cut into at most so many segments, each a multiple of so many slots longer


class Segment(NamedTuple):
    """Steps [first, end) that run over `slots` cache slots."""

    first: int
    end: int
    slots: int


def granularity(length: int) -> int:
    """Cache slots by which a segment of the scan grows: attention runs over little more than the filled part.

    >>> [granularity(length) for length in (100, 512, 1024, 2048)]
    [64, 64, 128, 256]
    """
    return -(-length // (SEGMENTS * SLOTS)) * SLOTS


def plan(hs: Hyperschedule, length: int, longest_prompt: int) -> list[Segment]:
    """Cuts the steps where the window's start passes a multiple of `granularity` slots.

    >>> from hdlm_jax.diffusion.hyperschedules import slide
    >>> plan(slide(length=100, width=4, rate=2), length=100, longest_prompt=0)
    [Segment(first=0, end=34, slots=64), Segment(first=34, end=51, slots=100)]
    """
    stride = hs.tau_max if settles_at_once(hs) else 1
    grain, segments, first = granularity(length), [], 0
    while first < hs.num_steps:
        slots = min((longest_prompt + hs.window(first)[0]) // grain * grain + grain, length)
        low, high = first + stride, hs.num_steps
        while low < high:  # the first step whose window starts past the slots, unless they hold whole texts
            middle = (low + high) // 2
            past = slots < length and longest_prompt + hs.window(middle)[0] > slots
            low, high = (low, middle) if past else (middle + 1, high)
        end = min(hs.num_steps, first + max(1, (low - first) // stride) * stride)
        segments.append(Segment(first, end, slots))
        first = end
    return segments


def settles_at_once(hs: Hyperschedule) -> bool:
    """Whether the window stands still for tau_max calls, then moves on as a whole."""
    return hs.kind == "block"
