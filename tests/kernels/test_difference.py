"""Powers of values and differences against numpy."""

import numpy as np

from onnxq.kernels.difference import powers


def test_powers_are_those_of_numpy():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 4, 5)).astype(np.float32)
    b = (a + 1e-3 * rng.normal(size=a.shape)).astype(np.float32)
    wide = a.astype(np.float64), b.astype(np.float64)
    wanted = np.square(wide[0]).sum(), np.square(wide[0] - wide[1]).sum()
    np.testing.assert_allclose(powers(a, b), wanted, rtol=1e-12)
    np.testing.assert_allclose(powers(a[:, ::2], b[:, ::2])[0], np.square(wide[0][:, ::2]).sum())


def test_equal_values_differ_by_nothing():
    a = np.arange(6, dtype=np.float32)
    assert powers(a, a) == (55.0, 0.0)


def test_what_is_not_finite_shows():
    a = np.array([1, np.nan], np.float32)
    assert np.isnan(powers(a, a)).all()
