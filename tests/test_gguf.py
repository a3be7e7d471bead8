"""The GGUF container, the config read from its metadata, and the check of a model's tensors."""

import dataclasses
import math
import os
import re
import shutil
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGUFValueType
from gguf import GGMLQuantizationType as T

from ds4jax.config import ModelConfig
from ds4jax.errors import GGUFError
from ds4jax.io.checkpoint import open_checkpoint, open_mtp
from ds4jax.io.gguf import DTYPES, TYPES, GGUFFile, TensorData, Typed, write_gguf
from ds4jax.io.synthetic import SHAPES, synthetic_config
from ds4jax.model.tensors import mtp_table, tensor_table

V = GGUFValueType


def fails(message: str):
    """Expects a GGUFError of one line that contains `message`."""
    return pytest.raises(GGUFError, match=f"^[^\n]*{re.escape(message)}[^\n]*$")


def n_bytes(shape, qtype):
    block, size = GGML_QUANT_SIZES[qtype]
    return math.prod(shape) // block * size


def random_tensor(rng, shape, qtype):
    data = rng.integers(0, 256, n_bytes(shape, qtype), np.uint8)
    return TensorData(shape, qtype, lambda: data), data


# -- container: what is written is what is read, by us and by the gguf package -----------------------------------------


@pytest.fixture
def every_type(tmp_path):
    """A file with one tensor of each type, of one to four dimensions, and their bytes."""
    rng = np.random.default_rng(0)
    tensors, data = [], {}
    for i, qtype in enumerate(TYPES):
        name, shape = f"t.{qtype.name}", (2, 3, 5, 256)[3 - i % 4 :]
        tensor, data[name] = random_tensor(rng, shape, qtype)
        tensors.append((name, tensor))
    path = tmp_path / "types.gguf"
    write_gguf(path, {"general.architecture": "test"}, tensors)
    return path, dict(tensors), data


