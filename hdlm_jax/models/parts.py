"""The parts of an experiment, built once from its config: network, hyperschedule, noising, loss, sampler.

Each factory checks its own block and names its fields in errors; here the blocks meet, and pairs that
do not belong together are refused.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from hdlm_jax.config import block_fields
from hdlm_jax.diffusion import bounds, hyperschedules, losses, noise_schedules, noising, phases, samplers, scores
from hdlm_jax.diffusion.hyperschedules import Hyperschedule
from hdlm_jax.diffusion.losses import Loss
from hdlm_jax.diffusion.noise_schedules import NoiseSchedule
from hdlm_jax.diffusion.noising import NoisingProcess
from hdlm_jax.diffusion.rules import Rule
from hdlm_jax.diffusion.visibility import check_context
from hdlm_jax.errors import UserError, one_of, require
from hdlm_jax.models.transformer import TransformerConfig

# How passes draw their noise, each without bias: times independent of each other; stratified over the batch (and
# over each text); stratified, and evaluated by pairs of passes with complementary masks; exactly l of a text's L
# tokens masked, l stratified; and the best of them for the experiment.
VARIANCES = ("auto", "independent", "stratified", "antithetic", "counts")


class Parts(NamedTuple):
    """Everything static that a pass, a bound or a sampler needs.

    Attributes:
      model: sizes and switches of the network.
      hs: the hyperschedule trained under.
      schedule: noise fraction -> survival.
      process: the noising process.
      loss: the training loss.
      layout: 'continuous' (flat: one noise fraction per text), 'tiled' (clean and noised copy, every
        position trained) or 'plain' (one generation step per text; flat where the process has no closed form for
        continuous times).
      noise_range: noise fractions drawn in training.
      origin_share: share of texts with a random origin in training.
      context_weight: weight of next-token cross-entropy on the clean copy (shifted, tiled).
      reconstruction_share: share of texts at 0+ in training on a bound with a reconstruction term, continuous layout.
      rows_per_chunk: rows whose scores exist at a time.
      variance: how noise is drawn, a name in `VARIANCES`.
    """

    model: TransformerConfig
    hs: Hyperschedule
    schedule: NoiseSchedule
    process: NoisingProcess
    loss: Loss
    layout: str
    noise_range: tuple[float, float]
    origin_share: float
    context_weight: float
    reconstruction_share: float
    rows_per_chunk: int
    variance: str


def build(config: ConfigDict, num_tokens: int, bos_id: int | None) -> Parts:
    """All parts of an experiment for a vocabulary of `num_tokens` ordinary tokens.

    Raises:
      UserError: a field out of range, an unknown name, or parts that do not fit each other.
    """
    length = config.data.length
    model = TransformerConfig(num_tokens=num_tokens, length=length, bos_id=bos_id, **config.model.to_dict())
    _check_model(model)
    hs = build_hyperschedule(config, length)
    kind, fields = block_fields(config.noise_schedule)
    schedule = noise_schedules.build(kind, **fields)
    kind, fields = block_fields(config.noising)
    process = noising.build(kind, num_tokens, **fields)
    layout = choose_layout(model, hs, process)
    weights = (config.loss.token_weight, config.loss.inverse_survival, config.sampler.eta, config.loss.reading)
    settled = config.loss.settled_weight
    completes = reconstructs(layout, schedule, process)
    loss = losses.build(config.loss.kind, process, *weights, layout == "continuous", settled, completes)
    _check_settled(settled, layout, model)
    _check_scores(loss, schedule, process, model)
    steps = loss.name != "acs_nelbo" or layout != "continuous"
    require(steps, "loss.kind", loss.name, "another loss for flat (corrections are a bound over discrete steps only)")
    context = config.loss.context_weight
    require(0 <= context < math.inf, "loss.context_weight", context, "a number >= 0")
    copies = context == 0 or (layout == "tiled" and model.prediction == "shifted")
    require(copies, "loss.context_weight", context, "0 unless model.prediction is 'shifted' and the layout tiled")
    noise_range = tuple(config.loss.noise_range)
    ordered = len(noise_range) == 2 and 0 <= noise_range[0] < noise_range[1] <= 1
    require(ordered, "loss.noise_range", noise_range, "two numbers 0 <= low < high <= 1")
    whole = noise_range == (0, 1) or layout == "continuous" or hs.kind == "block"
    where = f"hyperschedule.kind {hs.kind!r} with model.visibility {model.visibility!r}"
    require(whole, "loss.noise_range", noise_range, f"(0, 1) for {where}")
    share = config.loss.reconstruction_share
    require(0 < share < 1, "loss.reconstruction_share", share, "a number in (0, 1)")
    origin = config.loss.origin_share
    require(0 <= origin <= 1, "loss.origin_share", origin, "a number in [0, 1]")
    require(
        config.loss.rows_per_chunk >= 1,
        "loss.rows_per_chunk",
        config.loss.rows_per_chunk,
        "a positive integer",
    )
    made = Parts(
        model=model,
        hs=hs,
        schedule=schedule,
        process=process,
        loss=loss,
        layout=layout,
        noise_range=noise_range,
        origin_share=origin if model.visibility == "prefix" else 0.0,
        context_weight=context,
        reconstruction_share=share if loss.is_bound and completes else 0.0,
        rows_per_chunk=config.loss.rows_per_chunk,
        variance=one_of("loss.variance", config.loss.variance, VARIANCES),
    )
    _check_variance(made)
    return made


def _check_model(model: TransformerConfig) -> None:
    base, drift = model.rotary_base, model.interpolation
    require(0 < base < math.inf, "model.rotary_base", base, "a positive number")
    require(0 <= drift < math.inf, "model.interpolation", drift, "0 (off) or a positive number")
    seen = drift == 0 or model.conditioning > 0
    require(seen, "model.interpolation", drift, "0 for a network that does not see the noise level (conditioning 0)")
    wide = model.dtype != "float64" or jax.config.jax_enable_x64
    require(wide, "model.dtype", model.dtype, "'float32', 'bfloat16' ('float64' needs JAX_ENABLE_X64=1)")


def counts_masks(parts: Parts) -> bool:
    """Whether the bound depends on the number of masks in a text, and not on its time beside."""
    with jax.ensure_compile_time_eval():
        ends = phases.least_noise(parts.schedule, parts.process.alpha_max), parts.schedule.alpha(jnp.ones(()))
        whole = float(ends[0]) >= parts.process.alpha_max and float(ends[1]) == 0
    timeless = parts.model.conditioning == 0 and parts.loss.reading not in scores.READINGS
    return parts.layout == "continuous" and parts.process.frozen and timeless and whole


def variances(parts: Parts) -> tuple[str, ...]:
    """The ways in which the noise of a bound's draws can be drawn, 'independent' first; all have the same mean."""
    pairs = ("antithetic",) if parts.layout == "continuous" and parts.process.frozen else ()
    return "independent", "stratified", *pairs, *(("counts",) if counts_masks(parts) else ())


