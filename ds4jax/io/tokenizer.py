"""Text to token ids and back: a GGUF file's byte-level BPE, run by the `tokenizers` package.

Ordinary text and control tokens never mix here: `encode_text` cannot produce a control token whatever it is given,
and a prompt that needs them states them as ids (`encode_segments`). `ds4jax.chat.template` builds such prompts.
"""

from __future__ import annotations

import codecs
import enum
import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from ds4jax.errors import Ds4Error, GGUFError


class Special(enum.Enum):
    """The control tokens of the chat format, by their spelling in the vocabulary. The bars are U+FF5C."""

    BOS = "<｜begin▁of▁sentence｜>"
    EOS = "<｜end▁of▁sentence｜>"
    USER = "<｜User｜>"
    ASSISTANT = "<｜Assistant｜>"
    THINK_OPEN = "<think>"
    THINK_CLOSE = "</think>"
    DSML = "｜DSML｜"
    LATEST_REMINDER = "<｜latest_reminder｜>"


_MODEL, _PRE = "gpt2", "joyai-llm"  # tokenizer.ggml.model and .pre: the only kind read here
_SAME_PRE = "deepseek-v3"  # llama.cpp's other name for the same patterns, which it once gave to this vocabulary, too
_NORMAL, _CONTROL = 1, 3  # values of tokenizer.ggml.token_type (llama.cpp's llama_token_type)

# What "joyai-llm" stands for: each pattern isolates its matches within the pieces the previous one left.
_SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥\u3040-\u309f\u30a0-\u30ff]+",  # Han, Hiragana, Katakana
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def _byte_chars() -> list[str]:
    """GPT-2's visible character for each byte: itself where it prints, otherwise the next one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(b if b in visible else next(others)) for b in range(256)]


_BYTE_CHARS = _byte_chars()
_BYTES = {c: b for b, c in enumerate(_BYTE_CHARS)}


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Cuts text into the pieces that BPE works on, and spells their bytes in `_BYTE_CHARS`."""
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in _SPLITS]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


