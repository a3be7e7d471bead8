"""Weight formats, one file each: planes, formula, random blocks, quantizer, and what the kernels need to decode them.

Importing this package makes every format known to the kernels. A format is added by its file and by its name below.
"""

from ds4jax.formats.base import GGMLType, Quantized
from ds4jax.formats.dense import BF16, F16, F32
from ds4jax.formats.iq2_xxs import IQ2_XXS
from ds4jax.formats.mxfp4 import MXFP4
from ds4jax.formats.q2_k import Q2_K
from ds4jax.formats.q4_k import Q4_K
from ds4jax.formats.q8_0 import Q8_0
from pallas_kernels import formats as kernels

__all__ = ["BF16", "F16", "F32", "FORMATS", "IQ2_XXS", "MXFP4", "Q2_K", "Q4_K", "Q8_0", "GGMLType", "Quantized"]

FORMATS: dict[GGMLType, type[Quantized]] = {f.ggml_type: f for f in (F32, F16, BF16, Q8_0, Q4_K, Q2_K, IQ2_XXS, MXFP4)}

for _format in FORMATS.values():
    kernels.register(_format.kernel_format())
