"""Settings of every test: 8 simulated CPU devices, no implicit rank promotion, two tiers.

The tests not marked `slow` run by default; `--all` (or `-m slow`) adds the slow ones. Compiled programs are
kept in `.tmp/jax_cache` of the checkout, so that a second run spends its time on testing.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# JAX reads these at its import, so they come first. What is already set wins.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".tmp" / "jax_cache"))

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tests.fake_bucket import Bucket, served  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

hypothesis.settings.register_profile("fixed", max_examples=50, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--all`."""
    parser.addoption("--all", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the slow tests out unless `--all` or an expression with `-m` asks for them."""
    if config.getoption("--all") or config.getoption("markexpr"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in set(slow)]


@pytest.fixture(scope="session")
def docs_windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default corpus prepared as windows of 32 bytes, the data of every smoke-sized run."""
    from hdlm_jax.data import prepare

    folder = tmp_path_factory.mktemp("docs") / "windows"
    prepare.prepare({"source": "python_docs", "tokenizer": "bytes", "length": 32}, folder)
    return folder


@pytest.fixture(scope="session")
def bucket() -> Iterator[Bucket]:
    """A bucket in memory, which all that runs here or is started from here finds as gs://bucket."""
    with served() as made, pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment().items():
            patch.setenv(name, value)
        pytest.importorskip("gcsfs", reason="buckets need a package (extra gcs)")  # it reads them at its import
        yield made


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of some 20 kB in paragraphs, prepared at once."""
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "saw", "one", "more", "red", "hen", "ran"]
    paragraphs = [" ".join(rng.choice(words, 40)) for _ in range(150)]
    path = tmp_path_factory.mktemp("text") / "small.txt"
    path.write_text("\n\n".join(paragraphs) + "\n")
    return path


@pytest.fixture(scope="session")
def smoke_command(small_text: Path) -> Callable[..., list[str]]:
    """(workdir, more arguments) -> the arguments of `hdlm` that train `smoke_run`."""
    experiment = ["--config", f"{ROOT}/experiments/quickstart.py:smoke"]
    experiment += ["--config.data.source=text", f"--config.data.path={small_text}"]
    experiment += [f"--config.hyperschedule.{field}" for field in ("kind=slide", "width=8", "rate=1")]
    steps = {"steps": 6, "log_every": 1, "evaluate_every": 3, "checkpoint_every": 2}
    experiment += [f"--config.training.{name}={value}" for name, value in steps.items()]
    return lambda workdir, *more: ["train", *experiment, "--workdir", str(workdir), *more]


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory, smoke_command: Callable[..., list[str]]) -> Path:
    """A run folder after 6 steps of the quickstart at its smoke size. Copy it before changing anything in it."""
    from hdlm_jax.__main__ import main

    folder = tmp_path_factory.mktemp("smoke") / "run"
    assert main(smoke_command(folder)) == 0
    return folder
