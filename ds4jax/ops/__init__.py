"""The operations of the forward pass: one file each, with the formula in XLA and a switch to its Pallas kernel.

Every op takes arrays and `Weight`s, and `implementation`: "xla" computes the formula that the file shows, "pallas" runs
the kernel of `pallas_kernels`, "pallas_interpret" runs the kernel step by step on a CPU.
"""
