"""GPT: quenched hyperschedule, absorb noising, shifted prediction. Its bound is the chain-rule NLL itself.

    hdlm train --config experiments/systems/ar.py --workdir runs/ar  # minutes on 2 cores
    hdlm train --config experiments/systems/ar.py:base --workdir runs/ar  # the published size

Expected at the published size: OpenWebText, L 1024: perplexity 17.54 (published; AR of the BD3-LM paper).
"""

from hdlm_jax.config import default, sized


def get_config(arg=""):
    """The experiment; `arg` is '', 'smoke' or 'base'."""
    c = default()
    c.data.length = 128
    c.model.update(hidden=128, blocks=4, heads=4, dropout=0.0, remat="none", prediction="shifted", visibility="prefix")
    c.optimizer.update(learning_rate=2e-3, warmup=100, ema=0.99)
    c.training.update(steps=2000, batch=32, evaluate_every=500, checkpoint_every=500)
    c.hyperschedule.kind = "quenched"
    c.noising.kind = "absorb"
    c.loss.kind = "absorb_nelbo"
    c.sampler.kind = "ancestral"
    return sized(c, arg)
