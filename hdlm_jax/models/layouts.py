"""The rows fed to the network in one pass, and who sees whom among them.

Rows are named by the token they predict (diffusion/visibility.py): row r of an aligned model holds
token r at position r, row r of a shifted model holds token r - 1 at position r - 1, BOS for r = 0.

Letters: B texts, L positions, R rows fed, W window width, H heads, D head size.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from hdlm_jax.diffusion import visibility
from hdlm_jax.diffusion.hyperschedules import Hyperschedule
from hdlm_jax.diffusion.level_laws import Table
from hdlm_jax.diffusion.phases import Phase
from hdlm_jax.models import fused_attention
from hdlm_jax.models.attention import Attention, band_scores, dense, join, over, over_band, scores
from hdlm_jax.models.transformer import TransformerConfig

MIN_CHUNK = 32  # rows per chunk of the band; smaller products run at the speed of their overhead


class Rows(NamedTuple):
    """What one pass feeds.

    Attributes:
      tokens: int32 [B, R].
      positions: int32 [B, R], rotary positions.
      alpha: float [B, R], survival of the token each row holds (1 for clean ones and BOS).
      attention: who sees whom.
      predicting: (first, end) of the rows that predict tokens 0..L-1, in order.
    """

    tokens: Array
    positions: Array
    alpha: Array
    attention: Attention
    predicting: tuple[int, int]


def held(config: TransformerConfig, x_BxL: Array, rows: int, bos) -> Array:
    """What rows 0..rows-1 hold, [B, rows]: x itself, or x one row later after `bos` for a shifted model."""
    if config.prediction == "aligned":
        return x_BxL[:, :rows]
    return jnp.pad(x_BxL, ((0, 0), (1, 0)), constant_values=bos)[:, :rows]


def row_positions(config: TransformerConfig, row: Array) -> Array:
    """Rotary positions of rows."""
    return row if config.prediction == "aligned" else row - 1


def plain(config: TransformerConfig, zt_BxL: Array, phase: Phase, trailing: bool = True) -> Rows:
    """One copy of each text at one step; worthless rows are fed but seen by nobody.

    Args:
      trailing: whether the window of a shifted model has a trailing row (visibility.trailing_row_matters);
        one more row, which holds the last token, is then fed. A `full` model always has it.
    """
    B, L = zt_BxL.shape
    extra = config.prediction == "shifted" and (trailing or config.visibility == "full")
    R = L + extra
    row_R = jnp.arange(R)
    if config.visibility == "full":
        attention = fused_attention.attention(config, R, None, dense())
    else:
        start_B, stop_B = phase.start[:, 0], phase.stop[:, 0] + extra
        visible = visibility.one_text(
            row_R[None, :, None],
            row_R[None, None, :],
            start_B[:, None, None],
            stop_B[:, None, None],
            config.context_group,
        )
        attention = fused_attention.attention(config, R, None, dense(visible), "rows of one text with a window")
    return Rows(
        held(config, zt_BxL, R, config.bos_id),
        jnp.broadcast_to(row_positions(config, row_R)[None, :], (B, R)),
        held(config, phase.alpha_t, R, 1.0),
        attention,
        (0, L),
    )


def tiled(config: TransformerConfig, x0_BxL: Array, zt_BxL: Array, phase: Phase, width: int, windows: int = 0) -> Rows:
    """A clean and a noised copy of each text: the windows of one phase lie side by side.

    Rows 0..L-1 are the clean copy (causal, or by groups); rows L..2L-1 the noised one, where row L + r predicts token
    r inside its window; then, for shifted models whose windows end in a token that may carry
    information, `windows` trailing rows, one per window.

    Args:
      width: the widest window.
      windows: trailing rows (0: none are needed); at least as many as there are windows.
    """
    B, L = zt_BxL.shape
    row_L = jnp.arange(L)
    shifted = config.prediction == "shifted"
    clean = held(config, x0_BxL, L, config.bos_id)
    noised, alpha = held(config, zt_BxL, L, config.bos_id), held(config, phase.alpha_t, L, 1.0)
    if shifted:  # the row before a window's first token holds a settled token
        opens = row_L[None, :] == phase.start
        noised, alpha = jnp.where(opens, clean, noised), jnp.where(opens, 1.0, alpha)
    rows = jnp.broadcast_to(row_positions(config, row_L)[None, :], (B, L))
    tokens, positions, alphas = [clean, noised], [rows, rows], [jnp.ones_like(alpha), alpha]
    trailing_start, obstacle = None, "windows with a trailing row" if windows else ""
    if windows:
        index_BxL = jnp.cumsum(row_L[None, :] == phase.start, axis=1) - 1
        member = index_BxL[:, None, :] == jnp.arange(windows)[None, :, None]
        last_BxW = jnp.max(jnp.where(member, row_L[None, None, :], 0), axis=-1)
        trailing_start = jnp.where(member.any(-1), jnp.take_along_axis(phase.start, last_BxW, 1), -1)
        tokens.append(jnp.take_along_axis(zt_BxL, last_BxW, 1))
        alphas.append(jnp.take_along_axis(phase.alpha_t, last_BxW, 1))
        positions.append(last_BxW)
    return Rows(
        jnp.concatenate(tokens, 1),
        jnp.concatenate(positions, 1),
        jnp.concatenate(alphas, 1),
        fused_attention.attention(
            config,
            2 * L,
            fused_attention.tiled_sight(phase.start, phase.stop, width, config.context_group),
            _tiled_attention(phase.start, trailing_start, width, config.context_group),
            obstacle,
        ),
        (L, 2 * L),
    )


def whole_window(config: TransformerConfig, x_BxL: Array) -> Rows:
    """The plain layout with the whole text as one window: every row sees every row."""
    B, L = x_BxL.shape
    zero, one = jnp.zeros((B, L), jnp.int32), jnp.ones((B, L))
    return plain(config, x_BxL, Phase(one, one, one, one, zero, zero + L, one))


def causal(config: TransformerConfig, x0_BxL: Array) -> Rows:
    """One causal pass: the tiled layout of a shifted model with windows of one row.

    Row r holds the settled token r - 1 and predicts token r: its settled and its active role coincide, so
    that no second copy is needed. This is a GPT.
    """
    B, L = x0_BxL.shape
    row_L = jnp.arange(L)
    sees = visibility.settled_sees(row_L[:, None], row_L[None, :])[None]
    positions = jnp.broadcast_to(row_positions(config, row_L)[None, :], (B, L))
    tokens = held(config, x0_BxL, L, config.bos_id)
    sight = fused_attention.causal_sight((B, L))
    attention = fused_attention.attention(config, L, sight, dense(sees))
    return Rows(tokens, positions, jnp.ones((B, L)), attention, (0, L))


def most_windows(hs: Hyperschedule) -> int:
    """An upper bound of the windows that lie side by side in one text, with or without an origin.

    >>> from hdlm_jax.diffusion.hyperschedules import block, slide
    >>> most_windows(block(length=64, width=16, rate=2)), most_windows(slide(64, 16, "1/2"))
    (5, 9)
    """
    if isinstance(hs.law, Table):  # the windows of a table may be as small as they like
        return hs.length
    groups = hs.num_groups + 1  # an origin cuts one group in two
    return min(hs.length, groups if hs.kind == "block" else hs.length // hs.width + 2 * groups + 1)


def tiled_visible(start_BxL: Array, trailing_start_BxW: Array | None = None, group: int = 1) -> Array:
    """The whole mask of the tiled layout, bool [B, R, R]: what split attention computes piecewise."""
    L = start_BxL.shape[1]
    row_L = jnp.arange(L)
    start = start_BxL
    if trailing_start_BxW is not None:
        start = jnp.concatenate([start_BxL, trailing_start_BxW], 1)
    causal = visibility.settled_sees(row_L[:, None], row_L[None, :], group)
    context = visibility.active_sees_settled(start[:, :, None], row_L[None, None, :])
    window = visibility.active_sees_active(start[:, :, None], start[:, None, :])
    B, N = start.shape
    top = jnp.concatenate([jnp.broadcast_to(causal[None], (B, L, L)), jnp.zeros((B, L, N), bool)], 2)
    return jnp.concatenate([top, jnp.concatenate([context, window], 2)], 1)


def _tiled_attention(start_BxL: Array, trailing_start_BxW: Array | None, width: int, group: int) -> Attention:
    """Clean rows: L x L causal, by groups. Active rows: L x (L + a band of three chunks), one softmax."""
    L = start_BxL.shape[1]
    row_L = jnp.arange(L)
    causal = visibility.settled_sees(row_L[:, None], row_L[None, :], group)[None]
    context = visibility.active_sees_settled(start_BxL[:, :, None], row_L[None, None, :])
    chunk = max(width, MIN_CHUNK)
    banded = 3 * chunk < L

    def attend(q, k, v, past, dropout):
        del past
        (qc, kc, vc), (qn, kn, vn), (qw, kw, vw) = (
            tuple(x[:, :, a:b] for x in (q, k, v)) for a, b in ((0, L), (L, 2 * L), (2 * L, None))
        )
        clean = join([scores(qc, kc, causal)], [over(vc)], dropout)
        groups, values = [scores(qn, kc, context)], [over(vc)]
        if banded:
            groups.append(band_scores(qn, kn, start_BxL, chunk))
            values.append(over_band(vn, chunk))
        else:
            groups.append(scores(qn, kn, visibility.active_sees_active(start_BxL[:, :, None], start_BxL[:, None, :])))
            values.append(over(vn))
        if trailing_start_BxW is None:
            return jnp.concatenate([clean, join(groups, values, dropout)], 2)
        sees = visibility.active_sees_active(start_BxL[:, :, None], trailing_start_BxW[:, None, :])
        groups.append(scores(qn, kw, sees))
        values.append(over(vw))
        own = visibility.active_sees_active(trailing_start_BxW[:, :, None], trailing_start_BxW[:, None, :])
        before = visibility.active_sees_settled(trailing_start_BxW[:, :, None], row_L[None, None, :])
        trailing = [scores(qw, kc, before), scores(qw, kn, jnp.swapaxes(sees, 1, 2)), scores(qw, kw, own)]
        return jnp.concatenate(
            [clean, join(groups, values, dropout), join(trailing, [over(vc), over(vn), over(vw)], dropout)], 2
        )

    return attend