class Tokenizer:
    """A byte-level BPE vocabulary: `encode_*` and `decode`.

    A token is *text* if its type is normal and it is spelled in GPT-2's byte characters; only those take part in BPE.
    All others are control tokens (or unused): they enter a prompt by id only, and decode to their literal spelling.

    Attributes: ``tokens`` (spelling by id), ``bos_id``, ``eos_id``, ``add_bos`` (whether `encode_raw` starts with BOS)
    and ``chat_template`` (the file's template, or None; `ds4jax.profile.choose` reads it).
    """

    def __init__(
        self,
        tokens: Sequence[str],
        merges: Sequence[str],
        token_types: Sequence[int],
        *,
        bos_id: int,
        eos_id: int,
        add_bos: bool = True,
        chat_template: str | None = None,
    ):
        """Takes the values of the GGUF keys (see `from_metadata`); raises GGUFError where they contradict."""
        self.tokens, self.bos_id, self.eos_id = list(tokens), bos_id, eos_id
        self.add_bos, self.chat_template = add_bos, chat_template
        self._merges, self._types = list(merges), list(token_types)

        if len(token_types) != len(tokens):
            raise _error("token_type", f"{len(token_types)} values", f"one for each of the {len(tokens)} tokens")
        ids = {token: i for i, token in enumerate(tokens)}
        if len(ids) != len(tokens):
            token, n = Counter(tokens).most_common(1)[0]
            raise _error("tokens", f"{token!r} {n} times", "no duplicates")
        for key, value in (("bos_token_id", bos_id), ("eos_token_id", eos_id)):
            if not 0 <= value < len(tokens):
                raise _error(key, value, f"an id below the vocabulary size, {len(tokens)}")

        spellings = {special.value for special in Special}  # never text, even where a file types them as normal
        self._text = {
            token: i
            for token, i in ids.items()
            if token_types[i] == _NORMAL and token and token not in spellings and _BYTES.keys() >= set(token)
        }
        self._control = {token: i for token, i in ids.items() if token not in self._text}
        for byte, char in enumerate(_BYTE_CHARS):
            if char not in self._text:
                raise _error("tokens", f"no normal token {char!r} for byte 0x{byte:02x}", "all 256 bytes")
        pairs = []
        for i, merge in enumerate(merges):
            first, _, second = merge.partition(" ")
            pairs.append((first, second))
            if not {first, second, first + second} <= self._text.keys():
                raise _error(
                    f"merges[{i}]", repr(merges[i]), "two normal tokens, divided by a space, that make up a third one"
                )
        self._bpe = tokenizers.Tokenizer(models.BPE(self._text, pairs))
        self._bpe.pre_tokenizer = _pre_tokenizer()

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer embedded in a GGUF file.

        metadata: the file's keys and values; arrays may be sequences or numpy arrays. Read are, with the prefix
            ``tokenizer.ggml.``: model, pre, tokens, merges, token_type, bos_token_id, eos_token_id, add_bos_token
            (default true); and ``tokenizer.chat_template`` (optional).
        Raises GGUFError naming the key where one is missing, of the wrong type, unsupported or contradictory.
        """

        def get(key: str, kind: type, many: bool = False, **default) -> Any:
            name = "tokenizer." + key
            if name not in metadata:
                if default:
                    return default["default"]
                raise GGUFError(f"metadata key {name} is missing: the file has no usable tokenizer")
            value = metadata[name]
            value = value.tolist() if hasattr(value, "tolist") else value  # numpy arrays and scalars
            values = value if many and isinstance(value, list | tuple) else [value]
            if (many and values is not value) or any(type(v) is not kind for v in values):
                what = f"an array of {kind.__name__}" if many else kind.__name__
                raise GGUFError(f"metadata key {name}: found {_describe(value)}, expected {what}")
            return value

        for key, known in (("ggml.model", (_MODEL,)), ("ggml.pre", (_PRE, _SAME_PRE))):
            if (found := get(key, str)) not in known:
                expected = " or ".join(map(repr, known))
                raise GGUFError(f"metadata key tokenizer.{key}: found {found!r}, expected {expected}")
        return cls(
            get("ggml.tokens", str, many=True),
            get("ggml.merges", str, many=True),
            get("ggml.token_type", int, many=True),
            bos_id=get("ggml.bos_token_id", int),
            eos_id=get("ggml.eos_token_id", int),
            add_bos=get("ggml.add_bos_token", bool, default=True),
            chat_template=get("chat_template", str, default=None),
        )

    def to_metadata(self) -> dict[str, Any]:
        """The GGUF keys and values from which `from_metadata` makes this tokenizer; for a file writer."""
        metadata = {
            "tokenizer.ggml.model": _MODEL,
            "tokenizer.ggml.pre": _PRE,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.merges": self._merges,
            "tokenizer.ggml.token_type": self._types,
            "tokenizer.ggml.bos_token_id": self.bos_id,
            "tokenizer.ggml.eos_token_id": self.eos_id,
            "tokenizer.ggml.add_bos_token": self.add_bos,
        }
        return metadata if self.chat_template is None else metadata | {"tokenizer.chat_template": self.chat_template}

    @property
    def vocab_size(self) -> int:
        """Number of ids, control and unused tokens included."""
        return len(self.tokens)

    @property
    def control_ids(self) -> set[int]:
        """The ids that no text encodes to."""
        return set(self._control.values())

    def special(self, token: Special | str) -> int:
        """The id of a control token, given as a `Special` or its name (``"user"``, ``"think_open"``, ...).

        Raises Ds4Error if the vocabulary lacks it.
        """
        token = token if isinstance(token, Special) else Special[token.upper()]
        if token.value not in self._control:
            raise Ds4Error(
                f"control token {token.name.lower()}: found no {token.value!r} among the vocabulary's {self.vocab_size}"
                " tokens, expected it for a chat prompt (a raw prompt needs none)"
            )
        return self._control[token.value]

    def encode_text(self, text: str) -> list[int]:
        """Ids of ordinary text: no BOS, and never a control token. Lone surrogates count as U+FFFD."""
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can carry lone surrogates; the UTF-16 round trip replaces them
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        # Unlike `encode`, this lets other threads run: a long prompt takes a while, and others are being answered.
        return self._bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_spelled(self, text: str) -> list[int]:
        """Ids of text in which control tokens are spelled: for counting and looking, never for what a user wrote."""
        parts = self._spellings.split(text)
        return self.encode_segments(self._control[part] if i % 2 else part for i, part in enumerate(parts) if part)

    @functools.cached_property
    def _spellings(self) -> re.Pattern[str]:
        longest_first = sorted(filter(None, self._control), key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode_raw(self, text: str) -> list[int]:
        """Ids of a prompt without a chat template: BOS (unless the file says add_bos_token = false), then the text."""
        return [self.bos_id] * self.add_bos + self.encode_text(text)

    def encode_segments(self, segments: Iterable[str | int]) -> list[int]:
        """Ids of a prompt made of plain text (str) and trusted token ids (int).

        Neighbouring texts are joined before BPE, which gives the ids that the whole prompt, as one string, would have.
        """
        ids: list[int] = []
        for is_text, group in itertools.groupby(segments, lambda segment: isinstance(segment, str)):
            run: list[Any] = list(group)
            ids += self.encode_text("".join(run)) if is_text else run
        return ids

    def id_to_bytes(self, id: int) -> bytes:
        """The bytes a token stands for, which may be part of a UTF-8 sequence; a control token's are its spelling."""
        if not 0 <= id < self.vocab_size:
            raise Ds4Error(f"token id: found {id}, expected 0 to {self.vocab_size - 1}")
        token = self.tokens[id]
        return bytes(_BYTES[c] for c in token) if token in self._text else token.encode("utf-8", "replace")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.id_to_bytes, ids)).decode("utf-8", "replace")

    def piece(self, id: int) -> str:
        """One token in visible form, see `pieces`."""
        return self.pieces([id])

    def pieces(self, ids: Iterable[int]) -> str:
        """Tokens in visible form, for listings: partial UTF-8 and unprintable characters as escapes."""
        text = b"".join(map(self.id_to_bytes, ids)).decode("utf-8", "backslashreplace")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class StreamDecoder:
    """Turns ids into text one by one, holding back an incomplete UTF-8 sequence until it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that this id completes; often empty in the middle of a character."""
        return self._utf8.decode(self._tokenizer.id_to_bytes(id))

    def flush(self) -> str:
        """What was held back at the end of the stream, as U+FFFD; the decoder is then fresh."""
        return self._utf8.decode(b"", final=True)


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A new vocabulary for `texts`, laid out like `byte_tokenizer`'s. The same texts give the same one.

    vocab_size: ids in all, with the 256 bytes and the control tokens; fewer if the texts are too short for that.
    """
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = _pre_tokenizer()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(Special), initial_alphabet=_BYTE_CHARS, show_progress=False, special_tokens=[]
        ),
    )
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    return _lay_out(merges)


def _lay_out(merges: Sequence[tuple[str, str]], vocab_size: int = 0) -> Tokenizer:
    """Ids 0 to 255 are the byte values; then come the merged tokens, then `Special`, then unused ones."""
    text = list(dict.fromkeys([*_BYTE_CHARS, *map("".join, merges)]))  # two merges may make one token
    tokens = text + [special.value for special in Special]
    tokens += [f"<unused {i}>" for i in range(len(tokens), vocab_size)]
    types = [_NORMAL] * len(text) + [_CONTROL] * (len(tokens) - len(text))
    bos, eos = (tokens.index(special.value) for special in (Special.BOS, Special.EOS))
    return Tokenizer(tokens, [" ".join(pair) for pair in merges], types, bos_id=bos, eos_id=eos)


def _error(key: str, found: object, expected: str) -> GGUFError:
    return GGUFError(f"metadata key tokenizer.ggml.{key}: found {found}, expected {expected}")


def _describe(value: object) -> str:
    """A wrong value for an error message: shortened, and an array by its length and types."""
    if isinstance(value, list | tuple):
        return f"{len(value)} values of type {' and '.join(sorted({type(v).__name__ for v in value})) or 'nothing'}"
    return f"{type(value).__name__} {value!r:.80}"


_SAMPLE = """\
The quick brown fox jumps over the lazy dog, and then the other animals of the forest come to see what is going on.
There is no reason for this text other than to have the most common letters, words and endings of English in it:
that, this, with, from, which, would, there, their, have, not, are, was, were, will, can, into, more, about, question.
A language model reads a prompt, one token after another, and predicts the next token from everything before it.
The answer to the question is in the context: attention over the window, and over the compressed rows, decides.

