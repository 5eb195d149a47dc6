"""D3PM nearest neighbour: a random walk on the line of token ids, one id a jump.

    hdlm train --config experiments/systems/d3pm_nearest.py --workdir runs/d3pm_nearest  # minutes on 2 cores

Its reverse kernel costs O(V^2) a position. A walk over all bytes takes more jumps than float32 alphas can tell, so that
noise still knows the neighbourhood of a byte: that is the bound's term `prior`. Expected: nothing published for bytes.
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
    c.noise_schedule.update(kind="geometric", smin=1e-3, smax=60.0)
    c.noising.kind = "d3pm_nearest"
    c.loss.kind = "nelbo"
    c.sampler.kind = "ancestral"
    return sized(c, arg)
