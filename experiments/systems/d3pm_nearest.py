"""D3PM nearest neighbour: a random walk on the line of token ids, one id at a time, reflected at its ends.

    hdlm train --config experiments/systems/d3pm_nearest.py --workdir runs/d3pm_nearest  # minutes on 2 cores

Over 257 ids the walk mixes after some 40,000 jumps, more than any alpha in float32 stands for. The noise ends at 80
jumps, which still tell where on the line a token was: generation starts from the uniform law all the same, and the
bound's prior term holds what that costs, 1.9 nats a token.

Its reverse kernel costs O(V^2) a position, so it is for small vocabularies (bytes); neighbouring bytes are mostly
neighbours in the alphabet, so expect less than from uniform noise. Expected: nothing published for bytes.
"""

from hdlm_jax.config import default, sized


def get_config(arg=""):
    """The experiment; `arg` is '', 'smoke' or 'base'."""
    c = default()
    c.data.length = 64
    c.model.update(hidden=128, blocks=4, heads=4, dropout=0.0, remat="none")
    c.optimizer.update(learning_rate=2e-3, warmup=100, ema=0.99)
    c.training.update(steps=2000, batch=32, evaluate_every=500, checkpoint_every=500)
    c.hyperschedule.steps = 64
    c.noise_schedule.update(kind="geometric", smin=0.01, smax=80.0)
    c.noising.kind = "d3pm_nearest"
    c.loss.kind = "nelbo"
    c.sampler.kind = "ancestral"
    return sized(c, arg)
