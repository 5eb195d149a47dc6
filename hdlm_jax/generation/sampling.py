"""From settings to a chain, and from prompts to texts."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.diffusion import samplers, scores, visibility
from hdlm_jax.diffusion.fields import number
from hdlm_jax.diffusion.fields import seed as checked_seed
from hdlm_jax.diffusion.hyperschedules import Hyperschedule
from hdlm_jax.errors import UserError, one_of, require
from hdlm_jax.generation import loop, prompting, segments, shaping
from hdlm_jax.generation.chain import Chain, origins
from hdlm_jax.generation.state import State, begin, frame_steps
from hdlm_jax.generation.trajectory import MAX_FRAMES, Trajectory
from hdlm_jax.models import cache as kv_cache
from hdlm_jax.models.parts import Parts, build_rule


@dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
      texts: one per sample, its prompt included, up to its end where texts may end.
      tokens: int32 [samples, L].
      lengths: int32 [samples], tokens of each text up to its end, which is counted.
      calls: of the network; those in which nothing could change are left out.
      hyperschedule: the one used.
      trajectory: what generation passed through, or None.
      tokenizer: of the tokens.
      notes: what is worth knowing of these settings, a sentence each.
    """

    texts: list[str]
    tokens: np.ndarray
    lengths: np.ndarray
    calls: int
    hyperschedule: Hyperschedule
    trajectory: Trajectory | None = field(default=None, repr=False)
    tokenizer: Tokenizer | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        from hdlm_jax.visual import trajectory_html

        return trajectory_html.generation_html(self.texts, self.trajectory, self.tokenizer)


def chain(
    parts: Parts,
    hs: Hyperschedule,
    sampler: ConfigDict,
    end: int | None = None,
    forbidden: Sequence[int] = (),
    hook: Callable[[Array, Array], Array] | None = None,
) -> Chain:
    """The chain that generates under `hs` with the settings of a `sampler` block.

    Equal settings give the same object, and so the same compiled program.

    Args:
      end: the token after which a text is finished; None: texts have their full length.
      forbidden: tokens that are never drawn.
      hook: see `shaping.Shaping`.

    Raises:
      UserError: a hyperschedule that this model cannot sample exactly, or with given positions; an unknown
        sampler, a dial out of range, corrections or guidance by a network that was not trained for them.
    """
    visibility.check_sampling(parts.model.visibility, parts.hs.width, hs)
    if parts.model.visibility == "prefix" and not parts.model.inexact_context:
        visibility.check_context(hs, parts.model.context_group)
    given = int((hs.starts < 0).sum())
    require(given == 0, "hyperschedule", f"{given} given positions", "none: what is given comes as the prompt's text")
    return _chain(parts, hs, tuple(sorted(sampler.items())), end, tuple(forbidden), hook)


@functools.lru_cache(maxsize=64)
def _chain(parts: Parts, hs: Hyperschedule, sampler: tuple, end, forbidden, hook) -> Chain:
    s = ConfigDict(dict(sampler))
    corrects = s.kind in ("acs", "acs_published") and s.eta > 0
    if corrects and parts.loss.name in ("epsilon_nelbo", "nelbo") and not s.untrained_correction:
        raise UserError(
            f"sampler.eta: got {s.eta} for a run trained on {parts.loss.name}, which shows the network tokens only at"
            " 0+; allowed: 0, or sampler.untrained_correction=true"
        )
    if parts.loss.reading in scores.READINGS:
        for name, off in (
            ("temperature", 1.0),
            ("top_k", 0),
            ("top_p", 1.0),
            ("repetition_penalty", 1.0),
            ("guidance", 0.0),
        ):
            allowed = f"{off}: this network learned scores, which are rates and no probabilities of tokens"
            require(s[name] == off, f"sampler.{name}", s[name], allowed)
        require(not forbidden, "forbid", forbidden, "nothing: this network learned scores, which are rates")
    samplers.check(s.kind, hs, conditioned=parts.model.conditioning > 0)
    _check_guidance(parts, s.guidance)
    one_of("sampler.cache_dtype", s.cache_dtype, ("", "float32", "bfloat16"))
    shape = shaping.Shaping(s.temperature, s.top_k, s.top_p, s.repetition_penalty, forbidden, hook)
    rule = build_rule(s, parts.process, parts.loss.reading)
    return Chain(
        parts.model,
        hs,
        rule.warp(parts.schedule) if rule.warp else parts.schedule,
        parts.process,
        rule,
        shaping.shaper(shape, parts.model.num_tokens),
        hook is not None,
        s.cache_dtype,
        s.guidance,
        end,
    )


