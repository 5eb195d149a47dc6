"""Texts longer than the network was trained for: each further part follows the last half of what there is.

Positions start anew with every part, so that no row stands where training showed none. Every token is drawn after at
least half a trained length of text.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.diffusion.hyperschedules import Hyperschedule
from hdlm_jax.errors import require
from hdlm_jax.generation import prompting, sampling
from hdlm_jax.generation.chain import Chain
from hdlm_jax.generation.sampling import Generation
from hdlm_jax.models.parts import Parts

KINDS = ("quenched", "block", "slide", "block_slide")


def stride(trained: int) -> int:
    """Tokens of one further part: half of a trained length.

    >>> stride(64), stride(1)
    (32, 1)
    """
    return (trained + 1) // 2


def check(parts: Parts, hs: Hyperschedule, length: int, fixed: Mapping | None, record: bool | int) -> None:
    """Refuses what cannot go on past the trained length.

    Raises:
      UserError: a `full` model, a hyperschedule that does not settle left to right in pieces, a trained length of one
        token, fixed texts, a record.
    """
    trained = parts.model.length
    goes_on = parts.model.visibility == "prefix" and hs.kind in KINDS and trained > 1
    which = f"a prefix model under {', '.join(KINDS)} goes on past it"
    require(goes_on, "length", length, f"1 .. {trained}, the trained length ({which})")
    require(not fixed, "fixed", fixed, f"nothing for texts past the trained length, {trained}")
    require(not record, "record", record, f"False for texts past the trained length, {trained}")


def draw(
    first: Chain,
    further: Chain,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    length: int,
    seed: int | Sequence[int] = 0,
) -> Generation:
    """One text of `length` tokens, more than the trained length, for each prompt.

    Args:
      first: chain of the first part, a trained length of tokens.
      further: chain of each further part, `stride` tokens.
      params, tokenizer, prompts, seed: as of `sampling.draw`; the first part is what that draws.

    Raises:
      UserError: as `sampling.draw`.
    """
    trained, step = first.hs.length, further.hs.length
    keep = trained - step
    given = prompting.encode(tokenizer, prompts, trained)
    rng_B = sampling.keys(seed, len(prompts))
    state = sampling.complete(first, params, given.tokens, given.mask, given.longest_prompt, rng_B)
    tokens, calls = np.asarray(state.x), int(state.calls)
    mask_BxL = np.broadcast_to(np.arange(trained)[None, :] < keep, (len(prompts), trained))
    part = 0
    while tokens.shape[1] < length and not _all_ended(tokens, given.mask, first.end):
        part += 1
        part_rng_B = jax.vmap(lambda rng, part=part: jax.random.fold_in(rng, part))(rng_B)
        context_BxL = np.pad(tokens[:, tokens.shape[1] - keep :], ((0, 0), (0, step)))
        state = sampling.complete(further, params, context_BxL, mask_BxL, keep, part_rng_B)
        tokens = np.concatenate([tokens, np.asarray(state.x)[:, keep:]], 1)
        calls += int(state.calls)
    tokens = tokens[:, :length]
    given_BxL = np.pad(given.mask, ((0, 0), (0, max(0, tokens.shape[1] - trained))))
    lengths = prompting.ends(tokens, given_BxL, first.end)
    texts = sampling.texts_of(tokenizer, tokens, lengths)
    return Generation(texts, tokens, lengths, calls, first.hs, tokenizer=tokenizer)


def _all_ended(tokens_BxL: np.ndarray, given_BxL: np.ndarray, end: int | None) -> bool:
    given_BxL = np.pad(given_BxL, ((0, 0), (0, tokens_BxL.shape[1] - given_BxL.shape[1])))
    return end is not None and bool(((tokens_BxL == end) & ~given_BxL).any(1).all())
