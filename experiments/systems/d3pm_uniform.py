"""D3PM uniform: flat hyperschedule, uniform noising, x0 prediction, the negative ELBO in continuous times.

    hdlm train --config experiments/systems/d3pm_uniform.py --workdir runs/d3pm_uniform  # minutes on 2 cores
    hdlm train --config experiments/systems/d3pm_uniform.py:base --workdir runs/d3pm_uniform  # the published size

D3PM absorb is systems/mdlm.py: its bound in T levels falls to MDLM's as T grows.

Expected at the published size: none published for this length.
"""

from hdlm_jax.config import default, sized


def get_config(arg=""):
    """The experiment; `arg` is '', 'smoke' or 'base'."""
    c = default()
    c.data.length = 128
    c.model.update(hidden=128, blocks=4, heads=4, dropout=0.0, remat="none")
    c.optimizer.update(learning_rate=2e-3, warmup=100, ema=0.99)
    c.training.update(steps=2000, batch=32, evaluate_every=500, checkpoint_every=500)
    c.noising.kind = "uniform"
    c.loss.kind = "nelbo"
    c.sampler.kind = "ancestral"
    return sized(c, arg)
