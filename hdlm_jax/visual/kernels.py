"""Figures of noise: schedules alpha(u) with their slopes, and the laws of every noising process as matrices."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure

from hdlm_jax.diffusion import noise_schedules as schedules
from hdlm_jax.diffusion import noising
from hdlm_jax.diffusion.noise_schedules import NoiseSchedule
from hdlm_jax.diffusion.noising import NoisingProcess
from hdlm_jax.errors import require
from hdlm_jax.visual.figures import COLORS, DARK

_PROBABILITY = LinearSegmentedColormap.from_list("probability", ["#ffffff", "#9cc3e0", "#2f5f9e", "#14243d"])
_NORM = PowerNorm(0.5, 0, 1)  # so that small probabilities are seen
_FATES = {"intact": COLORS[0], "another token": COLORS[4], "mask": "#c9c9c9"}
_FIELDS = {
    "gamma_hybrid": {"gamma": 0.3},
    "epsilon_hybrid": {"epsilon": 0.2},
    "gidd": {"uniform_share": 0.4},
    "d3pm_band": {"width": 1},
}
_STEEPEST = -4.0  # slopes below are cut off
_ALPHAS = (0.5, 0.1)
_STEP = (0.5, 0.25)


def noise(chosen: Iterable[NoiseSchedule] | None = None) -> Figure:
    """Draws noise schedules: the survival alpha against the noise fraction u, and its slope d alpha / du.

    Args:
      chosen: schedules; by default one or two of each builder.
    """
    chosen = _schedules() if chosen is None else list(chosen)
    u_K = np.linspace(0, 1, 401)
    figure = Figure(figsize=(11.0, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, schedule in enumerate(chosen):
        style = {"color": COLORS[i % len(COLORS)], "linestyle": ("-", "--", ":")[i // len(COLORS) % 3]}
        left.plot(u_K, schedule.alpha(u_K), linewidth=1.8, label=schedule.name, **style)
        right.plot(u_K, schedule.derivative(u_K), linewidth=1.8, **style)
    left.set(title="survival alpha(u)", ylim=(-0.03, 1.03))
    right.set(title="slope d alpha / du", ylim=(_STEEPEST, 0.15))
    for panel in (left, right):
        panel.set(xlabel="noise fraction u = level / highest level", xlim=(0, 1))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def kernels(num_tokens: int = 6) -> Figure:
    """Draws every noising process on a few tokens, one column each.

    Args:
      num_tokens: N, ordinary tokens.

    Returns:
      A figure with a row of fates (what share of the tokens is intact, another token or the mask, against 1 - alpha)
      and rows of matrices: q(z | x) at two alphas and the transition between two. Rows are the token before, columns
      the token after; the mask, where there is one, is the last.

    Raises:
      UserError: fewer than 3 tokens.
    """
    require(num_tokens >= 3, "num_tokens", num_tokens, "at least 3, of which each has neighbours")
    processes = {kind: noising.build(kind, num_tokens, **_FIELDS.get(kind, {})) for kind in noising.PROCESSES}
    noise_K = np.linspace(0, 1, 41)
    figure = Figure(figsize=(14.0, 8.6), layout="constrained")
    panels = figure.subplots(2 + len(_ALPHAS), len(processes), squeeze=False)
    for column, (kind, process) in enumerate(processes.items()):
        fields = "".join(f"\n{name} {value}" for name, value in _FIELDS.get(kind, {}).items()) or "\n"
        panels[0, column].set_title(kind + fields, fontsize=11)
        *chosen, laws_KxNxV = np.split(marginals(process, [*_ALPHAS, *(1 - noise_K)]), range(1, 1 + len(_ALPHAS)))
        _draw_fates(panels[0, column], noise_K, fates(laws_KxNxV))
        matrices = [*(law_1xNxV[0] for law_1xNxV in chosen), transitions(process, *_STEP)]
        for panel, matrix in zip(panels[1:, column], matrices, strict=True):
            image = _draw_matrix(panel, matrix, process)
    names = ["share of tokens", *(f"q(z | x) at alpha {alpha}" for alpha in _ALPHAS)]
    for panel, name in zip(panels[:, 0], [*names, "transition,\nalpha {} to {}".format(*_STEP)], strict=True):
        panel.set_ylabel(name, fontsize=11)
    figure.align_ylabels(panels[:, 0])
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="upper right", frameon=False)
    bar = figure.colorbar(
        image, ax=panels[1:], shrink=0.6, ticks=[0, 0.02, 0.1, 0.25, 0.5, 1], label="probability (M: the mask)"
    )
    bar.ax.set_yticklabels(["0", "0.02", "0.1", "0.25", "0.5", "1"])
    bar.outline.set_visible(False)
    return figure


def marginals(process: NoisingProcess, alphas_K: ArrayLike) -> np.ndarray:
    """[K, N, V]: q(z | x) at every alpha, for every x.

    >>> marginals(noising.absorb(2), [0.75]).tolist()
    [[[0.75, 0.0, 0.25], [0.0, 0.75, 0.25]]]
    """
    of_all = jax.vmap(jax.vmap(process.marginal, (0, None)), (None, 0))
    return np.asarray(jax.jit(of_all)(jnp.arange(process.num_tokens), jnp.asarray(alphas_K, jnp.float32)))


def transitions(process: NoisingProcess, alpha_from: float, alpha_to: float) -> np.ndarray:
    """[S, V]: q(z_to | z_from) for every ordinary token, and for the mask where there is one.

    >>> transitions(noising.absorb(2), 1.0, 0.75).tolist()
    [[0.75, 0.0, 0.25], [0.0, 0.75, 0.25], [0.0, 0.0, 1.0]]
    """
    of_all = jax.vmap(process.transition, (0, None, None))
    return np.asarray(jax.jit(of_all)(jnp.arange(_states(process)), alpha_from, alpha_to))


def fates(laws_KxNxV: np.ndarray) -> np.ndarray:
    """[3, K]: the shares of tokens that are intact, another ordinary token and the mask, from `marginals`.

    >>> fates(marginals(noising.uniform(2), [1.0, 0.5])).tolist()
    [[1.0, 0.75], [0.0, 0.25], [0.0, 0.0]]
    """
    N = laws_KxNxV.shape[1]
    intact_K = np.einsum("kii->k", laws_KxNxV[:, :, :N]) / N
    mask_K = laws_KxNxV[:, :, N].mean(1)
    return np.stack([intact_K, laws_KxNxV[:, :, :N].sum((1, 2)) / N - intact_K, mask_K])


def _schedules() -> list[NoiseSchedule]:
    return [
        schedules.linear(),
        schedules.cosine(),
        schedules.polynomial(0.5),
        schedules.polynomial(2),
        schedules.geometric(1e-4, 20.0),
        schedules.clipped(schedules.linear(), 0.1),
    ]


def _states(process: NoisingProcess) -> int:
    return process.num_tokens + (process.mask is not None)


def _draw_fates(panel: Axes, noise_K: np.ndarray, fates_3xK: np.ndarray) -> None:
    panel.stackplot(noise_K, fates_3xK, labels=list(_FATES), colors=list(_FATES.values()))
    panel.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], box_aspect=1)
    panel.set_xlabel("1 - alpha")


def _draw_matrix(panel: Axes, matrix: np.ndarray, process: NoisingProcess):
    N, S = process.num_tokens, _states(process)
    image = panel.imshow(matrix[:, :S], cmap=_PROBABILITY, norm=_NORM)
    names = [str(i) for i in range(N)] + ["M"] * (S - N)
    panel.set_xticks(range(S), names)
    panel.set_yticks(range(len(matrix)), names[: len(matrix)])
    panel.tick_params(length=0, labelsize=8)
    if S > N:
        panel.axvline(N - 0.5, color=DARK, linewidth=0.8)
        if len(matrix) > N:
            panel.axhline(N - 0.5, color=DARK, linewidth=0.8)
    return image
