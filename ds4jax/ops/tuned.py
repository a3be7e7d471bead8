"""Tile sizes that a sweep has found to be the fastest, per device kind: ``configs/tuned/DEVICE.json``.

    {op: {name of a shape in the op's SHAPES: fields of its Config}}

`scripts/autotune.py --write` makes the file; every op looks here for its kernel's tiles. A tuned config serves
the calls whose shape has the same `key` as the one it was measured for, and nothing in between: any other call takes
the op's `default_config`, which was made to be good everywhere.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ds4jax.errors import ConfigError
from ds4jax.files import read_small
from ds4jax.settings import CONFIG_DIR
from pallas_kernels.common import device_kind


def path_of(device_kind: str) -> Path:
    """Where the tuned configs of a device kind are, if there are any."""
    return CONFIG_DIR / "tuned" / f"{device_kind.lower().replace(' ', '_')}.json"


def config_for(module_name: str, shape: Any) -> Any:
    """The config of an op, of module `module_name`, for a call of this shape. Raises ConfigError for a broken file."""
    module = sys.modules[module_name]
    found = _table(path_of(device_kind()), module).get(key(shape))
    return module.default_config(shape) if found is None else found


def tiles(kernel: ModuleType) -> Callable[[Any], Any]:
    """What gives a kernel the config for the shape of a call."""
    return functools.partial(config_for, kernel.__name__)


def key(shape: Any) -> Any:
    """What of a shape a config may depend on."""
    return getattr(shape, "key", shape)


@functools.cache
def _table(path: Path, module: ModuleType) -> dict[Any, Any]:
    """key of a shape → config of one op."""
    try:
        content = json.loads(read_small(path))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path}: found {error}, expected JSON") from None
    op, table = module.__name__.rpartition(".")[2], {}
    shapes = content.get(op, {}) if isinstance(content, dict) else content
    if not isinstance(shapes, dict):
        raise ConfigError(f"{path}: {op}: found {shapes}, expected configs by the names of shapes")
    for name, fields in shapes.items():
        what = f"{path}: {op}, {name}"
        if name not in module.SHAPES:
            raise ConfigError(f"{what}: found no such shape, expected one of {', '.join(module.SHAPES)}")
        shape = module.SHAPES[name]
        config, which = _config(what, fields, module.default_config(shape)), key(shape)
        if table.setdefault(which, config) != config:
            raise ConfigError(f"{what}: found {config}, expected {table[which]}, as of another shape with equal calls")
    return table


def _config(what: str, fields: Any, like: Any) -> Any:
    """A config of these fields; like: one of the kind."""
    if not isinstance(fields, dict):
        raise ConfigError(f"{what}: found {fields}, expected the fields of a config")
    expected = {name: type(value).__name__ for name, value in vars(like).items()}
    found = {name: type(value).__name__ for name, value in fields.items()}
    if found != expected:
        raise ConfigError(f"{what}: found fields {found}, expected {expected}")
    return type(like)(**fields)
