"""What must agree for a stored state to be the one that this process would compute."""

from __future__ import annotations

import hashlib

import jax
import numpy as np

from ds4jax.engine.model_runner import ModelRunner
from ds4jax.engine.snapshot import LAYOUT
from ds4jax.io.synthetic import Synthetic
from ds4jax.model.tensors import tensor_table

SAMPLE = 4096  # bytes of each tensor that are looked at; all of them would take minutes


def fingerprint(runner: ModelRunner) -> dict[str, str | int]:
    """Model (its tokenizer included), numerics, devices, and the layout of snapshots; for `engine.kv_store.KVStore`."""
    settings = runner.settings
    return {
        "model": _model(runner),
        "numerics": settings.numerics,
        "dtype": settings.dtype,
        "kernels": settings.kernels,
        "device": jax.devices()[0].device_kind,
        "mesh": f"tp {settings.tp}, ep {settings.ep}",
        "layout": LAYOUT,
    }


def _model(runner: ModelRunner) -> str:
    digest, source = hashlib.blake2b(repr(runner.cfg).encode(), digest_size=16), runner.checkpoint
    if isinstance(source, Synthetic):
        types = [(spec.name, int(source.types(spec))) for spec in tensor_table(runner.cfg)]
        digest.update(repr((types, source.seed)).encode())
        return digest.hexdigest()
    for key, value in sorted(source.file.metadata.items()):
        digest.update(repr((key, value.tolist() if isinstance(value, np.ndarray) else value)).encode())
    for name in sorted(source.types):
        info, data = source.holder(name).info(name), source.holder(name).raw(name).reshape(-1)
        digest.update(repr((name, info.shape, int(info.type))).encode())
        digest.update(data[:SAMPLE].tobytes())
    return digest.hexdigest()
