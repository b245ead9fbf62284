"""Which options a mesh gets, that the compilers take them, and that a second start compiles nothing."""

import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import loading
from configs.validation import ConfigError
from nmm_jax.parallel import gpu_targets
from nmm_jax.parallel.chips import CHIPS
from nmm_jax.parallel.compiler_options import compile_with, compiler_options
from tests import object_stores


def config_with(*options):
    return loading.load("configs/small.py", {"compiler.options": options})


def mesh_of(kind, slices=1):
    devices = [SimpleNamespace(device_kind=kind, slice_index=i) for i in range(slices)]
    return SimpleNamespace(devices=np.array(devices, dtype=object))


def test_by_generation():
    assert compiler_options(config_with(), mesh_of("cpu")).keys() == {"xla_cpu_experimental_ynn_fusion_type"}
    assert compiler_options(config_with(), mesh_of("Radeon")) == {}
    v5p, both = (compiler_options(config_with(), mesh_of("TPU v5", slices)) for slices in (1, 2))
    assert v5p["xla_enable_async_all_gather"] is True
    assert v5p.items() < both.items()
    assert "xla_gpu_enable_while_loop_double_buffering" in compiler_options(config_with(), mesh_of("NVIDIA H200"))


def test_a_configs_own_come_last():
    given = (
        "xla_enable_async_all_gather=false",
        "xla_tpu_scoped_vmem_limit_kib=65536",
        "xla_a=0.5",
        "xla_b=x=y",
    )
    found = compiler_options(config_with(*given), mesh_of("TPU v5"))
    own = {"xla_enable_async_all_gather": False, "xla_tpu_scoped_vmem_limit_kib": 65536, "xla_a": 0.5, "xla_b": "x=y"}
    assert own.items() <= found.items()
    assert found.keys() - own.keys() == compiler_options(config_with(), mesh_of("TPU v5")).keys() - own.keys()
    with pytest.raises(ConfigError, match="compiler.options: '--xla_a=1'; expected NAME=VALUE"):
        config_with("--xla_a=1")


@pytest.mark.parametrize("option", [{"xla_nonsense": True}, {"xla_cpu_enable_fast_math": "perhaps"}])
def test_what_the_compiler_does_not_take_is_said(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"compiler.options: .*{name}"):
        compile_with(jax.jit(lambda x: x + 1).lower(1.0), option)


CACHED = textwrap.dedent(
    """
    import sys

    import jax

    from data_pipelines import paths
    from nmm_jax.parallel.compiler_options import compile_with, keep_compiled

    keep_compiled(str(paths.reach(sys.argv[1])))
    found = []
    jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
    compile_with(jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((64, 64), "float32")), {})
    print(sum("cache_hits" in event for event in found), sum("cache_misses" in event for event in found))
    """
)


def starts(folder, **environment):
    """Hits and misses of two starts."""
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # a second, else
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", CACHED, folder], env=os.environ | environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr[-3000:]
        yield tuple(map(int, run.stdout.split()))


def test_a_second_start_compiles_nothing(tmp_path):
    assert list(starts(str(tmp_path / "compiled"))) == [(0, 1), (1, 0)]


def test_nor_does_one_elsewhere():
    pytest.importorskip("gcsfs")
    with object_stores.KINDS["gs"]() as there:
        assert list(starts(f"{there.url}/compiled", **there.environment)) == [(0, 1), (1, 0)]


ACCEPTED = textwrap.dedent(
    """
    import json
    import sys

    import jax
    from jax.sharding import SingleDeviceSharding

    from nmm_jax.parallel.topology import Topology

    for name, options in json.loads(sys.argv[1]).items():
        where = SingleDeviceSharding(Topology.parse(name).devices()[0])
        lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8, 128), "float32", sharding=where))
        for option, value in options.items():
            lowered.compile(compiler_options={option: value})
    """
)


@pytest.mark.extras
@pytest.mark.parametrize("names", [("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"), ("h100:1x8",)])
def test_the_compilers_take_them(names):
    chips = [CHIPS[name.split(":")[0]] for name in names]
    if chips[0].torus_dims:
        pytest.importorskip("libtpu")
    elif not gpu_targets.has_plugin():
        pytest.skip("JAX's CUDA plugin is not installed")
    asked = {}
    for name, chip in zip(names, chips, strict=True):
        asked[name] = compiler_options(config_with(), mesh_of(chip.kinds[0], slices=2 if chip.torus_dims else 1))
    run = subprocess.run(
        [sys.executable, "-c", ACCEPTED, json.dumps(asked)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
