"""Fast-dLLM: a model trained as LLaDA commits all tokens that are sure enough in one call.

    hdlm train --config experiments/systems/fast_dllm.py --workdir runs/fast_dllm  # minutes on 2 cores
    hdlm train --config experiments/systems/fast_dllm.py:base --workdir runs/fast_dllm  # the published size

How many calls that takes is counted (`Generation.calls`). By its factor rule: --sampler factor --factor 1. In blocks:
    hdlm sample --run runs/fast_dllm --hyperschedule block --width 32 --rate 1 --temperature 0

Its approximate cache is not here: the cache of a `prefix` model is exact.

Expected: 2.5 times fewer seconds than one token a call on LLaDA 8B, GSM8K (published, without its cache); none
measured by us.
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
    c.sampler.update(kind="threshold", threshold=0.9, steps=128)  # one token a call at least
    return sized(c, arg)
