"""Formats that describe their units of 32 weights once for all kernels: what a kernel makes of them, without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unit_formats import UNITS

from ds4jax.formats import FORMATS, GGMLType
from pallas_kernels import formats as known
from pallas_kernels.formats import tiles
from pallas_kernels.formats.units import UNIT, Rows, Words


@pytest.mark.parametrize("name", UNITS)
def test_units_hold_every_weight(name):
    """Every bit of codes and scales at random: bytes times scale less minimum, in their columns, are the weights."""
    fmt, dots = FORMATS[GGMLType[name]], known.needs(name, "experts")
    units, k = dots.units, 1024
    raw = np.random.default_rng(1).integers(0, 256, (3, k // fmt.block * fmt.block_bytes), np.uint8)
    planes = fmt.from_bytes(raw)
    d = "dm" if "dm" in planes else "d"
    planes[d] = np.random.default_rng(2).normal(size=planes[d].shape).astype(np.float16)
    planes = [jnp.asarray(p) for p in planes.values()]
    rows = Rows(lambda p, i: planes[p][:, i], lambda p, nth, n: [planes[p][:, nth * n + i] for i in range(n)])
    loaded = units.load(rows, jnp.arange(k // UNIT, dtype=jnp.int32))
    ready = loaded if units.look_up is None else units.look_up(loaded, jnp.array(units.table, jnp.uint32))
    found = np.zeros((3, k), np.float32)
    for group in range(units.groups):
        words = units.words(ready, group, Words(tiles.Emulation, [jnp.uint32(c) for c in units.constants]))
        assert len(words) == UNIT // units.groups // 4
        bytes_ = np.stack([np.asarray(w) for w in words], -1).view(np.int8)  # row, unit, weight
        values = bytes_ * np.asarray(units.scale(loaded, group))[..., None]
        if units.minimum is not None:
            values = values - np.asarray(units.minimum(loaded, group))[..., None]
        found[:, dots.order(k)[:, units.of_a_group(group)]] = values
    expected = np.asarray(jax.tree.map(jnp.asarray, fmt(*planes)).dequantize())
    # The same products in another order; only a difference, of a minimum, can lose digits.
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", UNITS)
def test_the_columns_of_a_group_are_neighbours(name):
    """`matmul` reads x there at once, in the order of the columns; `grouped_gemm` has them in its own order."""
    units = known.needs(name, "experts").units
    columns = units.columns()
    assert sorted(columns.ravel()) == list(range(256))
    for group in range(units.groups):
        within = np.sort(columns[:, units.of_a_group(group)], axis=1)
        assert (within == within[:, :1] + np.arange(UNIT // units.groups)).all()
    dims, axes = known.needs(name, "grouped_gemm").order
    arranged = np.arange(256).reshape(dims).transpose(axes).reshape(2, 16, 4, 2)  # step, g and a, thread, b
    np.testing.assert_array_equal(arranged.transpose(0, 2, 1, 3).reshape(8, UNIT), columns)
