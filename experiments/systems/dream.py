"""Dream: a shifted model, absorb noising; unmasks where the prediction has the least entropy.

    hdlm train --config experiments/systems/dream.py --workdir runs/dream  # minutes on 2 cores
    hdlm train --config experiments/systems/dream.py:base --workdir runs/dream  # the published size

The published model starts from the weights of an autoregressive one: --config.training.initial=DIR, a run of the same
sizes. Row i - 1 predicts token i, as in the AR model, but every row sees every row.

Expected at the published size: nothing is published for it; none measured by us.
"""

from hdlm_jax.config import default, sized


def get_config(arg=""):
    """The experiment; `arg` is '', 'smoke' or 'base'."""
    c = default()
    c.data.length = 128
    c.model.update(hidden=128, blocks=4, heads=4, dropout=0.0, remat="none", prediction="shifted")
    c.optimizer.update(learning_rate=2e-3, warmup=100, ema=0.99)
    c.training.update(steps=2000, batch=32, evaluate_every=500, checkpoint_every=500)
    c.noising.kind = "absorb"
    c.loss.kind = "absorb_nelbo"
    c.sampler.update(kind="entropy", rounding="down", order_temperature=0.0)
    return sized(c, arg)
