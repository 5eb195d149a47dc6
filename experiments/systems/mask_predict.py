"""Mask-Predict (CMLM): flat hyperschedule, absorb noising; the least probable tokens are masked again.

    hdlm train --config experiments/systems/mask_predict.py --workdir runs/mask_predict  # minutes on 2 cores
    hdlm train --config experiments/systems/mask_predict.py:base --workdir runs/mask_predict  # the published size

Published for translation, in 4 to 10 greedy calls: --steps 10 --temperature 0.

Expected at the published size: nothing is published of its perplexity; none measured by us.
"""

from hdlm_jax.config import default, sized


def get_config(arg=""):
    """The experiment; `arg` is '', 'smoke' or 'base'."""
    c = default()
    c.data.length = 128
    c.model.update(hidden=128, blocks=4, heads=4, dropout=0.0, remat="none")
    c.optimizer.update(learning_rate=2e-3, warmup=100, ema=0.99)
    c.training.update(steps=2000, batch=32, evaluate_every=500, checkpoint_every=500)
    c.noising.kind = "absorb"
    c.loss.kind = "absorb_nelbo"
    c.sampler.update(kind="mask_predict", steps=10)
    return sized(c, arg)
