"""Random float32 weights without a file, and without compiling anything."""

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.io import synthetic

F32 = synthetic.RECIPES["f32"]


def make(cfg, tree, seed):
    """The weights of an `abstract` tree in F32, and {tensor name: array}."""
    named = {}

    def stored(spec):
        for tensor in spec.tensors:
            raw = synthetic.random_data(cfg, seed, tensor, synthetic.storage_type(tensor, F32))
            named[tensor.name] = raw.view(np.int32 if tensor.kind == "ids" else np.float32).reshape(tensor.shape)
        arrays = [named[tensor.name] for tensor in spec.tensors]
        values = jnp.asarray(np.stack(arrays) if spec.layered else arrays[0])
        return spec.format(values) if spec.quantized else values

    return jax.tree.map(stored, tree), named
