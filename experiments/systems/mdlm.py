"""MDLM / MD4: flat hyperschedule, absorb noising, continuous-time bound.

    hdlm train --config experiments/systems/mdlm.py --workdir runs/mdlm  # minutes on 2 cores
    hdlm train --config experiments/systems/mdlm.py:base --workdir runs/mdlm  # the published size

Expected at the published size: OpenWebText, L 1024: perplexity <= 22.98 (published; as re-run in the BD3-LM paper).
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
    c.sampler.kind = "ancestral"
    return sized(c, arg)
