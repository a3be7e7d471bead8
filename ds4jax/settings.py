"""Settings: how to run a model, as opposed to what it is. Read from ``configs/NAME.toml`` or any TOML file. No JAX."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_type_hints

from ds4jax import implementation
from ds4jax.errors import ConfigError
from ds4jax.files import read_small

# In a checkout the configs lie beside the package; in an installed wheel, inside it.
_HERE = Path(__file__).parent
CONFIG_DIR = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"

# Smallest and largest value. Nothing near the upper bounds works; they keep a slip of the keyboard from asking for it.
_RANGES = {
    "ctx": (2, 2**24),
    "batch": (1, 1024),
    "tp": (1, 1024),
    "ep": (1, 1024),
    "dp": (1, 1024),
    "prefill_chunk": (1, 2**20),
    "max_tokens": (1, 2**24),
    "draft_tokens": (0, 7),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to run a model. All keys of a config file; only `model` must be given.

    model: ``tiny`` or ``tiny_q2`` (embedded), ``hf:OWNER/REPO/FILE`` (see `io.download`) or the path of a GGUF file
        or of a folder of ``ds4jax checkpoint`` (from the current directory).
    ctx: tokens that one sequence can hold, prompt and answer together.
    batch: sequences that a batch job decodes together; each has its own cache of `ctx` tokens.
    max_tokens: the longest answer, unless a request says otherwise.
    profile: the model's release, which decides how efforts are asked for: ``original``, ``0731``, or ``auto``, the one
        that the file shows, see `profile.choose`.
    numerics: ``official``, the low-precision round trips that the model was trained with, or ``plain``, none.
    dtype: of the activations, ``float32`` or ``bfloat16``. Weights stay as the file has them.
    kernels: ``pallas``, kernels for NVIDIA GPUs (numerics official), or ``xla``, none; an op apart from the others as
        in ``pallas,attend=xla``, see `implementation`.
    tp, ep, dp: the device mesh, tp × ep × dp devices, see `ds4jax.sharding`. Along tp they share all large matrices,
        along ep the routed experts alone, and along dp the sequences, if these can be shared out evenly.
    prefill_chunk: tokens per prefill call. More are faster and need more memory for activations.
    memory_fraction: the part of each GPU's memory that JAX may take (XLA_CLIENT_MEM_FRACTION).
    preallocate: whether to take it all at the start (XLA_PYTHON_CLIENT_PREALLOCATE).
    expert_layout: of the routed experts in memory: ``file``, as the file has them; ``wide``, those in IQ2_XXS as 3-bit
        codes, which take half as much again and are faster in kernels; ``auto``, wide with kernels for several
        sequences if all fits.
    device_budget_gb: GiB of the GPU's memory that may be used. As many routed experts as that allows are kept there;
        the others are brought in from host memory when they are needed, see `model.residency`. 0: no budget; all
        experts are kept on the GPU. One device only.
    device: the GPU that the config is for, see `engine.cards`, or ``here``, whatever is there. Only plans depend on it.
    draft: whose drafts the model verifies, several tokens at once: a GGUF file with a DSpark drafter or an MTP head;
        ``auto``, the drafter beside the model (``NAME-dspark.gguf``), else the model's own MTP head, if there is one;
        or ``off``. What is said stays the same.
    draft_tokens: how many tokens are drafted at once, 7 at most; 0: what the drafter is made for, 1 for
        an MTP head.
    """

    model: str
    ctx: int = 4096
    batch: int = 1
    max_tokens: int = 1024
    profile: Literal["auto", "original", "0731"] = "auto"
    numerics: Literal["official", "plain"] = "official"
    dtype: Literal["float32", "bfloat16"] = "float32"
    kernels: str = "xla"
    tp: int = 1
    ep: int = 1
    dp: int = 1
    prefill_chunk: int = 128
    memory_fraction: float = 0.75
    preallocate: bool = True
    expert_layout: Literal["auto", "file", "wide"] = "auto"
    device_budget_gb: float = 0.0
    device: str = "here"
    draft: str = "off"
    draft_tokens: int = 0

    def __post_init__(self):
        if problem := self._problem():
            key, found, expected = problem
            raise ConfigError(f"{key}: found {found!r}, expected {expected}")

    def _problem(self) -> tuple[str, Any, str] | None:
        """The first value that cannot be: (key, found, expected)."""
        for key, kind in get_type_hints(type(self)).items():
            value, choices = getattr(self, key), get_args(kind)
            if choices and value not in choices:
                return key, value, " or ".join(map(repr, choices))
            if not choices and type(value) is not kind and (kind, type(value)) != (float, int):
                return key, value, f"a value of type {kind.__name__}"
        for key, (low, high) in _RANGES.items():
            if not low <= getattr(self, key) <= high:
                return key, getattr(self, key), f"{low} to {high}"
        if not 0 < self.memory_fraction <= 1:
            return "memory_fraction", self.memory_fraction, "a number above 0, at most 1"
        if not 0 <= self.device_budget_gb < 2**20:
            return "device_budget_gb", self.device_budget_gb, "0 or more"
        if self.device_budget_gb and self.devices > 1:
            return "device_budget_gb", f"{self.device_budget_gb:g} with {self.devices} devices", "0, or one device"
        if self.device_budget_gb and self.expert_layout == "wide":
            return "device_budget_gb", f"{self.device_budget_gb:g} with wide experts", "0, or expert_layout file"
        if implementation.parse(self.kernels).any_pallas and self.numerics != "official":
            return "kernels", f"{self.kernels} with numerics {self.numerics}", "numerics official, or kernels xla"
        if not self.draft:
            return "draft", self.draft, "auto, off or a path"
        if not self.model:
            return "model", self.model, "tiny, tiny_q2, hf:OWNER/REPO/FILE or a path"
        if self.model.startswith("hf:") and self.hf_file is None:
            return "model", self.model, "hf:OWNER/REPO/FILE"
        return None

    @classmethod
    def load(cls, name: str | Path, **overrides: Any) -> Self:
        """The settings of a config: the name of a file in `CONFIG_DIR`, or the path of a TOML file.

        overrides: values that replace the file's, e.g. from flags; None leaves the file's.
        Raises ConfigError naming the file, the key, what was found and what was expected.
        """
        path = Path(name)
        if path.suffix != ".toml" and path.name == str(name):
            path = CONFIG_DIR / f"{name}.toml"
            if not path.is_file():
                raise ConfigError(
                    f"config: found {name!r}, expected one of {', '.join(names())} or the path of a .toml file"
                )
        try:
            values = tomllib.loads(read_small(path).decode())
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}: not a TOML file: {error}") from None
        keys = [field.name for field in dataclasses.fields(cls)]
        if unknown := values.keys() - set(keys):
            raise ConfigError(f"{path}: found unknown key {min(unknown)!r}, expected one of {', '.join(keys)}")
        if "model" not in values:
            raise ConfigError(f"{path}: model: found nothing, expected tiny, tiny_q2, hf:OWNER/REPO/FILE or a path")
        try:
            settings = cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        return dataclasses.replace(settings, **{k: v for k, v in overrides.items() if v is not None})

    @property
    def devices(self) -> int:
        """How many devices compute together."""
        return self.tp * self.ep * self.dp

    @property
    def hf_file(self) -> tuple[str, str] | None:
        """(repository, file) if `model` names a file on Hugging Face, else None."""
        owner, _, rest = self.model.removeprefix("hf:").partition("/")
        repo, _, file = rest.partition("/")
        if not self.model.startswith("hf:") or not (owner and repo and file):
            return None
        return f"{owner}/{repo}", file

    def set_environment(self) -> None:
        """Tell XLA about GPU memory, before JAX first uses a device. Variables that are already set are left alone."""
        if not os.environ.keys() & {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"}:
            os.environ["XLA_CLIENT_MEM_FRACTION"] = str(self.memory_fraction)
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", str(self.preallocate).lower())
        if self.device_budget_gb:  # else XLA takes 64 GiB of pinned host memory at most
            os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "1024")


def names() -> list[str]:
    """The names of the configs that come with ds4jax."""
    return sorted(path.stem for path in CONFIG_DIR.glob("*.toml"))
