"""One text while it is generated: snapshots after every few calls, and its settled pieces."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.generation import prompting, sampling
from hdlm_jax.generation.chain import Chain, origins


class Snapshot(NamedTuple):
    """A text between two calls.

    Attributes:
      step: generation steps done, of `num_steps`.
      num_steps: T.
      tokens: int32 [L].
      levels: int32 [L], 0 where settled or given.
      tau_max: the level of pure noise.
      given: bool [L].
      finished: whether this is the last one.
      length: tokens of the text up to its settled end, which is counted; L where it has none.
    """

    step: int
    num_steps: int
    tokens: np.ndarray
    levels: np.ndarray
    tau_max: int
    given: np.ndarray
    finished: bool
    length: int


def snapshots(
    chain: Chain,
    params: dict,
    tokenizer: Tokenizer,
    prompt: str,
    length: int,
    seed: int,
    every: int,
    fixed: Mapping[int, str] | None = None,
) -> Iterator[Snapshot]:
    """A text of `length` tokens at first and after every so many calls; the last snapshot is the finished text.

    Raises:
      UserError: at once, whatever `prompting.encode` and `sampling.keys` refuse.
    """
    given = prompting.encode(tokenizer, [prompt], length, fixed)
    pieces = sampling.steps(chain, params, given, sampling.keys(seed, 1), every)
    relative_L = np.arange(length) - int(origins(chain, jnp.asarray(given.mask))[0])

    def walk() -> Iterator[Snapshot]:
        for step, state in pieces:
            tokens_L = np.asarray(state.x[0])
            level_L = np.where(given.mask[0], 0, chain.hs.level_of(relative_L, step))
            kept = given.mask | (level_L > 0)[None]  # only a settled end is one
            end = int(prompting.ends(tokens_L[None], kept, chain.end)[0])
            last = step == chain.hs.num_steps or end < length
            yield Snapshot(step, chain.hs.num_steps, tokens_L, level_L, chain.hs.tau_max, given.mask[0], last, end)
            if last:
                return

    return walk()


def settled_text(shots: Iterable[Snapshot], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of the settled tokens from the left, as far as they go without a gap: yields what is new."""

    def chunks() -> Iterator[np.ndarray]:
        told = 0
        for shot in shots:
            settled = int(np.cumprod(shot.levels == 0).sum())
            text_L = shot.tokens[: min(settled, shot.length)]
            ends_itself = shot.length < len(shot.tokens) and text_L[-1:] == tokenizer.end_of_text
            yield text_L[told : len(text_L) - int(ends_itself)]
            told = len(text_L)

    return (piece for piece in tokenizer.decode_stream(chunks(), end_of_text="\n") if piece)
