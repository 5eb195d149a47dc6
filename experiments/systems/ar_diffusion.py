"""AR-Diffusion: a rounded line from noise to text, left positions ahead; absorb noising here.

    hdlm train --config experiments/systems/ar_diffusion.py --workdir runs/ar_diffusion  # minutes on 2 cores
    hdlm train --config experiments/systems/ar_diffusion.py:base --workdir runs/ar_diffusion  # the published size

Its window is nearly the whole text, so it trains in the plain layout.

Expected at the published size: none published for this noising.
"""

from hdlm_jax.config import default, sized


def get_config(arg=""):
    """The experiment; `arg` is '', 'smoke' or 'base'."""
    c = default()
    c.data.length = 128
    c.model.update(hidden=128, blocks=4, heads=4, dropout=0.0, remat="none", visibility="prefix")
    c.optimizer.update(learning_rate=2e-3, warmup=100, ema=0.99)
    c.training.update(steps=2000, batch=32, evaluate_every=500, checkpoint_every=500)
    c.hyperschedule.update(kind="ar_diffusion", steps=256)
    c.noising.kind = "absorb"
    c.loss.kind = "absorb_nelbo"
    c.loss.origin_share = 0.0
    c.sampler.kind = "ancestral"
    sized(c, arg)
    if arg == "base":
        c.hyperschedule.steps = 2048
    return c
