"""Topologies by name, and meshes that fit them or are refused."""

import pytest

from hdlm_jax.errors import UserError
from hdlm_jax.planning import chips


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "v9:4x4",
            "--topology: got 'v9:4x4' (did you mean 'v6e:4x4'?); allowed: 'tpu7x:2x4x4', 'v4:2x4x4', 'v5e:4x4', ",
        ),
        ("v5e", "--topology: got 'v5e'; allowed: v5e:1x1, v5e:2x2"),
        ("v5e:4x4x4", "--topology: got 'v5e:4x4x4'; allowed: v5e:1x1"),
        ("v5p:4x4", "--topology: got 'v5p:4x4'; allowed: v5p:2x2x1"),
        ("v5p:0x4x4", "--topology: got 'v5p:0x4x4'"),
    ],
)
def test_unknown_topologies_list_the_choices(name, message):
    with pytest.raises(UserError) as error:
        chips.parse(name)
    assert str(error.value).startswith(message)


def test_a_missing_compiler_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match=r"needs libtpu.*pip install 'hdlm_jax\[launch\]'"):
        chips.devices(chips.parse("v5e:2x2"))


@pytest.fixture(scope="module")
def libtpu():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (extra launch)")


@pytest.mark.parametrize(
    ("name", "sizes", "slices"),
    [
        ("v5e:4x4", (4, 4, 1), 1),
        ("v5p:2x2x4", (2, 4, 2), 1),
        ("v6e:4x4", (-1, 4, 1), 1),
        ("v4:4x4x4", (4, 16, 1), 1),
        ("tpu7x:2x2x2", (4, 4, 1), 1),  # two devices per chip
        ("v5e:4x4", (4, 8, 1), 2),
    ],
)
def test_meshes(libtpu, name, sizes, slices):
    wanted = chips.parse(name)
    mesh = chips.mesh(wanted, sizes, slices)
    count = slices * wanted.chip.devices
    for size in wanted.shape:
        count *= size
    assert mesh.size == count and mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.flat[0].platform == "tpu"


@pytest.mark.parametrize(
    ("sizes", "slices", "message"),
    [
        ((3, 4, 1), 1, "--mesh: got '3 x 4 x 1'; allowed: sizes that multiply to the 16 devices of 1 x v5e:4x4"),
        ((-1, -1, 1), 1, "--mesh: got '-1 x -1 x 1'; allowed: positive sizes, one -1"),
        ((1, 32, 1), 2, "--mesh: got '1 x 32 x 1'; allowed: a data axis that divides over the 2 slices"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(libtpu, sizes, slices, message):
    with pytest.raises(UserError) as error:
        chips.mesh(chips.parse("v5e:4x4"), sizes, slices)
    assert str(error.value) == message


def test_a_shape_that_the_compiler_does_not_know(libtpu):
    with pytest.raises(UserError, match="--topology: got 'v5p:3x5x7'"):
        chips.devices(chips.parse("v5p:3x5x7"))
