"""The times of checkpoints and of a restart, at a tiny size."""

import pytest

from hdlm_jax.benchmarks import checkpoint
from hdlm_jax.training import run_folder


@pytest.mark.slow
def test_times_of_a_tiny_state(smoke_run, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    monkeypatch.setenv("XLA_FLAGS", "")  # one device: it starts faster
    found = checkpoint.measure(run_folder.read_config(smoke_run), tmp_path, repeats=2)
    assert found["parameters"] > 1000 and found["state bytes"] > 4 * 4 * found["parameters"]
    assert 0 < found["blocking, median"] <= found["blocking, longest"] and found["written"] > found["blocking, median"]
    assert found["resumed"] > found["of it compiling"] > 0 and found["restored"] > 0