def _check_guidance(parts: Parts, guidance: float) -> None:
    number("sampler.guidance", guidance, "a number >= 0 (0 is off)", lambda value: value >= 0)
    if guidance == 0:
        return
    allowed = "0 for a prefix model: in its training no text lacked what comes before the window"
    require(parts.model.visibility == "full", "sampler.guidance", guidance, allowed)
    allowed = f"0 for noising.kind {parts.process.name!r}: without a mask, no training text lacked what is given"
    require(parts.process.mask is not None, "sampler.guidance", guidance, allowed)


def draw(
    chain: Chain,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    length: int,
    seed: int | Sequence[int] = 0,
    record: bool | int = False,
    fixed: Mapping[int, str] | None = None,
) -> Generation:
    """One text of `length` tokens for each prompt.

    Args:
      chain: for texts of `length` tokens.
      params: network parameters.
      tokenizer: of the model.
      prompts: one for each text; '' begins from nothing.
      length: tokens in all, prompt included.
      seed: of all draws, or one seed per text: the text is then the same alone and in any batch.
      record: keep the trajectory, in `MAX_FRAMES` frames or in so many at most.
      fixed: see `prompting.encode`.

    Raises:
      UserError: whatever `prompting.encode` and `keys` refuse.
    """
    given = prompting.encode(tokenizer, prompts, length, fixed)
    frames = MAX_FRAMES if record is True else int(record)
    require(frames >= 0, "record", record, "True, or how many frames to keep")
    rng_B = keys(seed, len(prompts))
    state = complete(chain, params, given.tokens, given.mask, given.longest_prompt, rng_B, frames)
    return finished(chain, tokenizer, given, state, frames)


def finished(chain: Chain, tokenizer: Tokenizer, given: prompting.Given, state: State, frames: int) -> Generation:
    """A finished state as texts."""
    tokens = np.asarray(state.x)
    trajectory = None
    if state.frames is not None:
        steps = np.array(frame_steps(chain, frames), np.int32)
        origin_B = np.asarray(origins(chain, jnp.asarray(given.mask)))
        record = map(np.asarray, state.frames)
        trajectory = Trajectory(steps, *record, given.mask, origin_B, chain.hs, chain.process.mask)
    lengths = prompting.ends(tokens, given.mask, chain.end)
    return Generation(
        texts=texts_of(tokenizer, tokens, lengths),
        tokens=tokens,
        lengths=lengths,
        calls=int(state.calls),
        hyperschedule=chain.hs,
        trajectory=trajectory,
        tokenizer=tokenizer,
    )


def texts_of(tokenizer: Tokenizer, tokens_BxL: np.ndarray, length_B: np.ndarray) -> list[str]:
    """The texts of tokens, each up to its length; an end of text reads as a new line, none at a text's own end."""
    cut = [
        row[: n - (n < len(row) and row[n - 1] == tokenizer.end_of_text)]
        for row, n in zip(tokens_BxL, length_B, strict=True)
    ]
    return [tokenizer.decode(row, end_of_text="\n") for row in cut]