def forward(params, cache, tokens):
    for layer in range(len(params.layers)):
        hidden = attention(hidden, params.layers[layer], cache[layer])
        hidden = hidden + experts(hidden, params.layers[layer])
    return logits(params, hidden), cache

class Model:
    def __init__(self, config):
        self.config = config
        self.return_value = None

if __name__ == "__main__":
    import sys
    for line in sys.stdin:
        print(line.strip(), len(line), line == "", line != "end")
"""


_SAMPLE_MERGES = 120  # makes 384 tokens in all


def byte_tokenizer(vocab_size: int = 0) -> Tokenizer:
    """A small complete tokenizer for tests and models of random weights: 384 ids, the same on every machine.

    Ids 0 to 255 are the byte values; then come merges learned from an embedded sample of English and Python; the last
    are `Special`, spelled as in the real vocabulary. vocab_size: as many ids at least, those at the end unused.
    """
    pieces = Counter(tuple(piece) for piece, _ in _pre_tokenizer().pre_tokenize_str(_SAMPLE))
    merges: list[tuple[str, str]] = []
    while len(merges) < _SAMPLE_MERGES:
        pairs: Counter[tuple[str, str]] = Counter()
        for piece, n in pieces.items():
            for pair in itertools.pairwise(piece):
                pairs[pair] += n
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        pieces = Counter({_merge(piece, best): n for piece, n in pieces.items()})
    return _lay_out(merges, vocab_size)


def _merge(piece: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """`piece` with every occurrence of `pair`, from the left, made one token."""
    out: list[str] = []
    for token in piece:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return tuple(out)
