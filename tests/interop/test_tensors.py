"""Folders of safetensors: what is written is what the library reads; what is damaged is named."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nmm_jax.interop import tensors
from nmm_jax.interop.errors import InteropError
from nmm_jax.interop.tensors import Entry, Folder, plan, write

WHOLE = slice(None)


def written(folder, dtype=np.float32, most=10**9):
    arrays = {
        name: np.random.default_rng(i).normal(size=shape).astype(dtype)
        for i, (name, shape) in enumerate({"a.weight": (6, 4), "b.weight": (5,), "c.weight": (3, 2, 2)}.items())
    }
    entries = [Entry(name, x.shape, x.dtype) for name, x in arrays.items()]
    write(folder, plan(entries, most), iter(arrays.values()))
    return arrays


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_written_is_read(tmp_path, dtype):
    arrays = written(tmp_path, dtype)
    folder = Folder(tmp_path)
    assert folder.names() == set(arrays)
    for name, x in arrays.items():
        folder.check(name, x.shape)
        found = folder.read(name, (slice(1, 3), *[WHOLE] * (x.ndim - 1)))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, x[1:3])
    for name, x in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(x, arrays[name])


def test_shards_and_their_index(tmp_path):
    arrays = written(tmp_path, most=120)
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((tmp_path / tensors.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in arrays.values())
    assert list(index["weight_map"]) == list(arrays)
    folder = Folder(tmp_path)
    for name, x in arrays.items():
        np.testing.assert_array_equal(folder.read(name, (WHOLE,) * x.ndim), x)


def test_a_missing_shard_is_named(tmp_path):
    written(tmp_path, most=120)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InteropError, match="names 2 files, of which 1 are not there: model-00002-of-00002.safetensors"):
        Folder(tmp_path)


def test_a_tensor_that_is_not_where_the_index_says(tmp_path):
    written(tmp_path, most=120)
    path = tmp_path / tensors.INDEX
    path.write_text(path.read_text().replace('"c.weight"', '"d.weight"'))
    with pytest.raises(InteropError, match="'d.weight' is in model-00002-of-00002.safetensors, and it is not"):
        Folder(tmp_path)


def test_an_index_that_is_no_json(tmp_path):
    written(tmp_path, most=120)
    (tmp_path / tensors.INDEX).write_text("{")
    with pytest.raises(InteropError, match="index.json is no JSON"):
        Folder(tmp_path)


HEADER = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
DAMAGED = {
    "it has 3 bytes, too few for a header": b"abc",
    "it has 10 bytes, and its header alone should have 7089075335985461349: truncated": b"executable",
    "its header of 5 bytes is no JSON": struct.pack("<Q", 5) + b"xxxxx",
    f"it has {8 + len(HEADER) + 3} bytes, expected {8 + len(HEADER) + 8}: truncated": (
        struct.pack("<Q", len(HEADER)) + HEADER + b"abc"
    ),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_damaged_files(tmp_path, message):
    (tmp_path / "model.safetensors").write_bytes(DAMAGED[message])
    with pytest.raises(InteropError, match=f"model.safetensors cannot be read: {message}"):
        Folder(tmp_path)


def test_shape_and_type(tmp_path):
    save_file({"a": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.int64)}, tmp_path / "model.safetensors")
    folder = Folder(tmp_path)
    with pytest.raises(InteropError, match=r"model.safetensors: a has shape \(2, 3\); .* makes it \(3, 2\)"):
        folder.check("a", (3, 2))
    with pytest.raises(InteropError, match="b is of type I64; expected F32, F16, BF16"):
        folder.check("b", (2,))


def test_pickles_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InteropError, match="pytorch_model.bin only. These are pickles, which run code .*convert them"):
        Folder(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(InteropError, match="has no safetensors file"):
        Folder(tmp_path)
    with pytest.raises(InteropError, match="there is no folder"):
        Folder(tmp_path / "x")
    for name in ("a", "b"):
        save_file({name: np.zeros(2, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(InteropError, match="2 safetensors files and no model.safetensors.index.json"):
        Folder(tmp_path)
