"""Weight formats, one file each: planes, formula, random blocks, and, for most, a quantizer and what the kernels need.

Importing this package makes every format known to the kernels. A format is added by its file and by its name below.
"""

from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import Quantized
from ds4jax.formats.dense import BF16, F16, F32
from ds4jax.formats.e4m3 import E4M3
from ds4jax.formats.iq1_m import IQ1_M
from ds4jax.formats.iq1_s import IQ1_S
from ds4jax.formats.iq2_3b import IQ2_3B
from ds4jax.formats.iq2_s import IQ2_S
from ds4jax.formats.iq2_xs import IQ2_XS
from ds4jax.formats.iq2_xxs import IQ2_XXS
from ds4jax.formats.iq3_s import IQ3_S
from ds4jax.formats.iq3_xxs import IQ3_XXS
from ds4jax.formats.iq4_nl import IQ4_NL
from ds4jax.formats.iq4_xs import IQ4_XS
from ds4jax.formats.mxfp4 import MXFP4
from ds4jax.formats.nvfp4 import NVFP4
from ds4jax.formats.q2_k import Q2_K
from ds4jax.formats.q3_k import Q3_K
from ds4jax.formats.q4_0 import Q4_0
from ds4jax.formats.q4_1 import Q4_1
from ds4jax.formats.q4_k import Q4_K
from ds4jax.formats.q5_0 import Q5_0
from ds4jax.formats.q5_1 import Q5_1
from ds4jax.formats.q5_k import Q5_K
from ds4jax.formats.q6_k import Q6_K
from ds4jax.formats.q8_0 import Q8_0
from ds4jax.formats.read_only import ReadOnly
from ds4jax.formats.tq1_0 import TQ1_0
from ds4jax.formats.tq2_0 import TQ2_0
from ds4jax.unfiled import AnyType, Unfiled
from pallas_kernels import formats as kernels

__all__ = [
    "BF16", "E4M3", "F16", "F32", "FORMATS", "GGMLType", "IQ1_M", "IQ1_S", "IQ2_3B", "IQ2_S", "IQ2_XS", "IQ2_XXS",
    "IQ3_S", "IQ3_XXS", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1",
    "Q5_K", "Q6_K", "Q8_0", "READ_ONLY", "Quantized", "ReadOnly", "TQ1_0", "TQ2_0", "UNFILED", "WIDE", "WRITABLE",
]  # fmt: skip

# The formats that files are written in, and those that are read only.
WRITABLE = (F32, F16, BF16, Q8_0, Q4_K, Q2_K, IQ2_XXS, MXFP4)
READ_ONLY = (
    Q6_K, Q5_K, Q3_K, IQ4_XS, IQ4_NL, IQ3_XXS, IQ3_S, IQ2_XS, IQ2_S, IQ1_S, IQ1_M, Q5_1, Q5_0, Q4_1, Q4_0, TQ2_0,
    TQ1_0, NVFP4,
)  # fmt: skip

FORMATS: dict[AnyType, type[Quantized]] = {fmt.ggml_type: fmt for fmt in (*WRITABLE, *READ_ONLY)}
# Those that no file has.
UNFILED: dict[AnyType, type[Quantized]] = {Unfiled.E4M3: E4M3}

# Larger than what the file holds, and faster in the kernels of the experts: made at load, see `Settings.expert_layout`.
WIDE: dict[type[Quantized], type[Quantized]] = {IQ2_XXS: IQ2_3B}

for _format in (*FORMATS.values(), *UNFILED.values(), *WIDE.values()):
    kernels.register(_format.kernel_format())
