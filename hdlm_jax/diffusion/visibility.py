"""Who may attend to whom: predicates on rows, from which every attention backend draws its mask.

A row is named by the token it predicts. Row r of an aligned model holds token r at position r; row r
of a shifted model holds token r - 1 at position r - 1 (BOS for r = 0). So named, both kinds obey the
same rules:

- a *settled* row sees settled rows up to itself, never active or worthless ones;
- an *active* row, in the window [start, stop), sees the settled rows before start and its whole window;
- a *trailing* row (shifted models only) is row stop: it holds the window's last token and predicts
  nothing here; it belongs to the window and is needed when that token may carry information;
- a *worthless* row is seen by nobody (and sees itself, so that its softmax has a term).

With `full` visibility every row sees every row. Arguments broadcast; numpy and JAX arrays both work.
"""

import functools

import jax
import jax.numpy as jnp

from hdlm_jax.diffusion.hyperschedules import Hyperschedule
from hdlm_jax.diffusion.noise_schedules import NoiseSchedule
from hdlm_jax.errors import UserError


def settled_sees(query, key, group: int = 1):
    """Among settled rows: causal; with `group` > 1 every group of so many rows, counted from row 0, sees itself whole.

    Groups are what the published models call block-causal context; one as long as the text is full context.

    >>> settled_sees(3, 3), settled_sees(3, 4), settled_sees(4, 5, group=2)
    (True, False, True)
    """
    return key // group <= query // group


def active_sees_settled(start, key):
    """An active row, by its window's start, sees the settled rows before the window.

    >>> active_sees_settled(4, 3), active_sees_settled(4, 4)
    (True, False)
    """
    return key < start


def active_sees_active(query_start, key_start):
    """Active rows see one another when their windows start at the same place (and never elsewhere)."""
    return query_start == key_start


def one_text(query, key, start, stop, group: int = 1):
    """The plain layout: row `query` sees row `key` when the window is [start, stop).

    For a shifted model pass stop + 1, so that the trailing row counts as part of the window. `group` is that of
    `settled_sees`.

    >>> import numpy as np
    >>> r = np.arange(5)
    >>> one_text(r[:, None], r[None, :], 2, 4).astype(int)
    array([[1, 0, 0, 0, 0],
           [1, 1, 0, 0, 0],
           [1, 1, 1, 1, 0],
           [1, 1, 1, 1, 0],
           [0, 0, 0, 0, 1]])
    """
    settled = (query < start) & (key < start) & settled_sees(query, key, group)
    active = (query >= start) & (query < stop) & (key < stop)
    return settled | active | (query == key)


def sees_runs(start, stop, offset: int, key):
    """A row by its two runs of keys: [0, start) and [offset + start, offset + stop).

    The tiled layout in this form, clean rows 0..L-1 before noised ones: `offset` L, a noised row's runs are those of
    its window, and a clean row r has start = stop = r + 1.

    >>> import numpy as np
    >>> start, stop = np.array([[1], [2], [0], [1]]), np.array([[1], [2], [1], [2]])
    >>> sees_runs(start, stop, 2, np.arange(4)[None]).astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [0, 0, 1, 0],
           [1, 0, 0, 1]])
    """
    return (key < start) | ((key >= offset + start) & (key < offset + stop))


@functools.cache
def trailing_row_matters(hs: Hyperschedule, schedule: NoiseSchedule) -> bool:
    """Whether a window's last token can be anything but pure noise, so that a shifted model must feed it.

    False when pure noise keeps nothing (alpha(1) = 0) and either every step is the last of its position
    (tau_max 1) or every call starts at least one new position (a slide with rate >= 1).
    """
    with jax.ensure_compile_time_eval():
        keeps = float(schedule.alpha(jnp.ones(()))) > 0
    fresh = hs.tau_max == 1 or (hs.kind == "slide" and hs.rate >= 1)
    return keeps or not fresh


@functools.cache
def groups_settle_whole(hs: Hyperschedule, group: int) -> bool:
    """Whether every window starts where a group of rows does, so that the groups before it are settled for good.

    >>> from hdlm_jax.diffusion.hyperschedules import block, slide
    >>> [groups_settle_whole(hs, 4) for hs in (block(16, 8, 2), slide(16, 8, 4), slide(16, 8, 2))]
    [True, True, False]
    """
    return group == 1 or all(hs.window(step)[0] % group == 0 for step in range(hs.num_steps))


def check_context(hs: Hyperschedule, group: int) -> None:
    """Refuses groups of settled rows that do not settle together: what a cache holds of them would change.

    Raises:
      UserError: naming the groups that fit, and the way without a cache.
    """
    if not groups_settle_whole(hs, group):
        fitting = [str(g) for g in range(1, hs.width + 1) if groups_settle_whole(hs, g)]
        raise UserError(
            f"model.context_group: got {group} under {hs.describe()}; allowed: {', '.join(fitting)} (every window must"
            " start where a group does), or model.inexact_context=true (no cache: all rows are fed in every call)"
        )


def check_sampling(visibility: str, trained_width: int, hs: Hyperschedule) -> None:
    """Refuses hyperschedules that a trained model cannot sample exactly.

    A `full` model takes any (all rows are fed; the levels only order the work). A `prefix` model takes
    those that settle left to right, with a window no wider than trained.

    Raises:
      UserError: with the reason.
    """
    if visibility == "full":
        return
    if not hs.settles_prefix:
        raise UserError(
            f"hyperschedule.kind: got {hs.kind!r}; allowed for a 'prefix' model: those that settle from left"
            " to right (quenched, block, slide, block_slide), since its rows never see past the window"
        )
    if hs.width > trained_width:
        raise UserError(
            f"hyperschedule.width: got {hs.width}; allowed for this 'prefix' model: at most {trained_width},"
            " the widest window it was trained on"
        )
