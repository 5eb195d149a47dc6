r"""The paper's epsilon-hybrid in blocks of L/4, aligned.

    hdlm train --config experiments/paper/epsilon_block.py --workdir runs/epsilon_block \
        --config.data.path='openwebtext/*.txt' --config.data.tokenizer=gpt2/tokenizer.json

Rates 1, 2, 4 and 8: --config.hyperschedule.rate=2 and so on.

Expected (published): no number of its own.
"""

from hdlm_jax.config import default, override, sized


def get_config(arg=""):
    """The experiment at its published size; `arg` is '' or 'smoke'."""
    c = sized(default(), "base")
    c.data.update(source="text", tokenizer="tokenizer.json")
    c.model.visibility = "prefix"
    c.hyperschedule.update(kind="block", width=256, rate="1")
    c.loss.inverse_survival = False  # as published for windows
    c.optimizer.update(warmup=0, final_share=4e-5 / 3e-4)
    c.training.batch = 512
    c.noising.update(kind="epsilon_hybrid", epsilon=0.01)
    c.loss.kind = "hybrid_cross_entropy"
    c.sampler.update(kind="acs", eta=0.25)
    small = {"data.source": "python_docs", "data.tokenizer": "bytes", "hyperschedule.width": 8}
    return override(sized(c, arg), small) if arg else c
