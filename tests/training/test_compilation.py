"""Where compiled programs are kept."""

from pathlib import Path

import jax
import pytest

from hdlm_jax.training import compilation


@pytest.fixture
def unset():
    """No folder chosen; afterwards that of the tests again."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_users_cache_folder(unset, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation.keep() == tmp_path / "hdlm_jax" / "compiled"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "hdlm_jax" / "compiled")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    jax.config.update("jax_compilation_cache_dir", None)
    assert compilation.keep() == Path("/home/someone/.cache/hdlm_jax/compiled")


def test_a_folder_that_was_chosen_is_left(unset, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert compilation.keep() == tmp_path
