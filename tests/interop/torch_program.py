"""Runs exported folders with PyTorch, in a process where this package cannot be imported.

    python torch_program.py PLACE NAME ...

For each name, PLACE/NAME is an exported folder and PLACE/NAME.npz its inputs; PLACE/NAME-out.npz gets the outputs.
"""

import json
import sys
from pathlib import Path


def outputs(model, inputs):
    """Scores of whole texts and of windows, and texts."""
    import torch

    tensor = lambda name: torch.from_numpy(inputs[name])
    sigma = tensor("sigma") if "sigma" in inputs else None
    found = {"logits": model(tensor("tokens"), sigma=sigma).logits}
    for name in sorted(name for name in inputs if name.startswith("window")):
        start, stop, trailing = inputs[name]
        bounds = (torch.full((len(inputs["tokens"]),), int(bound)) for bound in (start, stop))
        levels = tensor(f"sigma/{name}") if sigma is not None else None
        rows = model.rows(tensor("tokens"), levels, *bounds, trailing=bool(trailing))
        found[name] = model.output_layer(rows)
    if "settings" in inputs:
        settings = json.loads(str(inputs["settings"]))
        found["texts"] = model.generate(generator=torch.Generator().manual_seed(0), **settings)
        if "prompts" in inputs:
            found["continued"] = model.generate(tensor("prompts"), tensor("kept"))
    return {name: x.numpy() for name, x in found.items()} | {"refusals": refusals(model)}


def refusals(model):
    """What `generate` says to settings that do not fit."""
    import numpy as np

    said = []
    for settings in ({}, {"sampler": "asc"}, {"eta": 2.0, "sampler": "acs"}, {"hyperschedule": "slide", "width": 3}):
        try:
            model.generate(max_length=2 if not settings else None, **settings)
        except ValueError as error:
            said.append(f"{settings}: {error}")
    return np.array(said)


def main(place, *names):
    """Runs the folders one after the other."""
    import numpy as np
    import torch
    from transformers import AutoModel

    sys.modules["hdlm_jax"] = None
    torch.set_grad_enabled(False)
    for name in names:
        model = AutoModel.from_pretrained(f"{place}/{name}", trust_remote_code=True)
        np.savez(Path(place) / f"{name}-out.npz", **outputs(model, dict(np.load(f"{place}/{name}.npz"))))


if __name__ == "__main__":
    main(*sys.argv[1:])