def test_tensors_round_trip(every_type):
    path, tensors, data = every_type
    with GGUFFile.open(path) as file:
        assert list(file.tensors) == list(tensors)
        for name, tensor in tensors.items():
            info = file.tensors[name]
            assert (info.shape, info.type, info.nbytes) == (tensor.shape, tensor.type, len(data[name]))
            raw = file.raw(name)
            assert raw.shape == (*tensor.shape[:-1], len(data[name]) // math.prod(tensor.shape[:-1]))
            assert raw.tobytes() == data[name].tobytes()
            if tensor.type in DTYPES:
                values = file.array(name)
                assert values.shape == tensor.shape and values.tobytes() == data[name].tobytes()
            else:
                with fails(f"tensor '{name}': found type {tensor.type.name}, expected one of F32, F16, BF16, I32"):
                    file.array(name)
        assert file.array("t.BF16").dtype == ml_dtypes.bfloat16
        with fails("tensor 'nope': not in the file"):
            file.raw("nope")
        del raw, values


def test_gguf_package_reads_our_tensors(every_type):
    path, tensors, data = every_type
    reader = gguf.GGUFReader(path)
    assert [t.name for t in reader.tensors] == list(tensors)
    for t in reader.tensors:
        assert tuple(t.shape.tolist()[::-1]) == tensors[t.name].shape and t.tensor_type == tensors[t.name].type
        assert t.data.tobytes() == data[t.name].tobytes()


NUMBERS = {
    V.UINT8: [0, 255],
    V.INT8: [-128, 127],
    V.UINT16: [0, 65535],
    V.INT16: [-32768, 32767],
    V.UINT32: [0, 2**32 - 1],
    V.INT32: [-(2**31), 2**31 - 1],
    V.UINT64: [0, 2**64 - 1],
    V.INT64: [-(2**63), 2**63 - 1],
    V.FLOAT32: [-0.5, 3.0],
    V.FLOAT64: [0.1, -1e300],
    V.BOOL: [True, False],
    V.STRING: ["", "naïve 漢字 🙂"],
}
INFERRED = [
    (True, V.BOOL, None),
    (7, V.UINT32, None),
    (-7, V.INT32, None),
    (2**40, V.UINT64, None),
    (-(2**40), V.INT64, None),
    (0.5, V.FLOAT32, None),
    ("text", V.STRING, None),
    ([True, False], V.ARRAY, V.BOOL),
    ([0, 4, 128], V.ARRAY, V.INT32),
    ([2**31], V.ARRAY, V.UINT32),
    ([2**63, 0], V.ARRAY, V.UINT64),
    ((-1, 2**31), V.ARRAY, V.INT64),
    ([1, 0.5], V.ARRAY, V.FLOAT32),
    (["a", "b"], V.ARRAY, V.STRING),
    (np.arange(3, dtype=np.uint8), V.ARRAY, V.UINT8),
    (np.zeros(0, np.float64), V.ARRAY, V.FLOAT64),
    (np.int64(5), V.INT64, None),
    (Typed([], V.STRING), V.ARRAY, V.STRING),
    (Typed(5, V.FLOAT64), V.FLOAT64, None),
]


def plain(value):
    value = value.value if isinstance(value, Typed) else value
    return (
        value.tolist() if isinstance(value, np.ndarray | np.generic) else list(value) if type(value) is tuple else value
    )


def test_metadata_round_trip(tmp_path):
    path = tmp_path / "keys.gguf"
    keys = {f"scalar.{t.name}.{i}": Typed(v, t) for t, values in NUMBERS.items() for i, v in enumerate(values)}
    keys |= {f"array.{t.name}": Typed(values, t) for t, values in NUMBERS.items()}
    keys |= {f"inferred.{i}": value for i, (value, _, _) in enumerate(INFERRED)}
    write_gguf(path, keys, [])
    with GGUFFile.open(path) as file:
        assert file.version == 3 and list(file.metadata) == list(keys)
        for key, value in keys.items():
            found = file.metadata[key]
            assert plain(found) == plain(value) and type(plain(found)) in (bool, int, float, str, list), key
    fields = gguf.GGUFReader(path).fields
    for key, value in keys.items():
        if plain(value) != []:  # which the gguf package cannot show
            assert fields[key].contents() == plain(value), key
    for i, (_, outer, element) in enumerate(INFERRED):
        if element is None or len(plain(INFERRED[i][0])):
            assert fields[f"inferred.{i}"].types == [outer] + [element] * (element is not None)


def test_reads_what_the_gguf_package_writes(tmp_path):
    path, rng = tmp_path / "theirs.gguf", np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "deepseek4")
    writer.add_uint32("a.int", 7)
    writer.add_float64("a.float", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_array("a.strings", ["x", "ÿ"])
    writer.add_array("a.floats", [1.0, 2.0])
    writer.add_custom_alignment(64)
    values = rng.standard_normal((3, 4, 256)).astype(np.float32)
    writer.add_tensor("f32", values)
    writer.add_tensor("q8", gguf.quants.quantize(values, T.Q8_0), raw_dtype=T.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(path) as file:
        assert file.metadata["general.architecture"] == "deepseek4"
        assert {k: plain(v) for k, v in file.metadata.items() if k.startswith("a.")} == {
            "a.int": 7,
            "a.float": 0.1,
            "a.bool": True,
            "a.strings": ["x", "ÿ"],
            "a.floats": [1.0, 2.0],
        }
        assert np.array_equal(file.array("f32"), values)
        assert np.array_equal(file.raw("q8"), gguf.quants.quantize(values, T.Q8_0))


def test_a_real_vocabulary_opens_fast(tmp_path):
    path = tmp_path / "vocabulary.gguf"
    keys = {
        "tokenizer.ggml.tokens": [f"Ġtoken{i}" for i in range(129280)],
        "tokenizer.ggml.merges": [f"Ġ{i} x" for i in range(128000)],
        "tokenizer.ggml.token_type": np.ones(129280, np.int32),
    }
    write_gguf(path, keys, [])
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with GGUFFile.open(path) as file:
            assert file.metadata["tokenizer.ggml.merges"][-1] == "Ġ127999 x"
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0  # 0.1 s alone on one core; the best of three, as CI machines stall


# -- mapping: no copies, bounded residency -----------------------------------------------------------------------------


def resident_bytes(path):
    """Bytes of this process's mapping of `path` that are in memory, from the kernel."""
    mapping = Path("/proc/self/smaps").read_text().split(f" {path}\n")[1]
    found = re.search(r"^Rss: +(\d+) kB", mapping, re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def test_views_are_not_copies_and_pages_can_be_dropped(tmp_path):
    path, size = tmp_path / "big.gguf", 16 << 20
    data = np.random.default_rng(2).integers(0, 256, size, np.uint8)
    shape = (size // 1024, 256)
    write_gguf(
        path, {}, [("a", TensorData(shape, T.F32, lambda: data)), ("b", TensorData((8,), T.F32, lambda: data[:32]))]
    )
    with GGUFFile.open(path) as file:
        tracemalloc.start()
        view = file.raw("a")
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
        tracemalloc.stop()
        assert not view.flags.writeable and np.shares_memory(view, file.array("a"))
        checksum = int(view.sum(dtype=np.int64))
        assert resident_bytes(path) >= size
        file.drop_pages("a", 0, size // 2)
        assert resident_bytes(path) <= size // 2 + (1 << 16)
        file.drop_pages("a")
        assert resident_bytes(path) <= 1 << 16
        assert int(view.sum(dtype=np.int64)) == checksum == int(data.sum(dtype=np.int64))
    assert view[0, 0] == data[0]  # closed, but mapped as long as a view lives


# -- writer: atomic, streaming, strict ---------------------------------------------------------------------------------


def test_same_bytes_every_time(every_type, tmp_path):
    path, tensors, _ = every_type
    write_gguf(tmp_path / "again.gguf", {"general.architecture": "test"}, iter(tensors.items()))
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_tensors_stream(tmp_path):
    """Pieces are written as they come: 32 MiB pass through with little memory, in order, each tensor asked for once."""
    piece, order = np.arange(1 << 18, dtype=np.float32), []

    def pieces(i):
        order.append(i)
        return (piece + i for _ in range(16))

    tensors = [(f"t{i}", TensorData((16, len(piece)), T.F32, lambda i=i: pieces(i))) for i in range(2)]
    tracemalloc.start()
    write_gguf(tmp_path / "x.gguf", {}, tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20 and order == [0, 1]
    with GGUFFile.open(tmp_path / "x.gguf") as file:
        assert np.array_equal(file.array("t1")[15], piece + 1)


def crash():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (crash, KeyboardInterrupt),
        (lambda: np.zeros(255, np.float32), GGUFError),
        (lambda: np.zeros(257, np.float32), GGUFError),
        (lambda: np.zeros(256, np.float64), GGUFError),
    ],
)
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, data, error):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")
    good = TensorData((1024,), T.F32, lambda: np.zeros(1024, np.float32))
    with pytest.raises(error):
        write_gguf(path, {}, [("a", good), ("b", TensorData((256,), T.F32, data)), ("c", good)])
    assert os.listdir(tmp_path) == ["m.gguf"] and path.read_bytes() == b"old"


def zeros(shape, qtype):
    return TensorData(shape, qtype, lambda: np.zeros(n_bytes(shape, qtype), np.uint8))


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"k": Typed(256, V.UINT8)}, [], "key 'k': found 256, expected UINT8"),
        ({"k": Typed([1.5], V.INT32)}, [], "key 'k': found [1.5], expected INT32"),
        ({"k": Typed(1e39, V.FLOAT32)}, [], "key 'k': found 1e+39, expected FLOAT32"),
        ({"k": Typed(1, V.BOOL)}, [], "found 1, expected BOOL"),
        ({"k": Typed("a", V.INT8)}, [], "found 'a', expected INT8"),
        ({"k": Typed(1, V.STRING)}, [], "found 1, expected STRING"),
        ({"k": Typed([[1]], V.INT8)}, [], "found [[1]], expected INT8"),
        ({"k": Typed([1], V.ARRAY)}, [], "found [1], expected ARRAY"),
        ({"k": -(2**64)}, [], "found -18446744073709551616, expected BOOL, UINT32, INT32, UINT64, INT64, STRING"),
        ({"k": []}, [], "found [], expected Typed(value, element type), as it is empty"),
        ({"k": ["a", 1]}, [], "found ['a', 1], expected BOOL, INT32, UINT32, UINT64, INT64, STRING"),
        ({"k": None}, [], "found None, expected BOOL"),
        ({"k": np.zeros((1, 2), np.int32)}, [], "found [[0, 0]], expected INT32"),
        ({"k": "\ud800"}, [], "expected text that UTF-8 can encode"),
        ({"general.alignment": 48}, [], "key 'general.alignment': found 48, expected a power of two"),
        ({}, [("t", zeros((1,), T.F32))] * 2, "tensor 't': given twice"),
        (
            {},
            [("t", zeros((100,), T.Q8_0))],
            "tensor 't': found rows of 100 values, expected a multiple of 32 for Q8_0",
        ),
        ({}, [("t", zeros((), T.F32))], "tensor 't': shape ()"),
        ({}, [("t", zeros((0, 4), T.F32))], "tensor 't': shape (0, 4)"),
        ({}, [("t", zeros((1,) * 5, T.F32))], "tensor 't': shape (1, 1, 1, 1, 1)"),
        ({}, [("t", zeros((256,), T.Q8_K))], "tensor 't': shape (256,)"),
    ],
)
def test_writer_refuses(tmp_path, metadata, tensors, message):
    with fails(message):
        write_gguf(tmp_path / "x.gguf", metadata, tensors)
    assert os.listdir(tmp_path) == []


