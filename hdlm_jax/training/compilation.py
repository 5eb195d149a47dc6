"""Compiled programs kept on disk, so that a run that starts again does not compile again."""

import os
from pathlib import Path

import jax

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def keep() -> Path:
    """Lets JAX keep compiled programs: where `VARIABLE` says, else in the user's cache folder; returns the place."""
    chosen = jax.config.jax_compilation_cache_dir
    if chosen is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        chosen = str(home / "hdlm_jax" / "compiled")
        jax.config.update("jax_compilation_cache_dir", chosen)
    return Path(chosen)
