"""Imports a folder onto 8 simulated devices and exports it. test_import_export.py runs it in a process of its own."""

import math
import pathlib
import sys

import jax

from nmm_jax.interop.export_weights import export_weights
from nmm_jax.interop.import_weights import import_weights
from nmm_jax.interop.tensors import Folder
from nmm_jax.training.checkpoints import open_run

folder = pathlib.Path(sys.argv[1])
read_sizes: dict[str, list[int]] = {}
plain = Folder.read


def counted(self, name, index):
    found = plain(self, name, index)
    read_sizes.setdefault(name, []).append(found.size)
    return found


Folder.read = counted  # type: ignore[method-assign]
import_weights(folder / "theirs", folder / "run")
assert jax.device_count() == 8
run = open_run(folder / "run")
up = run.params["layers"]["ffn"]["experts"]["up"]
assert up.sharding.shard_shape(up.shape)[1:3] == (1, 8), up.sharding  # 4 experts over 4, width 16 over 2

shapes = {name: Folder(folder / "theirs")._files[name].get_slice(name).get_shape() for name in read_sizes}
for name, sizes in read_sizes.items():
    size = math.prod(shapes[name])
    assert sum(sizes) == size, (name, sizes)
    if "experts" in name:
        assert max(sizes) == size // 2, (name, sizes)
export_weights(folder / "run", folder / "back")
