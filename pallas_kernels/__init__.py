"""Pallas kernels, one file per op: config, XLA reference, kernel, supported shapes. They take arrays only."""
