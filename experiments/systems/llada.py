"""LLaDA: flat hyperschedule, absorb noising; the surest proposals are kept, block after block.

    hdlm train --config experiments/systems/llada.py --workdir runs/llada  # minutes on 2 cores
    hdlm train --config experiments/systems/llada.py:base --workdir runs/llada  # the published size

Sampled flat by default; in its blocks, and greedily, as published:
    hdlm sample --run runs/llada --hyperschedule block --width 32 --rate 1 --temperature 0

The loss is the cross-entropy of the masks divided by their share, which is the bound.

Expected at the published size: nothing is published for it; none measured by us.
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
    c.sampler.update(kind="confidence", rounding="up")  # an even split of the masks over the calls
    return sized(c, arg)
