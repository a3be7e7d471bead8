"""Numbers and small formulas at the level of values, for XLA and for kernels alike."""
