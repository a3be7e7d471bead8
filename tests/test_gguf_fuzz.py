"""Damaged model files: whatever the header claims, opening one succeeds or raises GGUFError, in bounded memory."""

import tracemalloc

import numpy as np
import pytest
from test_gguf import SMALL, blank

from ds4jax.errors import GGUFError
from ds4jax.io.checkpoint import open_checkpoint
from ds4jax.io.gguf import GGUFFile, Header, write_gguf
from ds4jax.model.tensors import mtp_table, tensor_table

MEMORY_LIMIT = 16 << 20  # the file is 0.2 MB and its header parses to less than 1 MB


class Tracing(Header):
    """Notes where each number of the header is stored: (offset, size) of structure and of metadata values."""

    def __init__(self, buf):
        self.fields, self.values = [], []
        super().__init__(buf, len(buf))

    def _u32(self, what):
        self.fields.append((self.pos, 4))
        return super()._u32(what)

    def _u64(self, what):
        self.fields.append((self.pos, 8))
        return super()._u64(what)

    def _strings(self, count, what):
        self.fields.append((self.pos, 8))
        return super()._strings(count, what)

    def _numbers(self, value_type, count, what):
        self.values.append((self.pos, 4))
        return super()._numbers(value_type, count, what)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small model with an MTP head and a tokenizer: (path for mutants, bytes, header size, trace)."""
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    tokens = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(40)], "tokenizer.ggml.token_type": [1] * 40}
    tensors = blank(tensor_table(SMALL) + mtp_table(SMALL, "mtp"))
    write_gguf(path, SMALL.to_metadata() | tokens, tensors.items())
    with GGUFFile.open(path) as file:
        start = min(t.offset for t in file.tensors.values())
        trace = Tracing(file._buf)
    data = path.read_bytes()
    assert len(trace.fields) > 1000 and len(trace.values) > 30 and opens(path, data)
    return path, data, start, trace


def opens(path, data):
    """Whether the bytes open as a model; fails the test on any error but GGUFError, or on too much memory."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        open_checkpoint(path).file.close()
        return True
    except GGUFError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY_LIMIT


def test_flipped_bytes(sound):
    """One to three random bytes of the header changed. Most files break; those where only a name of no meaning or a
    value within bounds changed still open."""
    path, data, start, _ = sound
    rng = np.random.default_rng(0)
    opened = 0
    for _ in range(400):
        mutant = bytearray(data)
        for at in rng.integers(0, start, rng.integers(1, 4)):
            mutant[at] ^= rng.integers(1, 256)
        opened += opens(path, bytes(mutant))
    assert opened < 200


def test_truncations(sound):
    """Cut at each byte of the fixed header, before, in and after numbers of the rest, and in the data."""
    path, data, start, trace = sound
    rng = np.random.default_rng(1)
    ends = {at + d for at, size in rng.permutation(trace.fields)[:120].tolist() for d in (0, 1, size)}
    ends |= {*range(33), start - 1, start, start + 1, len(data) // 2, len(data) - 33}
    for end in sorted(ends):
        assert not opens(path, data[:end]), end


EXTREMES = (0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)


def with_number(data, at, size, value):
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


def test_structure_overwritten(sound):
    """Any count, length, type, dimension or offset set to an extreme value. Only 0 and 1 can be what it was before, or
    another type."""
    path, data, _, trace = sound
    rng = np.random.default_rng(2)
    for at, size in rng.permutation(trace.fields)[:250].tolist():
        value = EXTREMES[rng.integers(len(EXTREMES))] % 2 ** (8 * size)
        assert not opens(path, with_number(data, at, size, value)) or value <= 1


def test_values_overwritten(sound):
    """Any metadata value set to an extreme one: a model of absurd size is refused before memory is spent on it."""
    path, data, _, trace = sound
    opened = sum(opens(path, with_number(data, at, size, v)) for at, size in trace.values for v in EXTREMES[:4])
    assert opened < 2 * len(trace.values)  # 1 where no shape depends on it, and keys that are not read


def test_splices(sound):
    """Pieces of the header removed, doubled or moved elsewhere, so that everything behind them is out of step."""
    path, data, start, _ = sound
    rng = np.random.default_rng(3)
    for _ in range(200):
        a, b, to = np.sort(rng.integers(24, start, 3))
        b = min(b, a + int(rng.integers(1, 200)))
        removed, doubled = data[:a] + data[b:], data[:b] + data[a:]
        moved = data[:a] + data[b:to] + data[a:b] + data[to:]
        opens(path, (removed, doubled, moved)[rng.integers(3)])
