"""BERT: one fixed share of masks, 15 percent; texts are filled in by Mask-Predict.

    hdlm train --config experiments/systems/bert.py --workdir runs/bert  # minutes on 2 cores
    hdlm train --config experiments/systems/bert.py:base --workdir runs/bert  # the published size

The bound that evaluation gives draws all noise levels, of which this network has seen one. Fill in:
    hdlm sample --run runs/bert --prompt "The " --temperature 0 --steps 10

Expected at the published size: nothing is published of its bound; none measured by us.
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
    c.loss.noise_range = (0.1495, 0.1505)
    c.sampler.update(kind="mask_predict", steps=10)
    return sized(c, arg)
