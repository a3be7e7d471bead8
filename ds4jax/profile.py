"""What the two releases of DeepSeek-V4-Flash were told of reasoning efforts, and which of them a file is. No JAX.

The releases differ in nothing else that is written in a prompt: ``original`` is the first one, ``0731`` its successor,
with what came after it. Only the first has an MTP head; the others have a DSpark drafter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from ds4jax.config import PREFIX
from ds4jax.errors import Ds4Error

ReleaseName = Literal["original", "0731"]

_EFFORT_1 = """\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""  # noqa: E501
_EFFORT_2_OPENING = "Reasoning Effort: Beyond maximum"
_EFFORT_2 = f"""\
{_EFFORT_2_OPENING} — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no assumption remains unchecked and no error remains undiscovered.

"""  # noqa: E501

THINK_MODES = ("off", "on", "low", "high", "max")
"""Off, on with the effort that the release has where none is asked for, and three levels of effort."""

EFFORTS = {
    "none": "off",
    "minimal": "low",
    "low": "low",
    "medium": "high",
    "high": "high",
    "xhigh": "high",
    "max": "max",
    "ultra": "max",
}
"""The efforts that clients ask for → think modes: the table of DeepSeek's own API, which knows 0731 alone."""

_PREFIXES = {"original": {"max": _EFFORT_1}, "0731": {"on": _EFFORT_1, "high": _EFFORT_1, "max": _EFFORT_2}}
MAX_EFFORT_CTX = 393216  # 384 K tokens: the context below which the original model's max is not to be used


def effort_prefix(think: str, profile: str = "original", ctx: int | None = None) -> str:
    """The instruction that sets the reasoning effort, or "".

    think: one of `THINK_MODES`. profile: a release's name. ctx: tokens that a sequence can hold: the original model
        wants `max` only with 384 K or more, and gets no instruction with less; 0731 has no such condition.
    Raises Ds4Error for any other `think`.
    """
    if think not in THINK_MODES:
        raise Ds4Error(f"think: found {think!r}, expected one of {', '.join(THINK_MODES)}")
    if profile == "original" and ctx is not None and ctx < MAX_EFFORT_CTX:
        return ""
    return _PREFIXES[profile].get(think, "")


class Profile(NamedTuple):
    """A release, and what showed that it is this one: the setting, a key of the metadata, or the file's name."""

    name: ReleaseName
    sign: str


def choose(setting: str, metadata: Mapping[str, Any], file_name: str) -> Profile:
    """Which release a model file is.

    setting: ``auto``, or the name of a release, which then counts whatever the file says.
    metadata, file_name: the GGUF's. With ``auto``, one `sign_of_0731` is enough; without any it is ``original``.
    Raises Ds4Error for the template of V4.1, a different format (`<｜DSML｜ calls>`, effort as a number).
    """
    template = metadata.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else ""
    if " calls>" in template or "range 1-100" in template:  # templates assemble the tag: '<' + dsml_token + ' calls>'
        raise Ds4Error("tokenizer.chat_template: found DeepSeek-V4.1's format, expected DeepSeek-V4's")
    if setting == "original" or setting == "0731":
        return Profile(setting, "setting")
    sign = sign_of_0731(metadata, file_name)
    return Profile("0731", sign) if sign else Profile("original", "no sign of 0731")


def sign_of_0731(metadata: Mapping[str, Any], file_name: str) -> str | None:
    """What shows that a main model is DeepSeek-V4-Flash-0731 or later: a key, or the file's name; None if nothing.

    Such are the text of its highest effort in the chat template; "0731", or "Vision-Exp", as a word in the metadata's
    version, name, basename or source, in those of the base model, or in the file's name; a drafter's keys, which files
    have that are converted with it; and as many compress ratios as layers and the drafter's stages.
    """
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and _EFFORT_2_OPENING in template:
        return "tokenizer.chat_template"
    said = {key: value for key, value in metadata.items() if _ORIGIN.match(key) and isinstance(value, str)}
    for sign, text in {**said, "file name": file_name}.items():
        if _MENTION.search(text):
            return sign
    ratios, n_layers = metadata.get(_RATIOS), metadata.get(PREFIX + "block_count")
    if isinstance(ratios, list | np.ndarray) and type(n_layers) is int and len(ratios) > n_layers + 1:  # 1: an MTP head
        return _RATIOS
    return next((key for key in metadata if _DRAFTER.match(key)), None)


_ORIGIN = re.compile(r"general\.((base_model\.\d+\.)?(version|name)|basename|source(\..*)?)$")
_MENTION = re.compile(r"(?<![0-9A-Za-z])(0731|vision[-_ ]exp)(?![0-9A-Za-z])", re.IGNORECASE)
_RATIOS = f"{PREFIX}attention.compress_ratios"
_DRAFTER = re.compile(rf"({re.escape(PREFIX)})?dspark[._]")
MARKER = {"general.version": "0731"}  # the metadata by which a file is known that was converted from 0731
