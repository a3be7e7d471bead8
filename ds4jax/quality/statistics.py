"""Means and how far to trust them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    error: float


def mean(values: np.ndarray) -> Estimate:
    """The mean of a sample (n,), and its standard error sd / √n; NaN for fewer than 2."""
    values = np.asarray(values, np.float64)
    n = len(values)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan"))
