"""Traces the model with its annotations checked: ``python tests/typed.py``, in a process of its own.

jaxtyping's import hook checks the shapes and dtypes of arguments and results in every call, also of tracers.
"""

import dataclasses
import functools
import inspect
from typing import Any

from beartype import beartype
from jaxtyping import install_import_hook

CHECKED = ("ds4jax.engine.sampling", "ds4jax.model", "ds4jax.numerics", "ds4jax.ops", "pallas_kernels.numerics")


def check(f: Any) -> Any:
    """The hook's checker: for functions whose annotations have shapes."""
    if f.__name__ == "__init__":  # of a dataclass, which may hold structures instead of arrays
        return f
    return beartype(f) if "[Array" in str(f.__annotations__) else f


def main() -> None:
    """Raises an error of jaxtyping where an array is not what an annotation says."""
    import jax
    import jax.numpy as jnp

    from ds4jax import training
    from ds4jax.engine import sampling
    from ds4jax.engine.types import Sampling
    from ds4jax.io.synthetic import KERNEL, RECIPES, Synthetic
    from ds4jax.model import cache as kv
    from ds4jax.model import mtp, transformer, weights
    from ds4jax.model.compute import Compute

    cfg = dataclasses.replace(KERNEL, n_layers=3, compress_ratios=(0, 4, 128), swiglu_clamp=(10.0,) * 3, n_mtp=1)

    def traced(recipe: str, compute: Compute, batch: int, tokens: int) -> None:
        w = weights.structs(weights.abstract(cfg, Synthetic(cfg, RECIPES[recipe]).types))
        cache = kv.abstract(cfg, compute.numerics, compute.dtype, batch, 256)
        ids, n = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, tokens), (batch,)))
        params = sampling.batch([Sampling()] * batch)

        def step(w, cache, ids, n):
            X, after = transformer.forward(w, cache, ids, n, cfg, compute)
            drafts = mtp.draft(w, after, X, ids, cache.length, n, cfg, compute)
            logits, _ = inspect.unwrap(transformer.prefill)(w, cache, ids, n, cfg=cfg, compute=compute)
            return sampling.sample(logits, params, n), sampling.logprobs(logits, n), drafts

        jax.eval_shape(step, w, cache, ids, n)

    official = functools.partial(Compute, "official")
    traced("f16", Compute("plain", "float32"), 2, 5)
    for batch, tokens in ((1, 1), (2, 1), (1, 128)):
        traced("q2", official("bfloat16"), batch, tokens)
        traced("q2", official("bfloat16", kernels="pallas_interpret"), batch, tokens)

    w = weights.structs(weights.abstract(cfg, RECIPES["f32"]))
    ids, mask = jax.ShapeDtypeStruct((2, 129), jnp.int32), jax.ShapeDtypeStruct((2, 129), jnp.float32)
    learning = Compute("straight_through")
    jax.eval_shape(lambda w, ids, mask: training.loss(w, ids, mask, cfg, learning), w, ids, mask)

    try:
        sampling.logprobs(jnp.zeros((2, 9)), jnp.zeros(3, jnp.int32))
    except Exception as error:
        assert "jaxtyping" in type(error).__module__, error
    else:
        raise AssertionError("a wrong shape was not noticed")
    print("checked")


if __name__ == "__main__":
    install_import_hook(CHECKED, "typed.check")
    main()
