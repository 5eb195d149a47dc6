"""Checksums against their formula, on every mesh, and against every flipped bit; the manifest itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from hdlm_jax.errors import UserError
from hdlm_jax.training import manifest


def brute(x):
    """The sum with Python's integers."""
    x = np.asarray(x)
    width = min(x.dtype.itemsize, 4)
    bits = np.frombuffer(x.tobytes(), f"<u{width}").tolist()
    return sum(b * (2 * i + 1) for i, b in enumerate(bits)) % 2**32


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint32, jnp.int8, jnp.float8_e4m3fn, jnp.bool_]
)
def test_checksum_is_its_formula(dtype):
    x = (100 * jax.random.normal(jax.random.key(0), (3, 5, 2))).astype(dtype)
    assert int(manifest.checksum(x)) == brute(x)


def test_checksum_of_eight_byte_numbers_and_of_scalars():
    with jax.enable_x64():
        assert int(manifest.checksum(x := jnp.linspace(-1, 1, 7, dtype=jnp.float64))) == brute(x)
    assert int(manifest.checksum(x := jnp.int32(-5))) == brute(x)


def test_checksum_catches_every_flipped_bit():
    x = jax.random.normal(jax.random.key(1), (5, 3))
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
    flips = jnp.eye(15, dtype=jnp.uint32)[:, None, :] << jnp.arange(32, dtype=jnp.uint32)[None, :, None]
    flipped = bits[None, None, :] ^ flips
    sums = jax.vmap(jax.vmap(manifest.checksum))(flipped)
    assert not (sums == manifest.checksum(bits)).any()


def test_checksum_catches_elements_that_changed_places():
    assert int(manifest.checksum(jnp.array([1.0, 2.0]))) != int(manifest.checksum(jnp.array([2.0, 1.0])))


@pytest.mark.parametrize("spec", [P("a"), P(None, "b"), P("b", "a"), P()])
def test_checksum_does_not_depend_on_the_mesh(spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(2), (8, 4))
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    assert int(manifest.checksums({"x": placed})["x"]) == brute(x)


def test_a_manifest_comes_back_and_a_changed_one_does_not():
    made = manifest.begin({"a": jnp.ones((2, 3)), "b": jnp.int32(1)}, {"loss": 2.0, "bad": float("nan")})()
    text = json.dumps(made)
    body = manifest.read(text)
    assert body["metrics"] == {"loss": 2.0}
    assert body["leaves"]["a"] == {"shape": [2, 3], "dtype": "float32", "checksum": brute(np.ones((2, 3), np.float32))}
    for damaged in (text.replace("2.0", "3.0"), text[:-5], "[]", "", text.replace("digest", "digests")):
        with pytest.raises(manifest.Damaged):
            manifest.read(damaged)


def test_compare_lists_what_differs():
    saved = {name: {"shape": [2], "dtype": "float32"} for name in ("same", "gone", "shape", "dtype")}
    shape = lambda size, dtype=jnp.float32: jax.ShapeDtypeStruct(size, dtype)
    wanted = {"same": shape((2,)), "new": shape((2,)), "shape": shape((3,)), "dtype": shape((2,), jnp.bfloat16)}
    with pytest.raises(UserError) as error:
        manifest.compare("here", saved, wanted)
    for part in (
        "checkpoint here",
        "missing in it: new;",
        "unexpected in it: gone;",
        "float32[2] there, float32[3] here",
    ):
        assert part in str(error.value)
    assert "float32[2] there, bfloat16[2] here" in str(error.value) and "same" not in str(error.value)
    manifest.compare("here", {"same": saved["same"]}, {"same": wanted["same"]})


def test_long_lists_are_cut():
    with pytest.raises(UserError, match="a7 and 2 more"):
        manifest.compare("here", {f"a{i}": {"shape": [1], "dtype": "int32"} for i in range(10)}, {})
