"""What XLA is told besides the program, by generation: a dict for `lowered.compile(compiler_options=...)`.

An option is here because it makes a compiled step better where that can be seen without the hardware, and because
libtpu 0.0.42.1 or JAX 0.10.2's CUDA plugin takes it. Others are for a run to try: `compiler.options`. Seen on a step of
two products a layer, 8 layers, bfloat16 [16, 1024, 2048] x [2048, 8192], fsdp 8 and tensor 2, unless another is named.

Tried, and not here:
  - What changed nothing, so is a default or not about such a step: xla_tpu_overlap_compute_collective_tc,
    xla_tpu_enable_async_collective_fusion{,_multiple_steps,_fuse_reduce_scatter}; between slices
    xla_tpu_{enable_data_parallel_all_reduce_opt,data_parallel_opt_different_sized_ops}; on GPUs
    xla_gpu_enable_{latency_hiding_scheduler,analytical_sol_latency_estimator}.
  - xla_tpu_enable_async_collective_fusion_fuse_all_reduce hides sums over tensor, and gathers are waited for instead
    (hw-300m on v5e).
  - xla_tpu_enable_ici_ag_pipelining hides a layer's first gather too, for a layer more to compile and 5 % more memory.
  - xla_tpu_enable_sparse_core_collective_offload_* hide reductions and sums too (v5p); apple/axlearn turned some of
    them off again for wrong losses, which cannot be seen here.
"""

from collections.abc import Iterable, Mapping

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nmm_jax.parallel.chips import of_device

Options = dict[str, bool | int | float | str]

# Gathers of weights beside products instead of before them: 4 of 10 on v4, v5p and v6e, for 16 to 36 % more temporary
# memory; of configs/early_fusion.py:hw-300m (4 layers, v5p:2x2x4) 10 of 18 for 18 %. v5e does it by default, tpu7x on
# its SparseCores. One without the other changes nothing.
# AI-Hypercomputer/maxtext benchmarks/xla_flags_library.py, CF_FOR_ALL_GATHER
_GATHERS_BESIDE_PRODUCTS: Options = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
}
# Two layers to a turn of the loop, so that the end of one hides what the next one waits for: of 4 reductions of
# gradients 1 is waited for instead of 2 (h100, fsdp 8). NVIDIA/JAX-Toolbox docs/GPU_performance.md
_TWO_LAYERS_A_TURN: Options = {"xla_gpu_enable_while_loop_double_buffering": True}

# Products by Eigen, sums by YNNPACK, which has both by default: a batch of products, as of attention, and one of fewer
# than some 150 rows, as of experts, it runs on one core.
_PRODUCTS_BY_EIGEN: Options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}

_BY_CHIP: Mapping[str, Options] = {
    **dict.fromkeys(("v4", "v5p", "v6e"), _GATHERS_BESIDE_PRODUCTS),
    **dict.fromkeys(("a100-40gb", "a100", "h100-pcie", "h100", "h200", "b200"), _TWO_LAYERS_A_TURN),
    "cpu": _PRODUCTS_BY_EIGEN,
}

# Gradients that slices exchange are awaited after the backward pass, not at the end of the layer that sent them: 7 of 9
# of hw-300m's (4 layers, two v5e:2x4, fsdp 8), in the same memory. apple/axlearn axlearn/common/compiler_options.py
_BETWEEN_SLICES: Options = {"xla_tpu_enable_sunk_dcn_allreduce_done_with_host_reduction": True}


def compiler_options(config: ConfigDict, mesh: Mesh) -> Options:
    """Those of the mesh's devices, then those of `compiler.options`, which come last and so win."""
    given = (option.split("=", 1) for option in config.compiler.options)
    return of_devices(mesh.devices.flat) | {name: _value(text) for name, text in given}


def of_devices(devices: Iterable[jax.Device]) -> Options:
    """Those of the chips, and of slices where there are several."""
    first, *others = devices
    chip = of_device(first)
    if first.device_kind == "cpu" and others:
        return {}  # simulated devices, on which none was tried
    options = dict(_BY_CHIP.get(chip.name if chip else first.device_kind, {}))
    if len({getattr(device, "slice_index", 0) for device in (first, *others)}) > 1:
        options |= _BETWEEN_SLICES
    return options


def _value(text: str) -> bool | int | float | str:
    """XLA takes options by their types: true, 65536, 0.5; all else is a word."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def compile_with(lowered: jax.stages.Lowered, options: Options) -> jax.stages.Compiled:
    """The program of `lowered`, compiled with these options.

    Raises:
      ValueError: the compiler does not take one of them.
    """
    try:
        return lowered.compile(compiler_options=dict(options))  # type: ignore[arg-type]  # it takes numbers too
    except jax.errors.JaxRuntimeError as e:
        if "No such compile option" in str(e) or "While setting option" in str(e):
            raise ValueError(f"compiler.options: {e}; this JAX and its plugin take other options") from e
        raise


def keep_compiled(folder: str) -> None:
    """Has JAX keep what took it a second or more to compile, and look there first; comes before anything is compiled.

    The first process writes; all read, so it is a folder that all can reach.
    """
    jax.config.update("jax_compilation_cache_dir", folder)
