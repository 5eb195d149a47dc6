"""D3PM band: a random walk on the cycle of token ids, jumps of up to `noising.width` ids.

    hdlm train --config experiments/systems/d3pm_band.py --workdir runs/d3pm_band  # minutes on 2 cores

Its reverse kernel costs O(V^2) a position, so it is for small vocabularies (bytes); ids of bytes are no scale of
meaning, so expect more than from uniform noise. Expected: nothing published for bytes.
"""

from hdlm_jax.config import default, sized


def get_config(arg=""):
    """The experiment; `arg` is '', 'smoke' or 'base'."""
    c = default()
    c.data.length = 64
    c.model.update(hidden=128, blocks=4, heads=4, dropout=0.0, remat="none")
    c.optimizer.update(learning_rate=2e-3, warmup=100, ema=0.99)
    c.training.update(steps=2000, batch=32, evaluate_every=500, checkpoint_every=500)
    c.hyperschedule.steps = 64
    c.noise_schedule.eps = 1e-4
    c.noising.update(kind="d3pm_band", width=64)
    c.loss.kind = "nelbo"
    c.sampler.kind = "ancestral"
    return sized(c, arg)
