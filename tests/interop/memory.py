"""Reads a folder onto 8 simulated devices and prints what memory that took, in bytes. test_memory.py runs it.

Devices of a CPU have their arrays in the host's memory too, so what is above the parameters' own size is the host's.
Pages of the mapped file are the kernel's to drop and are not counted.
"""

import json
import pathlib
import sys
import threading

import jax

from nmm_jax import models
from nmm_jax.interop import their_config
from nmm_jax.interop.import_weights import load, mesh_for
from nmm_jax.interop.tensors import Folder


def anonymous() -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


folder = pathlib.Path(sys.argv[1])
source = their_config.read(folder)
model = models.build(source.config)
mesh = mesh_for(model)
before, highest, done = anonymous(), 0, threading.Event()


def watch() -> None:
    global highest
    while not done.wait(0.002):
        highest = max(highest, anonymous())


thread = threading.Thread(target=watch)
thread.start()
params = jax.block_until_ready(load(Folder(folder), source, model, mesh))
done.set()
thread.join()
arrays = jax.tree.leaves(params)
print(
    json.dumps(
        {
            "parameters": sum(s.data.nbytes for x in arrays for s in x.addressable_shards),
            "largest": max(x.nbytes for x in arrays),
            "largest_shard": max(x.addressable_shards[0].data.nbytes for x in arrays),
            "peak": highest - before,
        }
    )
)