def _check_variance(made: Parts) -> None:
    kind, flat = made.variance, "antithetic" in variances(made)
    allowed = "'auto', 'stratified' or 'independent'"
    only = f"{allowed} (pairs are of flat masks: hyperschedule.kind 'flat', model.visibility 'full', absorb or epsilon)"
    require(kind != "antithetic" or flat, "loss.variance", kind, only)
    reason = (
        "(counts are of flat masks, for a schedule from 1 to 0, model.conditioning 0, a loss that is a bound and the"
        " whole loss.noise_range)"
    )
    exact = kind != "counts" or (counts_masks(made) and made.loss.is_bound and made.noise_range == (0, 1))
    require(exact, "loss.variance", kind, f"{allowed} {reason}")


def _check_settled(weight: float, layout: str, model: TransformerConfig) -> None:
    """Settled rows stand beside active ones in the plain layout of a `prefix` model only."""
    shown = weight == 0 or (layout == "plain" and model.visibility == "prefix")
    tiled = "the tiled layout predicts no settled rows; loss.context_weight is their weight for a shifted model"
    reason = tiled if layout == "tiled" else "no row is settled before flat ends"
    require(shown, "loss.settled_weight", weight, f"0: {reason}")


def _check_scores(loss: Loss, schedule: NoiseSchedule, process: NoisingProcess, model: TransformerConfig) -> None:
    """Scores are finite where some text survives; those at tokens depend on the noise level by more than a factor."""
    if loss.reading not in scores.READINGS:
        return
    with jax.ensure_compile_time_eval():
        some = float(schedule.alpha(jnp.ones(()))) > 0
    allowed = f"one with survival left at u = 1, as linear with eps 1e-3 ({loss.name}: pure noise has no scores)"
    require(some, "noise_schedule", schedule.name, allowed)
    seen = model.conditioning > 0 or process.gamma == 0
    allowed = f"a positive width ({loss.name} with noising.kind {process.name!r}: scores of tokens depend on the noise)"
    require(seen, "model.conditioning", model.conditioning, allowed)


def build_hyperschedule(config: ConfigDict, length: int) -> Hyperschedule:
    """The experiment's hyperschedule for texts of `length`; flat takes its steps from the sampler by default."""
    kind, fields = block_fields(config.hyperschedule)
    if kind in ("flat", "ar_diffusion"):
        fields.setdefault("steps", config.sampler.steps)
    return hyperschedules.build(kind, length, **fields)


def build_rule(sampler: ConfigDict, process: NoisingProcess, reading: str) -> Rule:
    """The rule of an experiment's `sampler` block, for a network read by `reading`.

    `eta` has a value in every experiment and reaches the samplers that have it; the other dials are refused where they
    are given to a sampler that has none of the name.
    """
    given = {name: sampler[name] for name in samplers.DIALS if name != "eta" or name in samplers.dials_of(sampler.kind)}
    return samplers.build(sampler.kind, process, reading=reading, **given)


def reconstructs(layout: str, schedule: NoiseSchedule, process: NoisingProcess) -> bool:
    """Whether the bound has a reconstruction term beside its integral: noise at 0+ in continuous times."""
    with jax.ensure_compile_time_eval():
        return layout == "continuous" and float(phases.least_noise(schedule, process.alpha_max)) < 1


def choose_layout(model: TransformerConfig, hs: Hyperschedule, process: NoisingProcess) -> str:
    """How a batch is laid out in training and evaluation.

    Raises:
      UserError: a `full` model under a hyperschedule that only a `prefix` model is trained under; groups of
        settled rows that the hyperschedule does not settle together.
    """
    if model.visibility == "full":
        if hs.kind != "flat":
            raise UserError(
                f"hyperschedule.kind: got {hs.kind!r} with model.visibility 'full'; allowed: 'flat' (train flat, then"
                " sample under any order), or model.visibility 'prefix'"
            )
        return "continuous" if process.name in bounds.CONTINUOUS else "plain"
    if not model.inexact_context:
        check_context(hs, model.context_group)
    return "tiled" if hs.period is not None and not model.inexact_context else "plain"
