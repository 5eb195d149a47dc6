"""Pictures of noise hold the exact laws."""

import numpy as np
import pytest

from hdlm_jax.diffusion import noise_schedules, noising
from hdlm_jax.errors import UserError
from hdlm_jax.visual import kernels

N = 4
PROCESSES = {kind: noising.build(kind, N, **kernels._FIELDS.get(kind, {})) for kind in noising.PROCESSES}


def test_noise_draws_alpha_and_its_slope():
    chosen = [
        noise_schedules.cosine(),
        noise_schedules.polynomial(0.5),
        noise_schedules.clipped(noise_schedules.linear(), 0.1),
    ]
    figure = kernels.noise(chosen)
    left, right = figure.axes
    for schedule, alpha, slope in zip(chosen, left.lines, right.lines, strict=True):
        u = alpha.get_xdata()
        np.testing.assert_allclose(alpha.get_ydata(), schedule(u), atol=1e-6)
        between = np.diff(alpha.get_ydata()) / np.diff(u)
        middle = (slope.get_ydata()[1:] + slope.get_ydata()[:-1]) / 2
        np.testing.assert_allclose(middle[40:], between[40:], atol=5e-3)
        assert alpha.get_label() == schedule.name
    figure.draw_without_rendering()


def test_noise_has_one_schedule_of_each_builder_by_default():
    names = [line.get_label().partition("(")[0] for line in kernels.noise().axes[0].lines]
    assert set(names) == set(noise_schedules.BUILDERS)


@pytest.mark.parametrize("kind", PROCESSES)
def test_matrices_are_laws_that_follow_each_other(kind: str):
    process = PROCESSES[kind]
    S = N + (process.mask is not None)
    before, after = kernels.marginals(process, [0.5, 0.25])
    step = kernels.transitions(process, 0.5, 0.25)
    assert before.shape == (N, N + 1)
    assert step.shape == (S, N + 1)
    np.testing.assert_allclose(step.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(before[:, :S] @ step, after, atol=1e-6)


@pytest.mark.parametrize("kind", PROCESSES)
def test_fates_sum_to_one_from_intact_to_noise(kind: str):
    process = PROCESSES[kind]
    intact, other, mask = kernels.fates(kernels.marginals(process, [1.0, 0.6, 0.0]))
    np.testing.assert_allclose(intact + other + mask, 1, atol=1e-6)
    np.testing.assert_allclose([intact[0], other[0], mask[0]], [1, 0, 0], atol=1e-6)
    noise = [1 / N, 1 - 1 / N, 0] if process.mask is None else [0, 0, 1]
    np.testing.assert_allclose([intact[2], other[2], mask[2]], noise, atol=1e-6)
    np.testing.assert_allclose(intact[1], np.mean([process.marginal(x, 0.6)[x] for x in range(N)]), atol=1e-6)


def test_the_picture_holds_the_matrices_of_every_process():
    figure = kernels.kernels(N)
    columns = len(PROCESSES)
    for column, process in enumerate(PROCESSES.values()):
        S = N + (process.mask is not None)
        panels = [figure.axes[row * columns + column] for row in range(4)]
        assert panels[0].get_title().startswith(process.name)
        expected = [
            *kernels.marginals(process, [0.5, 0.1]),
            kernels.transitions(process, 0.5, 0.25),
        ]
        for panel, matrix in zip(panels[1:], expected, strict=True):
            np.testing.assert_allclose(panel.images[0].get_array(), matrix[:, :S], atol=1e-6)
    figure.draw_without_rendering()


def test_too_few_tokens():
    with pytest.raises(UserError, match="num_tokens: got 2; allowed: at least 3"):
        kernels.kernels(2)
