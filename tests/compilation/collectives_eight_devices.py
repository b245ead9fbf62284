"""Prints the collectives of a program for eight simulated devices; test_collectives.py runs it in its own process."""

import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from nmm_jax.compilation.collectives import collectives
from nmm_jax.compilation.program import Program
from nmm_jax.parallel.mesh import BATCH_AXES, mesh_of

ROWS = PartitionSpec(BATCH_AXES)


def layer(x):
    """One of each kind, of a device's [8, 16]."""
    whole = jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)
    x = jax.lax.psum_scatter(jnp.sin(whole), "fsdp", scatter_dimension=0, tiled=True)
    x = jnp.sin(jax.lax.psum(x, "tensor"))
    x = jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)
    return jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)])


def main():
    mesh = mesh_of({"fsdp": 2, "expert": 2, "tensor": 2})
    apply = jax.shard_map(layer, mesh=mesh, in_specs=ROWS, out_specs=ROWS, check_vma=False)

    def step(x):
        x, _ = jax.lax.scan(lambda x, _: (apply(x), None), x, None, length=6)
        return x, x.astype(jnp.bfloat16).sum()

    x = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=NamedSharding(mesh, ROWS))
    found = collectives(Program(jax.jit(step).lower(x).compile().as_text()), mesh)
    print(json.dumps([[c.kind, c.axes, c.devices, c.dtype, c.bytes, c.count, c.in_loop] for c in found]))


if __name__ == "__main__":
    main()
