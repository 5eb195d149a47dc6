"""The paper's epsilon-hybrid under a sliding window: corrections inside the window, KV cache behind it.

    hdlm train --config experiments/systems/epsilon_slide.py --workdir runs/epsilon_slide  # minutes on 2 cores
    hdlm train --config experiments/systems/epsilon_slide.py:base --workdir runs/epsilon_slide  # the published size

Expected at the published size: none published by us; the paper slides windows of L/4.
"""

from hdlm_jax.config import default, sized


def get_config(arg=""):
    """The experiment; `arg` is '', 'smoke' or 'base'."""
    c = default()
    c.data.length = 128
    c.model.update(hidden=128, blocks=4, heads=4, dropout=0.0, remat="none", visibility="prefix")
    c.optimizer.update(learning_rate=2e-3, warmup=100, ema=0.99)
    c.training.update(steps=2000, batch=32, evaluate_every=500, checkpoint_every=500)
    c.hyperschedule.update(kind="slide", width=16, rate="1")
    c.noising.epsilon = 0.01
    return sized(c, arg)