def keys(seed: int | Array | Sequence[int], batch: int) -> Array:
    """One PRNG key per text: of one seed by the text's number, or of its own seed.

    Raises:
      UserError: a seed out of range, or another number of them than texts.

    >>> a, b = keys(7, batch=3), keys([3, 7], batch=2)
    >>> bool(a[0] == b[1])
    True
    """
    if isinstance(seed, Array):  # traced in an exported program
        return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(batch))
    if isinstance(seed, Sequence):
        require(len(seed) == batch, "seed", f"{len(seed)} seeds", f"one, or one for each of the {batch} texts")
        own_B = jnp.array([checked_seed("seed", one) for one in seed], jnp.uint32)
        return jax.vmap(lambda one: jax.random.fold_in(jax.random.key(one), 0))(own_B)
    return keys(jnp.uint32(checked_seed("seed", seed)), batch)


def complete(
    chain: Chain,
    params: dict,
    x_BxL: Array,
    given_BxL: Array,
    longest_prompt: int,
    rng_B: Array,
    frames: int = 0,
) -> State:
    """Draws what is not given, from the prior's noise to finished tokens; pure, and so exported as a program.

    Args:
      x_BxL: int32; what is given, elsewhere anything.
      given_BxL: bool; the tokens that stay.
      longest_prompt: static upper bound of the given tokens at the front.
      rng_B: one PRNG key per text.
      frames: kept at most, besides the first; 0 records nothing.
    """
    return _run(chain, longest_prompt, frames, params, *_begin(chain, x_BxL, given_BxL, rng_B))


def _begin(chain: Chain, x_BxL: Array, given_BxL: Array, rng_B: Array) -> tuple[Array, Array, Array]:
    """Keys of the calls, texts of the prior's noise, and what is given."""
    alpha, given_BxL = chain.alpha(jnp.asarray(chain.hs.tau_max)), jnp.asarray(given_BxL)
    prior_rng_B, rng_B = jnp.moveaxis(jax.vmap(jax.random.split)(rng_B), 1, 0)
    noise_BxL = jax.vmap(lambda rng: chain.process.prior(rng, x_BxL.shape[1:], alpha))(prior_rng_B)
    return rng_B, jnp.where(given_BxL, x_BxL, noise_BxL).astype(jnp.int32), given_BxL


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(chain: Chain, longest_prompt: int, frames: int, params, rng_B, x_BxL, given_BxL) -> State:
    if chain.has_cache:
        return loop.cached(chain, params, rng_B, x_BxL, given_BxL, longest_prompt, frames)
    return loop.recomputed(chain, params, rng_B, x_BxL, given_BxL, frames)


def steps(
    chain: Chain, params: dict, given: prompting.Given, rng_B: Array, every: int = 1
) -> Iterator[tuple[int, State]]:
    """`complete` in pieces: yields (generation step, state) at first and after every so many calls.

    The texts are those of `complete` with the same keys, up to the rounding of scores.
    """
    rng_B, x_BxL, given_BxL = _begin(chain, given.tokens, given.mask, rng_B)
    state, run = begin(chain, x_BxL, given_BxL), functools.partial(_some_calls, chain)
    yield 0, state
    if not chain.has_cache:
        for first, count in _pieces(0, chain.hs.num_steps, every):
            state, _ = run(count, params, rng_B, given_BxL, (state, None), first)
            yield first + count, state
        return
    plan = segments.plan(chain.hs, x_BxL.shape[1], given.longest_prompt)
    cache = loop.begin_cache(chain, params, x_BxL, given.longest_prompt, plan[0].slots)
    for segment in plan:
        cache = kv_cache.grow(cache, segment.slots)
        for first, count in _pieces(segment.first, segment.end, every):
            state, cache = run(count, params, rng_B, given_BxL, (state, cache), first)
            yield first + count, state


def _pieces(first: int, end: int, every: int) -> list[tuple[int, int]]:
    return [(step, min(every, end - step)) for step in range(first, end, every)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _some_calls(chain: Chain, count: int, params, rng_B, given_BxL, carry, first):
    state, cache = carry
    some = first + jnp.arange(count)
    if cache is None:
        return loop.advance_recomputed(chain, params, rng_B, given_BxL, 0, state, some), None
    return loop.advance_cached(chain, params, rng_B, given_BxL, 0, carry, some, nested=False)
