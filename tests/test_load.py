"""Loading: every tensor of a file with all formats mixed arrives where the tree says, on one device and on a mesh."""

import math
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from ds4jax import sharding
from ds4jax.errors import ConfigError, GGUFError
from ds4jax.formats import Quantized
from ds4jax.io import load as loader
from ds4jax.io import synthetic
from ds4jax.io.checkpoint import open_checkpoint
from ds4jax.model import weights

CFG = synthetic.synthetic_config("base")


def written(tmp_path_factory, recipe):
    path = tmp_path_factory.mktemp("model") / f"{recipe}.gguf"
    synthetic.write_synthetic(path, CFG, 7, synthetic.RECIPES[recipe])
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return written(tmp_path_factory, "mixed")


@pytest.fixture(scope="module")
def q8(tmp_path_factory):
    return written(tmp_path_factory, "q8")


@pytest.fixture(scope="module")
def q2(tmp_path_factory):
    return written(tmp_path_factory, "q2")


def file_bytes(tree, values):
    """{tensor name: uint8 bytes as a file has them} of a loaded tree; vectors and ids count as F32 and I32."""
    out = {}
    specs, treedef = jax.tree.flatten(tree)
    for spec, value in zip(specs, treedef.flatten_up_to(values), strict=True):
        raw = value.to_bytes() if isinstance(value, Quantized) else np.asarray(value)[..., None].view(np.uint8)
        for i, tensor in enumerate(spec.tensors):
            out[tensor.name] = (raw[i] if spec.layered else raw).reshape(-1)
    return out


@pytest.mark.parametrize("chunk", [2**28, 100_000], ids=["whole", "slabs"])
@pytest.mark.parametrize("mesh_shape, fixture", [(None, "mixed"), ((1, 4), "mixed"), ((2, 2), "q8")])
def test_every_tensor_arrives(mesh_shape, fixture, chunk, monkeypatch, request):
    path = request.getfixturevalue(fixture)
    monkeypatch.setattr(loader, "SLAB_BYTES", chunk)
    mesh = sharding.make_mesh(*mesh_shape) if mesh_shape else None
    values, checkpoint = loader.load(path, mesh)
    tree = weights.abstract(CFG, checkpoint.types)
    assert jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), values) == weights.structs(tree)
    if mesh:
        assert jax.tree.map(lambda v: v.sharding, values) == weights.shardings(tree, mesh)
    found = file_bytes(tree, values)
    with open_checkpoint(path).file as file:
        assert found.keys() == file.tensors.keys()
        for name in file.tensors:
            np.testing.assert_array_equal(found[name], file.raw(name).reshape(-1), err_msg=name)


@pytest.mark.parametrize("chunk", [2**28, 100_000], ids=["whole", "slabs"])
def test_experts_arrive_in_a_wide_format(q2, chunk, monkeypatch):
    monkeypatch.setattr(loader, "SLAB_BYTES", chunk)
    values, checkpoint = loader.load(q2, wide=True)
    tree = weights.abstract(CFG, checkpoint.types, wide=True)
    assert jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), values) == weights.structs(tree)
    stored, _ = loader.load(q2)
    for found, expected in ((values.ffn.experts.up, stored.ffn.experts.up), (values.ffn.shared, stored.ffn.shared)):
        jax.tree.map(np.testing.assert_array_equal, *map(dequantized, (found, expected)))
    assert weights.nbytes(tree) > weights.nbytes(weights.abstract(CFG, checkpoint.types))


def dequantized(tree):
    """A loaded tree's leaves as float32, layer by layer: formats and stacks may differ."""
    matrices = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Quantized))
    return [np.asarray(layer.dequantize()) for m in matrices for layer in (m[i] for i in range(m.shape[0]))]


def test_memory_per_weight_is_the_files(mixed):
    file = open_checkpoint(mixed).file
    tree = weights.abstract(CFG, {name: t.type for name, t in file.tensors.items()})
    assert weights.nbytes(tree) == sum(t.nbytes for t in file.tensors.values())


def test_slabs_are_of_one_shape_and_cover_everything(monkeypatch):
    for size in (1, 64, 1000, 10**6):
        monkeypatch.setattr(loader, "SLAB_BYTES", size)
        for shape in ((), (7,), (129, 5), (3, 13, 11)):
            seen = np.zeros(shape, int)
            slabs = list(loader._slabs(shape, 8))
            for slab in slabs:
                seen[tuple(slice(*b) for b in slab)] += 1
            assert seen.min() >= 1 and seen.sum() < 2 * seen.size
            assert len({tuple(stop - start for start, stop in slab) for slab in slabs}) == 1
            assert math.prod(stop - start for start, stop in slabs[0]) * 8 <= max(size, 8)


