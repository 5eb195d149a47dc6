"""Compiled programs kept on disk, so that a run that starts again does not compile again."""

from pathlib import Path

import jax

from hdlm_jax import files

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def keep() -> Path:
    """Lets JAX keep compiled programs: where `VARIABLE` says, else in the user's cache folder; returns the place."""
    chosen = jax.config.jax_compilation_cache_dir
    if chosen is None:
        chosen = str(files.cache("compiled"))
        jax.config.update("jax_compilation_cache_dir", chosen)
    return Path(chosen)
