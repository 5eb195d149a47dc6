"""The paper's epsilon-hybrid under a sliding window at pod scale: 130M, 350M, 1B and 8B, per TPU generation.

    hdlm plan --config experiments/scale/epsilon.py:130m-v5e --topology v5e:4x4
    hdlm train --config experiments/scale/epsilon.py:130m-v5e --workdir runs/130m

The argument is SIZE-GENERATION; `RUNS` says for which slice each mesh is meant. Every run keeps at least 30% of
the memory free, gathers weights over `fsdp` (at most one ring or two of the torus) and adds gradients up over
`data`. Expected: no quality published or measured at these sizes by us; the plans are compiled, never run.
"""

from hdlm_jax.config import default, override, sized
from hdlm_jax.errors import choose

SIZES = {
    "130m": {"model.hidden": 768, "model.blocks": 12, "model.heads": 12, "data.length": 1024},
    "350m": {"model.hidden": 1024, "model.blocks": 24, "model.heads": 16, "data.length": 1024},
    "1b": {"model.hidden": 2048, "model.blocks": 24, "model.heads": 16, "data.length": 1024},
    "8b": {"model.hidden": 4096, "model.blocks": 36, "model.heads": 32, "data.length": 4096},
}
# run -> slice, mesh (data, fsdp, tensor), texts per step. A tpu7x chip is two devices of the mesh.
RUNS = {
    "130m-v4": ("v4:2x2x4", (4, 4, 1), 256),
    "130m-v5e": ("v5e:4x4", (4, 4, 1), 256),
    "130m-v5p": ("v5p:2x2x4", (4, 4, 1), 256),
    "130m-v6e": ("v6e:4x4", (4, 4, 1), 256),
    "130m-tpu7x": ("tpu7x:2x2x2", (4, 4, 1), 256),
    "350m-v4": ("v4:2x4x4", (8, 4, 1), 256),
    "350m-v5e": ("v5e:4x8", (8, 4, 1), 256),
    "350m-v5p": ("v5p:2x4x4", (8, 4, 1), 256),
    "350m-v6e": ("v6e:4x8", (8, 4, 1), 256),
    "350m-tpu7x": ("tpu7x:2x2x4", (8, 4, 1), 256),
    "1b-v4": ("v4:4x4x4", (4, 16, 1), 256),
    "1b-v5e": ("v5e:16x16", (16, 16, 1), 1024),
    "1b-v5p": ("v5p:4x4x4", (4, 16, 1), 256),
    "1b-v6e": ("v6e:16x16", (16, 16, 1), 1024),
    "1b-tpu7x": ("tpu7x:4x4x4", (8, 16, 1), 256),
    "8b-v4": ("v4:4x8x8", (4, 64, 1), 256),
    "8b-v5p": ("v5p:4x8x8", (4, 64, 1), 256),
    "8b-v6e": ("v6e:16x16", (16, 16, 1), 256),
    "8b-tpu7x": ("tpu7x:4x4x8", (4, 64, 1), 256),
}


def get_config(arg="130m-v5e"):
    """The experiment; `arg` is a name in `RUNS` or 'smoke'."""
    c = default()
    c.data.tokenizer, c.data.vocab_size = "sentencepiece", 50_000
    c.model.update(dropout=0.0, visibility="prefix", dtype="bfloat16", remat="full", attention="auto")
    c.noising.epsilon = 0.01
    c.optimizer.update(learning_rate=3e-4, warmup=2500)
    c.training.update(steps=100_000, log_every=100, evaluate_every=5000, checkpoint_every=1000)
    if arg == "smoke":
        c.hyperschedule.update(kind="slide", width=8, rate="1")
        c.data.tokenizer = "bytes"
        return sized(c, arg)
    _, (data, fsdp, tensor), batch = choose("--config argument", arg, RUNS)
    override(c, SIZES[arg.partition("-")[0]])
    c.hyperschedule.update(kind="slide", width=256, rate="1")
    c.mesh.update(data=data, fsdp=fsdp, tensor=tensor)
    c.training.batch = batch
    return c
