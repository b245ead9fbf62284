"""All that is known of a compiled step, ready for JSON: what compile prints, draws and records."""

import dataclasses
import math
from importlib import metadata
from typing import Any

import jax

from nmm_jax.compilation import roofline
from nmm_jax.compilation.collectives import collectives, summary
from nmm_jax.compilation.defects import dense_experts, emulated_gathers, host_transfers, whole_gradients
from nmm_jax.compilation.memory import memory, needed
from nmm_jax.compilation.products import products
from nmm_jax.compilation.program import Program
from nmm_jax.compilation.step import CompiledStep
from nmm_jax.scaling.counting import count

Facts = dict[str, Any]


def facts(step: CompiledStep) -> Facts:
    """Of one step; bytes are a device's.

    config (what names it), topology, devices, mesh      sizes by axis
    parameters, rows (of a device), positions            of a step; positions in all
    memory                                               memory.Memory, and whether it fits
    needed                                               the same by count, by what needs it
    collectives                                          rows of kind, axes, dtype, in_loop, count, bytes, largest
    products                                             FLOPs of matrix products outside of kernels
    host_transfers, warnings                             what should not be there
    estimate                                             roofline.Estimate
    options, versions, compile_seconds
    """
    program = Program(step.compiled.as_text() or "")
    found = collectives(program, step.mesh)
    sizes = dict(step.mesh.shape)
    used = memory(step, program)
    chip = step.topology.chip
    work = roofline.work(step.config, sizes, step.mesh.devices.flat[0].platform)
    estimate = roofline.estimate(work, chip, step.mesh.size, roofline.transfers(found, step.mesh, chip))
    shards = math.prod(n for axis, n in sizes.items() if axis != "tensor")
    return {
        "family": step.config.model.family,
        "topology": step.topology.name,
        "slices": step.topology.slices,
        "chip": chip.name,
        "devices": step.mesh.size,
        "mesh": sizes,
        "remat": step.config.model.remat,
        "gradient_accumulation": step.config.gradient_accumulation,
        "parameters": count(step.config).parameters,
        "rows": step.config.batch_rows // shards,
        "positions": step.config.batch_rows * step.config.row_length,
        "flops": {"needed": work.needed, "repeated": work.repeated},
        "fits": used.peak <= used.capacity,
        "memory": dataclasses.asdict(used),
        "needed": needed(step),
        "collectives": summary(found),
        "products": sum(product.total for product in products(program, lambda *_: 1)),
        "host_transfers": [instruction.name for instruction in host_transfers(program)],
        "warnings": [
            *emulated_gathers(found),
            *whole_gradients(found, step.state["params"]),
            *dense_experts(program, step.state["params"]),
        ],
        "estimate": dataclasses.asdict(estimate),
        "options": dict(step.options),
        "versions": {"jax": jax.__version__, **_version_of_compiler(step)},
        "compile_seconds": round(step.seconds, 1),
    }


def _version_of_compiler(step: CompiledStep) -> dict[str, str]:
    names = ("libtpu",) if step.topology.is_tpu else ("jax-cuda13-plugin", "jax-cuda12-plugin")
    return {name: v for name in names for v in [_version(name)] if v}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
