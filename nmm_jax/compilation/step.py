"""A config's exact training step, compiled for accelerators that do not have to be there."""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nmm_jax import models
from nmm_jax.compilation import buffers
from nmm_jax.compilation.buffers import Buffers
from nmm_jax.models.moe import check_platform
from nmm_jax.parallel import gpu_targets
from nmm_jax.parallel.batches import abstract_batch
from nmm_jax.parallel.compiler_options import compile_with, compiler_options
from nmm_jax.parallel.mesh import check_rows, make_mesh
from nmm_jax.parallel.sharding import divisor
from nmm_jax.parallel.topology import Topology
from nmm_jax.training.optimizer import make_optimizer
from nmm_jax.training.schedule import ends
from nmm_jax.training.state import State, abstract_state
from nmm_jax.training.step import jit_step


class TooLarge(RuntimeError):
    """The compiler found no room in a device's memory; the message is its own."""


@dataclasses.dataclass(frozen=True)
class LaidOut:
    """What is known before anything is compiled."""

    config: ConfigDict
    topology: Topology
    mesh: Mesh  # of devices that can only be compiled for
    model: models.Model
    state: State  # shapes, types and shardings
    batch: dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class CompiledStep(LaidOut):
    options: Mapping[str, Any]  # the compiler's
    compiled: jax.stages.Compiled
    buffers: Buffers | None  # where its values lie; None if it comes from the compilation cache
    seconds: float  # that lowering and compiling took


def lay_out(config: ConfigDict, topology: Topology) -> LaidOut:
    """The arrays of a step on the mesh that train would make there.

    Raises:
      TopologyError: there is no compiler for it here.
      ValueError: the config and the topology do not fit.
    """
    model = models.build(config)
    mesh = make_mesh(config, topology.devices(), width=divisor(model.abstract, model.logical_axes))
    check_rows(config, mesh)
    check_platform(model.spec.moe, mesh)
    state = abstract_state(model, make_optimizer(config), mesh)
    return LaidOut(config, topology, mesh, model, state, abstract_batch(config, mesh))


def compile_step(config: ConfigDict, topology: Topology) -> CompiledStep:
    """The step that train would run there: the same function, shardings, donation and compiler options.

    Raises:
      As lay_out, before anything is compiled.
      TooLarge: the step needs more memory than a device has.
    """
    step = lay_out(config, topology)
    options = compiler_options(config, step.mesh)
    began = time.perf_counter()
    with contextlib.nullcontext() if topology.is_tpu else gpu_targets.lowering():
        lowered = jit_step(step.model, make_optimizer(config), config, step.mesh).lower(
            step.state, step.batch, ends(config)
        )
    try:
        with tempfile.TemporaryDirectory() as folder:
            compiled = compile_with(lowered, {**options, **buffers.options(folder)})
            laid_out = buffers.read(folder)
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" in str(e):
            raise TooLarge(str(e)) from e
        raise
    seconds = time.perf_counter() - began
    known = {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}
    return CompiledStep(**known, options=options, compiled=compiled, buffers=laid_out, seconds=seconds)
