"""The paper's epsilon-hybrid in blocks: corrections inside the block, KV cache behind it.

    hdlm train --config experiments/systems/epsilon_block.py --workdir runs/epsilon_block  # minutes on 2 cores
    hdlm train --config experiments/systems/epsilon_block.py:base --workdir runs/epsilon_block  # the published size

Expected at the published size: none published by us; the paper uses blocks of L/4.
"""

from hdlm_jax.config import default, sized


def get_config(arg=""):
    """The experiment; `arg` is '', 'smoke' or 'base'."""
    c = default()
    c.data.length = 128
    c.model.update(hidden=128, blocks=4, heads=4, dropout=0.0, remat="none", visibility="prefix")
    c.optimizer.update(learning_rate=2e-3, warmup=100, ema=0.99)
    c.training.update(steps=2000, batch=32, evaluate_every=500, checkpoint_every=500)
    c.hyperschedule.update(kind="block", width=16, rate="2")
    c.noising.epsilon = 0.01
    return sized(c, arg)
