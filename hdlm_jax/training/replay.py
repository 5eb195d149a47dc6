"""What a step without a finite loss was made of, so that it can be done again and looked at."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hdlm_jax import files
from hdlm_jax.data import pipeline
from hdlm_jax.data.prepare import Prepared

FILE = "skipped.jsonl"


def record(data: Prepared, seed: int, batch: int, step: int, rng: jax.Array, metrics: Mapping[str, Any]) -> dict:
    """The record of one skipped step.

    Its batch is `pipeline.batch_at(data.train, seed, batch, step - 1)`, its noise that of `rng` with the step
    folded in as `train_step` does, its weights those of the newest checkpoint before it and the steps since.

    Args:
      data: the run's.
      seed, batch: the experiment's.
      step: steps done with this one.
      rng: the run's key for noise.
      metrics: of the step.

    Returns:
      step, global rows (first and last), windows of the training split, key data, loss and gradient norm as text.
    """
    numbers = np.arange(len(data.train))
    return {
        "step": step,
        "rows": [(step - 1) * batch, step * batch - 1],
        "windows": pipeline.batch_at(numbers, seed, batch, step - 1).tolist(),
        "rng": np.asarray(jax.random.key_data(jax.random.fold_in(rng, step - 1))).tolist(),
        "loss": str(float(metrics["loss"])),
        "gradient_norm": str(float(metrics["gradient_norm"])),
    }


def append(workdir: Path, record: Mapping[str, Any]) -> None:
    """Adds a record to skipped.jsonl of a run folder; raises `UserError` if it cannot be written."""
    files.append(workdir / FILE, json.dumps(record))
