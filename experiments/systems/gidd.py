"""GIDD: flat hyperschedule, masks and random tokens in turns, its exact bound.

    hdlm train --config experiments/systems/gidd.py --workdir runs/gidd  # minutes on 2 cores
    hdlm train --config experiments/systems/gidd.py:base --workdir runs/gidd  # the published size

`noising.uniform_share` is the largest share of random tokens, p_u; at 0 this is MDLM.

Expected at the published size: OpenWebText, L 512: perplexity <= 23.90 for p_u 0.1, 24.64 for 0.2, 22.29 for 0 at
twice the tokens (published, with loss weights that this bound does not have).
"""

from hdlm_jax.config import default, sized


def get_config(arg=""):
    """The experiment; `arg` is '', 'smoke' or 'base'."""
    c = default()
    c.data.length = 128
    c.model.update(hidden=128, blocks=4, heads=4, dropout=0.0, remat="none")
    c.optimizer.update(learning_rate=2e-3, warmup=100, ema=0.99)
    c.training.update(steps=2000, batch=32, evaluate_every=500, checkpoint_every=500)
    c.noising.update(kind="gidd", uniform_share=0.1)
    c.loss.kind = "nelbo"
    c.sampler.kind = "ancestral"
    return sized(c, arg)