def test_writer_refuses_a_disk_without_room(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
    tensor = TensorData((1000,), T.F32, lambda: pytest.fail("made before there was room"))
    with fails("x.gguf: found 1,000 bytes free on its disk, expected 4,0"):
        write_gguf(tmp_path / "x.gguf", {}, [("t", tensor)])
    assert os.listdir(tmp_path) == []


def test_writer_makes_the_same_file_with_threads(tmp_path):
    def tensor(i):
        return TensorData((3, 5 * i), T.F32, lambda: (np.full((1, 5 * i), i + k, np.float32) for k in range(3)))

    tensors = [(f"t{i}", tensor(i)) for i in range(1, 30)]
    for threads in (1, 4):
        write_gguf(tmp_path / f"{threads}.gguf", {"a": 1}, tensors, threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "4.gguf").read_bytes()


def test_writer_names_an_unwritable_path(tmp_path):
    with fails("missing/x.gguf: cannot be written: No such file or directory"):
        write_gguf(tmp_path / "missing" / "x.gguf", {}, [])


# -- reader: each kind of damage has its message -----------------------------------------------------------------------


def u32(n):
    return struct.pack("<I", n)


def u64(n):
    return struct.pack("<Q", n)


def text(s):
    s = s if isinstance(s, bytes) else s.encode()
    return u64(len(s)) + s


def key(name, value_type, payload):
    return text(name) + u32(value_type) + payload


def record(name: str | bytes = "t", dims=(8,), qtype=0, offset=0):
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(qtype) + u64(offset)


def container(keys=(), records=(), data=b"", version=3, n_keys=None, n_tensors=None, magic=b"GGUF"):
    n_keys, n_tensors = len(keys) if n_keys is None else n_keys, len(records) if n_tensors is None else n_tensors
    head = magic + u32(version) + u64(n_tensors) + u64(n_keys) + b"".join(keys) + b"".join(records)
    return head + bytes(-len(head) % 32) + data


HUGE = 2**64 - 1
DAMAGED = {
    "magic": (container(magic=b"GGML"), "magic: found b'GGML', expected b'GGUF'"),
    "version": (container(version=1), "version: found 1, expected 2 or 3"),
    "big-endian": (container(version=3 << 24), "(a big-endian file?)"),
    "short header": (container()[:20], "key count: needs at least 8 bytes at offset 16, found 4"),
    "key count": (container(n_keys=HUGE), f"{HUGE} keys: needs at least"),
    "tensor count": (container(n_tensors=HUGE), f"{HUGE} tensors: needs at least"),
    "key length": (container([u64(HUGE) + bytes(8)]), "name of key 0: string 0 ends at byte"),
    "key utf-8": (
        container([key(b"\xff\xfe", V.BOOL, b"\1")]),
        r"name of key 0: string 0 is b'\xff\xfe', expected UTF-8",
    ),
    "key twice": (container([key("k", V.BOOL, b"\1")] * 2), "key 'k': found twice, expected once"),
    "value type": (container([key("k", 13, u64(0))]), "key 'k': found value type 13, expected one of 0 to 12"),
    "bool": (container([key("k", V.BOOL, b"\2")]), "key 'k': found the boolean 2, expected 0 or 1"),
    "bools": (container([key("k", V.ARRAY, u32(V.BOOL) + u64(2) + b"\1\3")]), "key 'k': found the boolean 3"),
    "string length": (container([key("k", V.STRING, u64(HUGE))]), "key 'k': string 0 ends at byte"),
    "string utf-8": (container([key("k", V.STRING, text(b"a\x80"))]), r"key 'k': string 0 is b'a\x80', expected UTF-8"),
    "array length": (container([key("k", V.ARRAY, u32(V.INT32) + u64(1 << 62))]), "key 'k': needs at least"),
    "strings length": (container([key("k", V.ARRAY, u32(V.STRING) + u64(1 << 61))]), "key 'k': needs at least"),
    "string in array": (
        container([key("k", V.ARRAY, u32(V.STRING) + u64(2) + text("a") + u64(999))]),
        "key 'k': string 1 ends at byte",
    ),
    "nested array": (
        container([key("k", V.ARRAY, u32(V.ARRAY) + u64(1) + u32(V.INT8) + u64(0))]),
        "key 'k': found an array of arrays",
    ),
    "alignment": (container([key("general.alignment", V.UINT32, u32(24))]), "key 'general.alignment': found 24"),
    "alignment 4": (container([key("general.alignment", V.UINT32, u32(4))]), "expected a power of two of at least 8"),
    "alignment type": (container([key("general.alignment", V.STRING, text("32"))]), "general.alignment': found '32'"),
    "split": (container([key("split.count", V.UINT16, b"\3\0")]), "key 'split.count': found 3, expected 1; merge"),
    "tensor utf-8": (container([], [record(b"\xc0")]), "name of tensor 0: string 0 is"),
    "tensor twice": (container([], [record()] * 2, bytes(32)), "tensor 't': found twice, expected once"),
    "no dims": (container([], [record(dims=())], bytes(64)), "tensor 't': found 0 dimensions, expected 1 to 4"),
    "five dims": (container([], [record(dims=[1] * 5)], bytes(64)), "tensor 't': found 5 dimensions"),
    "zero dim": (container([], [record(dims=(8, 0))], bytes(64)), "tensor 't': found shape (0, 8), expected no zero"),
    "overflow": (
        container([], [record(dims=(1 << 32, 1 << 32))], bytes(64)),
        "tensor 't': shape (4294967296, 4294967296)",
    ),
    "type": (
        container([], [record(qtype=15)], bytes(64)),
        "tensor 't': found type Q8_K, expected one of F32, F16, BF16, Q8_0, Q4_K, Q2_K, IQ2_XXS, MXFP4, Q6_K,",
    ),
    "unknown type": (container([], [record(qtype=999)], bytes(64)), "tensor 't': found type 999, expected one of F32"),
    "blocks": (
        container([], [record(dims=(48,), qtype=T.Q8_0)], bytes(64)),
        "tensor 't': found rows of 48 values, expected a multiple of 32 for Q8_0",
    ),
    "offset": (container([], [record(offset=8)], bytes(64)), "tensor 't': found offset 8, expected a multiple of 32"),
    "truncated": (
        container([], [record()], bytes(31)),
        "tensor 't': shape (8,) in F32 ends at byte 96, found a file of 95",
    ),
    "far offset": (container([], [record(offset=1 << 63)], bytes(64)), "tensor 't': shape (8,) in F32 ends at byte"),
    "overlap": (
        container([], [record("a", (16,)), record("b", (8,), offset=32)], bytes(64)),
        "tensor 'b': overlaps tensor 'a'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_reader_refuses(tmp_path, damage):
    data, message = DAMAGED[damage]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with fails(message) as error:
        GGUFFile.open(path)
    assert str(error.value).startswith(f"{path}: ")


def test_reader_accepts_the_undamaged(tmp_path):
    """The builder above makes sound files, of both versions, when asked to."""
    path = tmp_path / "x.gguf"
    for version in (2, 3):
        keys = [key("k", V.ARRAY, u32(V.STRING) + u64(1) + text("é")), key("general.alignment", V.UINT32, u32(8))]
        path.write_bytes(container(keys, [record("a"), record("b", (4, 2), offset=32)], bytes(64), version))
        with GGUFFile.open(path) as file:
            assert file.version == version and file.metadata["k"] == ["é"]
            assert file.tensors["b"].shape == (2, 4)


def test_what_is_not_a_file(tmp_path):
    with fails("none.gguf: cannot be opened: No such file or directory"):
        GGUFFile.open(tmp_path / "none.gguf")
    with fails("not a regular file"):
        GGUFFile.open(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # must not wait for a writer
    with fails("pipe: not a regular file"):
        GGUFFile.open(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    with fails("empty: found 0 bytes, expected a GGUF file"):
        GGUFFile.open(tmp_path / "empty")
    with fails("cannot be opened: embedded null byte"):
        GGUFFile.open("a\0b")


# -- config ------------------------------------------------------------------------------------------------------------

# DeepSeek-V4-Flash as the published files have it: one more ratio than layers, for an MTP head that is not in the file.
FLASH_RATIOS = [0, 0, *[4, 128] * 20, 4]
FLASH = {
    "general.architecture": "deepseek4",
    "deepseek4.block_count": 43,
    "deepseek4.context_length": 1048576,
    "deepseek4.embedding_length": 4096,
    "deepseek4.vocab_size": 129280,
    "deepseek4.attention.head_count": 64,
    "deepseek4.attention.head_count_kv": 1,
    "deepseek4.attention.key_length": 512,
    "deepseek4.attention.value_length": 512,
    "deepseek4.attention.q_lora_rank": 1024,
    "deepseek4.attention.output_lora_rank": 1024,
    "deepseek4.attention.output_group_count": 8,
    "deepseek4.attention.sliding_window": 128,
    "deepseek4.attention.compress_ratios": np.array([*FLASH_RATIOS, 0], np.int32),
    "deepseek4.attention.compress_rope_freq_base": 160000.0,
    "deepseek4.attention.indexer.head_count": 64,
    "deepseek4.attention.indexer.key_length": 128,
    "deepseek4.attention.indexer.top_k": 512,
    "deepseek4.attention.layer_norm_rms_epsilon": 1e-6,
    "deepseek4.rope.dimension_count": 64,
    "deepseek4.rope.freq_base": 10000,
    "deepseek4.rope.scaling.type": "yarn",
    "deepseek4.rope.scaling.factor": 16.0,
    "deepseek4.rope.scaling.original_context_length": 65536,
    "deepseek4.rope.scaling.yarn_beta_fast": 32.0,
    "deepseek4.rope.scaling.yarn_beta_slow": 1.0,
    "deepseek4.expert_count": 256,
    "deepseek4.expert_used_count": 6,
    "deepseek4.expert_shared_count": 1,
    "deepseek4.expert_feed_forward_length": 2048,
    "deepseek4.expert_weights_scale": 1.5,
    "deepseek4.expert_weights_norm": True,
    "deepseek4.expert_gating_func": 4,
    "deepseek4.hash_layer_count": 3,
    "deepseek4.nextn_predict_layers": 1,
    "deepseek4.hyper_connection.count": 4,
    "deepseek4.hyper_connection.sinkhorn_iterations": 20,
    "deepseek4.hyper_connection.epsilon": 1e-6,
    "deepseek4.swiglu_clamp_exp": np.full(43, 10, np.float32),
}
OPTIONAL = {"context_length", "rope.scaling.type", "expert_gating_func", "nextn_predict_layers"}


def flash(**changes):
    """FLASH with keys replaced (dots as __), or dropped where the value is None."""
    changes = {f"deepseek4.{k.replace('__', '.')}": v for k, v in changes.items()}
    return {k: v for k, v in (FLASH | changes).items() if v is not None}


def test_flash_config():
    cfg = ModelConfig.from_metadata(FLASH)
    assert (cfg.n_layers, cfg.n_mtp, cfg.nope_dim, cfg.rope_base) == (43, 0, 448, 10000.0)
    assert cfg.compress_ratios == tuple(FLASH_RATIOS) and cfg.swiglu_clamp == (10.0,) * 43
    assert len(cfg.layers_of_ratio(4)) == 21 and len(cfg.layers_of_ratio(128)) == 20
    assert hash(cfg) == hash(ModelConfig.from_metadata(cfg.to_metadata()))


def test_mtp_is_known_by_its_tensors():
    """`nextn_predict_layers` alone means nothing; with nextn tensors, `block_count` counts the MTP block."""
    in_file = flash(block_count=44, swiglu_clamp_exp=[10.0] * 44)
    names = ["blk.43.nextn.eh_proj.weight"]
    assert ModelConfig.from_metadata(in_file, names) == ModelConfig.from_metadata(FLASH, ["mtp.0.norm.weight"])
    assert ModelConfig.from_metadata(in_file, names).n_mtp == 1
    with fails("key 'deepseek4.nextn_predict_layers': found 1, expected one MTP head in the file"):
        ModelConfig.from_metadata(in_file, [*names, "mtp.0.norm.weight"])
    with fails("key 'deepseek4.nextn_predict_layers': found 2"):
        ModelConfig.from_metadata(flash(block_count=45, nextn_predict_layers=2), names)


@pytest.mark.parametrize("cfg", SHAPES.values(), ids=SHAPES)
def test_config_round_trip(tmp_path, cfg):
    assert ModelConfig.from_metadata(cfg.to_metadata()) == cfg
    write_gguf(tmp_path / "c.gguf", cfg.to_metadata(), [])
    with GGUFFile.open(tmp_path / "c.gguf") as file:
        found = ModelConfig.from_metadata(file.metadata)
    for field in dataclasses.fields(cfg):  # floats are stored in 32 bits
        expected = getattr(cfg, field.name)
        expected = float(np.float32(expected)) if type(expected) is float else expected
        assert getattr(found, field.name) == expected, field.name


def test_tokens_imply_the_vocabulary():
    tokens = {"tokenizer.ggml.tokens": ["x"] * 5}
    assert ModelConfig.from_metadata(flash(vocab_size=None) | tokens).vocab_size == 5
    with fails("key 'deepseek4.vocab_size': found 129280, expected 5, one per token"):
        ModelConfig.from_metadata(FLASH | tokens)


def test_one_clamp_for_all_layers():
    assert ModelConfig.from_metadata(flash(swiglu_clamp_exp=7)).swiglu_clamp == (7.0,) * 43
    ModelConfig.from_metadata(flash(swiglu_clamp_shexp=[10] * 43))
    with fails("key 'deepseek4.swiglu_clamp_shexp': found 9.0, expected the values of swiglu_clamp_exp"):
        ModelConfig.from_metadata(flash(swiglu_clamp_shexp=9.0))


@pytest.mark.parametrize("name", [k.removeprefix("deepseek4.") for k in FLASH if k != "general.architecture"])
def test_every_key_is_required_and_typed(name):
    if name not in OPTIONAL:
        with fails(f"key 'deepseek4.{name}': found nothing, expected "):
            ModelConfig.from_metadata(flash(**{name: None}))
    if name != "context_length":  # which nothing depends on
        for wrong in ("64x", ["x"], np.array([1.5, 2.5]), np.array(["\U0001f642" * 1000])):
            with fails(f"key 'deepseek4.{name}': found "):
                ModelConfig.from_metadata(flash(**{name: wrong}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": 0}, "block_count': found 0, expected an integer from 1 to 1024"),
        ({"block_count": 43.0}, "block_count': found 43.0, expected an integer"),
        ({"block_count": True}, "block_count': found True, expected an integer"),
        ({"embedding_length": 2**40}, "embedding_length': found 1099511627776, expected an integer from 1 to 1048576"),
        ({"rope__freq_base": math.nan}, "rope.freq_base': found nan, expected a finite number above 1"),
        ({"rope__scaling__factor": math.inf}, "rope.scaling.factor': found inf, expected a finite number above 0"),
        ({"hyper_connection__epsilon": 0.0}, "hyper_connection.epsilon': found 0.0, expected a finite number above 0"),
        ({"expert_weights_norm": 1}, "expert_weights_norm': found 1, expected a boolean"),
        ({"attention__head_count_kv": 2}, "attention.head_count_kv': found 2, expected 1"),
        ({"attention__value_length": 256}, "attention.value_length': found 256, expected 512"),
        ({"rope__dimension_count": 63}, "rope.dimension_count': found 63, expected an even number"),
        ({"rope__dimension_count": 256}, "rope.dimension_count': found 256, expected at most"),
        (
            {"attention__output_group_count": 7},
            "attention.output_group_count': found 7, expected a divisor of 64 heads",
        ),
        ({"expert_used_count": 257}, "expert_used_count': found 257, expected at most expert_count, 256"),
        ({"hash_layer_count": 44}, "hash_layer_count': found 44, expected at most 43 layers"),
        ({"expert_gating_func": 2}, "expert_gating_func': found 2, expected 4"),
        ({"expert_group_count": 8}, "expert_group_count': found 8, expected 0"),
        ({"rope__scaling__type": "linear"}, "rope.scaling.type': found 'linear', expected 'yarn'"),
        ({"attention__compress_ratios": FLASH_RATIOS[:-1]}, "attention.compress_ratios': found 42 values, expected 43"),
        ({"attention__compress_ratios": [8] * 43}, "attention.compress_ratios': found [8, 8, 8"),
        ({"attention__compress_ratios": [4.0] * 43}, "attention.compress_ratios': found [4.0, 4.0"),
        ({"attention__compress_ratios": 4}, "attention.compress_ratios': found 4, expected an array of int"),
        ({"swiglu_clamp_exp": [10.0]}, "swiglu_clamp_exp': found 1 values, expected 43"),
        ({"swiglu_clamp_exp": [0.0] * 43}, "swiglu_clamp_exp': found [0.0"),
        ({"swiglu_clamp_exp": math.inf}, "swiglu_clamp_exp': found inf, expected finite numbers above 0"),
    ],
)
def test_config_refuses(changes, message):
    with fails(f"key 'deepseek4.{message}"):
        ModelConfig.from_metadata(flash(**changes))


@pytest.mark.parametrize("found", ["deepseek41", "llama", None, 4, np.zeros(3)])
def test_other_architectures_are_refused_by_name(found):
    with fails(f"key 'general.architecture': found {found!r}, expected 'deepseek4'"):
        ModelConfig.from_metadata(FLASH | {"general.architecture": found})


# -- model files -------------------------------------------------------------------------------------------------------

SMALL = synthetic_config(
    {
        "embed_dim": 32,
        "vocab_size": 40,
        "n_heads": 4,
        "head_dim": 32,
        "rope_dim": 8,
        "q_lora_rank": 32,
        "o_lora_rank": 16,
        "index_heads": 2,
        "index_head_dim": 32,
        "n_experts": 4,
        "n_experts_used": 2,
        "expert_dim": 32,
    }
)
KINDS = {"matrix": T.Q8_0, "vector": T.F32, "ids": T.I32}


def blank(table):
    """Tensors of zeros for a table, in Q8_0 where rows allow it."""
    out = {}
    for spec in table:
        qtype = KINDS[spec.kind]
        out[spec.name] = zeros(spec.shape, T.F16 if spec.shape[-1] % GGML_QUANT_SIZES[qtype][0] else qtype)
    return out


def model(path, tensors, **changes):
    changes = {f"deepseek4.{k.replace('__', '.')}": v for k, v in changes.items()}
    write_gguf(path, SMALL.to_metadata() | changes, tensors.items())
    return path


def main_tensors():
    return blank(tensor_table(SMALL))


def stored(cfg):
    """`cfg` as it comes back from a file: floats in 32 bits."""
    return dataclasses.replace(cfg, hc_eps=float(np.float32(cfg.hc_eps)), norm_eps=float(np.float32(cfg.norm_eps)))


def test_open_checkpoint(tmp_path):
    tensors = main_tensors()
    checkpoint = open_checkpoint(model(tmp_path / "m.gguf", tensors))
    assert checkpoint.cfg == stored(SMALL) and checkpoint.mtp is None
    assert checkpoint.types == {name: t.type for name, t in tensors.items()}
    checkpoint.file.close()


@pytest.mark.parametrize("qtype", TYPES, ids=lambda t: t.name)
def test_matrices_of_every_format(tmp_path, qtype):
    """Each format is taken for a matrix; I32 is not, and a vector must be a float."""
    cfg = dataclasses.replace(SMALL, embed_dim=256)
    tensors = blank(tensor_table(cfg))
    name = "blk.2.ffn_gate_exps.weight"
    tensors[name] = zeros(tensors[name].shape, qtype)
    path = model(tmp_path / "m.gguf", tensors, embedding_length=256)
    if qtype == T.I32:
        with fails(
            f"tensor '{name}': found type I32, expected one of F32, F16, BF16, Q8_0, Q4_K, Q2_K, IQ2_XXS, MXFP4"
        ):
            open_checkpoint(path)
    else:
        open_checkpoint(path).file.close()
    tensors = blank(tensor_table(cfg)) | {"blk.0.attn_norm.weight": zeros((256,), qtype)}
    path = model(path, tensors, embedding_length=256)
    if qtype in (T.F32, T.F16, T.BF16):
        open_checkpoint(path).file.close()
    else:
        with fails(f"tensor 'blk.0.attn_norm.weight': found type {qtype.name}, expected one of F32, F16, BF16"):
            open_checkpoint(path)


@pytest.mark.parametrize("spec", tensor_table(SMALL)[::9] + tensor_table(SMALL)[-3:], ids=lambda s: s.name)
def test_every_tensor_must_be_there_in_its_shape(tmp_path, spec):
    tensors = main_tensors()
    del tensors[spec.name]
    path = model(tmp_path / "m.gguf", tensors)
    with fails(f"{path}: tensor '{spec.name}': not found, expected shape {spec.shape}"):
        open_checkpoint(path)
    wrong = (spec.shape[0] + 1, *spec.shape[1:])
    tensors[spec.name] = zeros(wrong, T.I32 if spec.kind == "ids" else T.F32)
    with fails(f"tensor '{spec.name}': found shape {wrong}, expected {spec.shape}"):
        open_checkpoint(model(path, tensors))


def test_unknown_tensors_are_named(tmp_path):
    tensors = main_tensors() | {f"blk.9{i}.x": zeros((1,), T.F32) for i in range(4)}
    with fails("4 tensors that belong to no known part of the model: 'blk.90.x', 'blk.91.x', 'blk.92.x', ..."):
        open_checkpoint(model(tmp_path / "m.gguf", tensors))


@pytest.mark.parametrize("wrong", [-1, 4, 2**31 - 1])
def test_expert_ids_must_exist(tmp_path, wrong):
    ids = np.zeros((40, 2), np.int32)
    ids[17, 1] = wrong
    name = "blk.1.ffn_gate_tid2eid.weight"
    tensors = main_tensors() | {name: TensorData((40, 2), T.I32, lambda: ids)}
    with fails(f"tensor '{name}': found expert {wrong}, expected 0 to 3"):
        open_checkpoint(model(tmp_path / "m.gguf", tensors))


def test_a_wrong_key_names_the_file(tmp_path):
    path = model(tmp_path / "m.gguf", main_tensors(), expert_used_count=5)
    with fails(f"{path}: key 'deepseek4.expert_used_count': found 5"):
        open_checkpoint(path)


# -- MTP: a file of its own, or inside the main file -------------------------------------------------------------------


def nextn_model(path, tensors):
    """The layout of llama.cpp's converter: the MTP block counts as a layer."""
    arrays = {"attention__compress_ratios": [*SMALL.compress_ratios, 0], "swiglu_clamp_exp": 10.0}
    return model(path, tensors, block_count=6, nextn_predict_layers=1, swiglu_clamp_shexp=[10.0] * 6, **arrays)


def test_mtp_table():
    """The separate file has the 32 tensors of the published one; both layouts feed the same families."""
    tables = {layout: mtp_table(SMALL, layout) for layout in ("mtp", "nextn")}
    assert len(tables["mtp"]) == 32 and not any(spec.optional for spec in tables["mtp"])
    families = {layout: {spec.family for spec in table} for layout, table in tables.items()}
    assert families["mtp"] - families["nextn"] == {"mtp.e_proj", "mtp.h_proj"}
    assert families["nextn"] - families["mtp"] == {"mtp.eh_proj"}
    # What a head may lack, the main model has.
    main = {spec.family: spec.shape for spec in tensor_table(SMALL)}
    optional = [spec for spec in tables["nextn"] if spec.optional]
    assert len(optional) == 4 and all(main[s.family.removeprefix("mtp.")] == s.shape for s in optional)


def test_mtp_in_a_file_of_its_own(tmp_path):
    tensors = blank(mtp_table(SMALL, "mtp"))
    path = tmp_path / "mtp.gguf"
    write_gguf(path, {"general.architecture": "deepseek4_mtp_support", "deepseek4.expert_count": 4}, tensors.items())
    head = open_mtp(path, SMALL)
    assert head.mtp == "mtp" and head.cfg == dataclasses.replace(SMALL, n_mtp=1) and len(head.types) == 32
    head.file.close()
    with fails(f"{path}: found only an MTP head (mtp.*), expected the main model that it must accompany"):
        open_checkpoint(path)
    with fails("tensor 'mtp.0.hc_attn_fn.weight': found shape (24, 128), expected (24, 256)"):
        open_mtp(path, dataclasses.replace(SMALL, embed_dim=64))

    del tensors["mtp.0.enorm.weight"]
    write_gguf(path, {"general.architecture": "deepseek4"}, tensors.items())
    with fails("tensor 'mtp.0.enorm.weight': not found, expected shape (32,)"):
        open_mtp(path, SMALL)
    write_gguf(path, {"general.architecture": "llama"}, tensors.items())
    with fails("key 'general.architecture': found 'llama', expected 'deepseek4_mtp_support' or 'deepseek4'"):
        open_mtp(path, SMALL)
    with fails("found no tensor mtp.0.*, expected the MTP head of a DeepSeek-V4 model"):
        open_mtp(model(path, main_tensors()), SMALL)


def test_mtp_beside_the_main_tensors(tmp_path):
    tensors = main_tensors() | blank(mtp_table(SMALL, "mtp"))
    checkpoint = open_checkpoint(model(tmp_path / "m.gguf", tensors))
    assert checkpoint.mtp == "mtp" and checkpoint.cfg == stored(dataclasses.replace(SMALL, n_mtp=1))
    checkpoint.file.close()
    del tensors["mtp.0.h_proj.weight"]
    with fails("tensor 'mtp.0.h_proj.weight': not found"):
        open_checkpoint(model(tmp_path / "m.gguf", tensors))


@pytest.mark.parametrize("with_own_head", [True, False])
def test_mtp_as_nextn_tensors(tmp_path, with_own_head):
    table = [spec for spec in mtp_table(SMALL, "nextn") if with_own_head or not spec.optional]
    tensors = main_tensors() | blank(table)
    checkpoint = open_checkpoint(nextn_model(tmp_path / "m.gguf", tensors))
    assert checkpoint.mtp == "nextn" and checkpoint.cfg == stored(dataclasses.replace(SMALL, n_mtp=1))
    assert checkpoint.file.tensors["blk.5.nextn.eh_proj.weight"].shape == (32, 64)
    checkpoint.file.close()
    del tensors["blk.5.nextn.hnorm.weight"]
    with fails("tensor 'blk.5.nextn.hnorm.weight': not found, expected shape (32,)"):
        open_checkpoint(nextn_model(tmp_path / "m.gguf", tensors))