def test_no_more_is_read_than_may_be_in_flight(q2, monkeypatch):
    monkeypatch.setattr(loader, "SLAB_BYTES", 100_000)
    monkeypatch.setattr(loader, "IN_FLIGHT", 3)
    read, lock, ahead, most = loader._read, threading.Lock(), 0, 0

    def counted(*args):
        nonlocal ahead, most
        with lock:
            ahead += 1
            most = max(most, ahead)
        return read(*args)

    def arrived(nbytes):
        nonlocal ahead
        with lock:
            ahead -= 1

    monkeypatch.setattr(loader, "_read", counted)
    checkpoint = open_checkpoint(q2)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    specs = jax.tree.leaves(weights.abstract(CFG, checkpoint.types))
    shards = [s for spec in specs for s in loader._shards(spec, [one] * len(jax.tree.leaves(spec.struct())))]
    loader._stream(checkpoint.holder, shards, arrived)
    assert ahead == 0 and 1 < most <= 3


def test_slabs_are_written_in_place():
    whole = tuple(jax.ShapeDtypeStruct((6, 40, n), dtype) for n, dtype in ((8, np.float16), (32, np.uint32)))
    slab = tuple(jax.ShapeDtypeStruct((1, 10, p.shape[-1]), p.dtype) for p in whole)
    _, write = loader._compile(whole, slab, jax.devices()[0])
    stats = write.memory_analysis()
    assert stats.alias_size_in_bytes == 6 * 40 * (8 * 2 + 32 * 4)
    assert stats.temp_size_in_bytes == 0


def test_a_failed_read_ends_the_load(q2, monkeypatch):
    read = loader._read

    def failing(checkpoint, shard, slab):
        if shard.spec.tensors[0].family == "attn.q_b":
            raise GGUFError("tensor 'blk.0.attn_q_b.weight': gone")
        return read(checkpoint, shard, slab)

    monkeypatch.setattr(loader, "_read", failing)
    with pytest.raises(GGUFError, match="gone"):
        loader.load(q2)


def test_mesh_that_does_not_divide_is_refused(mixed):
    with pytest.raises(ConfigError, match="attn_output_b.weight has 256 columns, not a multiple of 1024: .* of Q4_K"):
        loader.load(mixed, sharding.make_mesh(4, 1))


def test_stacks_stay_below_32_bit_offsets(monkeypatch):
    monkeypatch.setattr(weights, "MAX_STACK_BYTES", 100_000)
    tree = weights.abstract(CFG, synthetic.RECIPES["q8"])
    assert tree.attn.q_b.layers == ((0,), (1,), (2,), (3,), (4,))  # 1536 × 256 in Q8_0: 417,792 bytes per layer
    assert tree.attn.q_a_norm.layers == ((0, 1, 2, 3, 4),)
    for spec in jax.tree.leaves(tree):
        assert spec.nbytes <= 100_000 or not spec.layered or spec.shape[0] == 1


MEMORY_PROBE = """
import sys, threading, time, re, jax
from ds4jax.io import load
from ds4jax.model import weights

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

jax.numpy.zeros(1).block_until_ready()
base, peak, done = status("VmRSS"), 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, status("VmRSS"))
        time.sleep(0.005)
thread = threading.Thread(target=watch); thread.start()
values, checkpoint = load.load(sys.argv[1])
jax.block_until_ready(values)
done.set(); thread.join()
size = sum(x.nbytes for x in jax.tree.leaves(values))
print(size, peak - base)
"""


def peak_over_weights(path):
    run = subprocess.run([sys.executable, "-c", MEMORY_PROBE, str(path)], capture_output=True, text=True, check=True)
    return map(int, run.stdout.split())


@pytest.mark.slow
def test_host_memory_while_loading(tmp_path):
    """On a CPU the weights themselves are host memory: what loading adds to them stays far below 2 GiB."""
    cfg = synthetic.synthetic_config({"n_experts": 512, "expert_dim": 768, "embed_dim": 1024})
    synthetic.write_synthetic(tmp_path / "big.gguf", cfg, 0, synthetic.RECIPES["q4"])
    size, peak = peak_over_weights(tmp_path / "big.gguf")
    print(f"weights {size / 2**30:.2f} GiB, peak above the start {peak / 2**30:.2f} GiB")
    assert size > 3 * 2**30
    assert peak < size + 1.5 * 2**30
