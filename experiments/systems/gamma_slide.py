"""The paper's gamma-hybrid under a sliding window: scores inside the window, KV cache behind it.

    hdlm train --config experiments/systems/gamma_slide.py --workdir runs/gamma_slide  # minutes on 2 cores
    hdlm train --config experiments/systems/gamma_slide.py:base --workdir runs/gamma_slide  # the published size

Expected at the published size: none published by us; the paper slides windows of L/4 at gamma 0.01.
"""

from hdlm_jax.config import default, sized


def get_config(arg=""):
    """The experiment; `arg` is '', 'smoke' or 'base'."""
    c = default()
    c.data.length = 128
    c.model.update(hidden=128, blocks=4, heads=4, dropout=0.0, remat="none", visibility="prefix")
    c.model.update(conditioning=128, interpolation=0.01)
    c.optimizer.update(learning_rate=2e-3, warmup=100, ema=0.99)
    c.training.update(steps=2000, batch=32, evaluate_every=500, checkpoint_every=500)
    c.hyperschedule.update(kind="slide", width=16, rate="1")
    c.noise_schedule.eps = 5e-3
    c.noising.update(kind="gamma_hybrid", gamma=0.01)
    c.loss.kind = "score_entropy"
    c.sampler.kind = "analytic"
    return sized(c, arg)
