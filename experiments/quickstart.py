"""The quickstart: an epsilon-hybrid model on the interpreter's own documentation, in minutes on 2 CPU cores.

bash launch/quickstart.sh
hdlm train --config experiments/quickstart.py --workdir runs/quickstart
"""

from hdlm_jax.config import default, sized


def get_config(arg=""):
    """The experiment; `arg` is '' or 'smoke'."""
    c = default()
    c.data.length = 128
    c.data.tokenizer = "bytes"
    c.model.update(hidden=128, blocks=4, heads=4, dropout=0.0, prediction="shifted", visibility="prefix", remat="none")
    c.model.vocabulary_multiple = 1
    c.hyperschedule.update(kind="slide", width=8, rate="1")
    c.noising.epsilon = 0.01
    c.loss.origin_share = 0.25
    c.optimizer.update(learning_rate=3e-3, warmup=100, ema=0.99, weight_decay=0.05)
    c.training.update(steps=1500, batch=32, evaluate_every=500, checkpoint_every=500)
    return sized(c, arg)
