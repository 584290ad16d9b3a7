"""Gram matrices of short vectors against numpy."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onnxq.kernels.gram import add_outer_products


@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_sums_of_outer_products(count, groups, columns, seed):
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(2, 1, (count, groups, columns)).astype(np.float32) for _ in range(2))
    start = rng.normal(size=(groups, columns, columns)).astype(np.float32)
    total = start.copy()
    add_outer_products(a, b, total)
    wide = a.astype(np.float64), b.astype(np.float64)
    np.testing.assert_allclose(total, start + np.einsum("ngi,ngj->gij", *wide), atol=1e-3)
