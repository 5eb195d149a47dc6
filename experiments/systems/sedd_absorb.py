"""SEDD absorb: flat hyperschedule, absorb noising, concrete scores learned by score entropy, analytic sampler.

    hdlm train --config experiments/systems/sedd_absorb.py --workdir runs/sedd_absorb  # minutes on 2 cores
    hdlm train --config experiments/systems/sedd_absorb.py:base --workdir runs/sedd_absorb  # the published size

Expected at the published size: OpenWebText, L 1024: perplexity <= 24.10 (published; as re-run in the BD3-LM paper).
"""

from hdlm_jax.config import default, sized


def get_config(arg=""):
    """The experiment; `arg` is '', 'smoke' or 'base'."""
    c = default()
    c.data.length = 128
    c.model.update(hidden=128, blocks=4, heads=4, dropout=0.0, remat="none", conditioning=128)
    c.optimizer.update(learning_rate=2e-3, warmup=100, ema=0.99)
    c.training.update(steps=2000, batch=32, evaluate_every=500, checkpoint_every=500)
    c.noise_schedule.eps = 1e-3
    c.noising.kind = "absorb"
    c.loss.kind = "score_entropy"
    c.sampler.kind = "analytic"
    return sized(c, arg)
