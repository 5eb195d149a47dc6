"""Weights as one safetensors file: names joined by dots, the vocabulary's V rows without padding, a digest.

The package `safetensors` is imported where it is used.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hdlm_jax import files
from hdlm_jax.errors import UserError, one_of, require
from hdlm_jax.training import checkpoints, manifest
from hdlm_jax.training.sharding import named_leaves

NAME = "model.safetensors"
FORMAT = "hdlm_jax"
VOCABULARY_AXIS = {"embedding": 0, "head_kernel": 1, "head_bias": 0}  # of the arrays that are padded
DTYPES = {"F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16"}


class Weights(NamedTuple):
    """Parameters (numpy arrays), the step that they are of, and whether they are 'ema' or 'raw' weights."""

    params: dict
    step: int
    kind: str


def unpadded(params: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """The parameters with V rows of the vocabulary, as numpy arrays."""

    def cut(name: str, x: Any) -> np.ndarray:
        axis = VOCABULARY_AXIS.get(name)
        return np.asarray(x)[tuple(slice(vocabulary if i == axis else None) for i in range(x.ndim))]

    return {name: jax.tree.map(lambda x, name=name: cut(name, x), part) for name, part in params.items()}


def padded(params: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The parameters with `rows` rows of the vocabulary, those past its end 0."""

    def fill(name: str, x: np.ndarray) -> np.ndarray:
        axis = VOCABULARY_AXIS[name]
        return np.pad(x, [(0, rows - n if i == axis else 0) for i, n in enumerate(x.shape)])

    return {name: fill(name, x) if name in VOCABULARY_AXIS else x for name, x in params.items()}


def write(path: Path, params: Mapping[str, Any], about: Mapping[str, str]) -> None:
    """Writes parameters (without padding) and a few words about them."""
    tensors = {name: np.asarray(x) for name, x in flatten_dict(dict(params), sep=".").items()}
    save(path, tensors, {"format": FORMAT, **about, "sha256": digest(tensors)})


def save(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None) -> None:
    """Writes one safetensors file.

    Raises:
      UserError: it cannot be written, or the package is not installed.
    """
    library = _import_safetensors()
    rows = {name: np.asarray(x, order="C") for name, x in tensors.items()}  # the library writes other orders wrong
    try:
        library.numpy.save_file(rows, path, metadata=None if metadata is None else dict(metadata))
    except (OSError, library.SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open safetensors file: `keys()`, `get_tensor(name)`, `get_slice(name)`, `metadata()`.

    Raises:
      UserError: no such file, one that is truncated or no safetensors, or the package is not installed.
    """
    library = _import_safetensors()
    require(files.is_file(path), "weights", str(path), "a safetensors file")
    if files.is_remote(path):
        with tempfile.TemporaryDirectory(prefix="hdlm-weights-") as here:
            files.copy(path, Path(here) / path.name)
            with opened(Path(here) / path.name) as file:
                yield file
        return
    try:
        file = library.safe_open(path, "numpy")
    except (OSError, library.SafetensorError) as error:
        reason = f"{path}: not a whole safetensors file ({files.size(path):,} bytes; {error}); fetch or write it again"
        raise UserError(reason) from error
    with file:
        yield file


def header(file: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype as safetensors calls it, shape) of an open file; no array is read."""
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()}


def read(path: Path, abstract: Any, vocabulary: int, which: str) -> Weights:
    """The parameters of a file that `write` wrote, padded as `abstract` is.

    Raises:
      UserError: a file of another form or model, damaged, or raw weights are asked for and it holds the running mean.
    """
    one_of("weights", which, ("ema", "raw"))
    wanted = unpadded(jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), abstract), vocabulary)
    with opened(path) as file:
        about = file.metadata() or {}
        remedy = "one written by `hdlm export --format safetensors` (`hdlm import` reads the published ones)"
        require(about.get("format") == FORMAT, "weights", str(path), remedy)
        kept = which == "ema" or about.get("weights") == "raw"
        require(kept, "weights", which, f"'{about.get('weights')}', which is all that {path} holds")
        there = {
            name.replace(".", "/"): {"dtype": DTYPES.get(dtype, dtype), "shape": list(shape)}
            for name, (dtype, shape) in header(file).items()
        }
        manifest.compare(path, there, named_leaves(wanted))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    require(digest(tensors) == about.get("sha256"), "weights", str(path), "a file whose content matches its digest")
    params = unflatten_dict(tensors, sep=".")
    rows = abstract["embedding"].shape[0]
    return Weights(padded(params, rows), int(about["step"]), about["weights"])


def restore(folder: Path, abstract: Any, vocabulary: int, which: str = "ema") -> Weights:
    """The weights of a run folder, or of a folder that `hdlm export --format safetensors` wrote.

    Args:
      folder: the folder.
      abstract: the parameters' shapes and dtypes, padded.
      vocabulary: V.
      which: 'ema' or 'raw' (of an exported folder, 'ema' is whatever it holds).

    Raises:
      UserError: no weights there, damaged ones, or those of another model.
    """
    if files.is_file(folder / NAME) and not files.is_dir(folder / "checkpoints"):
        return read(folder / NAME, abstract, vocabulary, which)
    return Weights(*checkpoints.restore_params(folder / "checkpoints", abstract, which), which)


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """Hexadecimal sha256 of names and contents, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(np.asarray(tensors[name], order="C").tobytes())
    return sha.hexdigest()


def _import_safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise UserError("weights: a safetensors file needs a package: pip install safetensors") from error
    return safetensors
