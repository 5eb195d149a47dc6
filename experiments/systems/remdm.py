"""ReMDM: trained as MDLM; while sampling, tokens are masked and drawn again (the loop of its paper).

    hdlm train --config experiments/systems/remdm.py --workdir runs/remdm  # minutes on 2 cores
    hdlm train --config experiments/systems/remdm.py:base --workdir runs/remdm  # the published size

Other rules: --sampler remdm_cap --eta 0.04, or remdm_rescale, remdm_conf, remdm_switch. The more calls, the more
there is to gain: --steps 1024 and above.

Expected at the published size: OpenWebText, L 1024, top-p 0.9: MAUVE 0.403, 0.610, 0.656 in 1024, 2048, 4096 calls
(published); none measured by us.
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
    # published for 1024 calls and more; without the loop eta 0.04 for fewer
    c.sampler.update(kind="remdm_loop", eta=0.02, t_on=0.55, t_off=0.05, alpha_on=0.9, steps=256, top_p=0.9)
    return sized(c, arg)
