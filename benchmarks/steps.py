"""A training step as train.py compiles it, and the twin's, each an object for a process of its own (rivals.py).

Both take the same batches, one after the other and from the beginning again, begin with the same weights, and return
the loss of a step when it is done.
"""

import pathlib
import statistics
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.rivals import HostMemory

PARTS = ("forward", "backward", "optimizer")
TRACED = 3  # steps of a profile
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}  # of losses; bfloat16 rounds otherwise in every fusion


def save_batches(batches: list[dict[str, np.ndarray]], folder: pathlib.Path) -> None:
    for t, batch in enumerate(batches):
        np.savez(folder / f"batch-{t}.npz", **batch)


def load_batches(folder: pathlib.Path) -> list[dict[str, np.ndarray]]:
    return [dict(np.load(path)) for path in sorted(folder.glob("batch-*.npz"))]


class OurStep:
    def __init__(self, config: str, folder: pathlib.Path, weights: pathlib.Path | None = None):
        """config: as loading.to_json has it. folder: of the batches. weights: file to write, for the twin."""
        import jax

        from configs import loading
        from nmm_jax import models
        from nmm_jax.parallel import host_memory
        from nmm_jax.parallel.batches import abstract_batch
        from nmm_jax.parallel.compiler_options import compile_with, compiler_options
        from nmm_jax.parallel.mesh import make_mesh
        from nmm_jax.parallel.sharding import divisor, replicated
        from nmm_jax.training.optimizer import make_optimizer
        from nmm_jax.training.schedule import ends
        from nmm_jax.training.state import abstract_state, initial_state
        from nmm_jax.training.step import jit_step

        host_memory.keep_freed()  # as train does
        self.config, self.batches = loading.from_json(config), load_batches(folder)
        model = models.build(self.config)
        self._mesh = make_mesh(self.config, width=divisor(model.abstract, model.logical_axes))
        optimizer = make_optimizer(self.config)
        abstract = abstract_state(model, optimizer, self._mesh)
        began = time.perf_counter()
        lowered = jit_step(model, optimizer, self.config, self._mesh).lower(
            abstract, abstract_batch(self.config, self._mesh), ends(self.config)
        )
        self.compiled = compile_with(lowered, compiler_options(self.config, self._mesh))
        self._compile_seconds = time.perf_counter() - began
        self._memory = HostMemory()
        self.state = jax.block_until_ready(initial_state(model, optimizer, self._mesh, self.config.seed))
        self._memory.forget()  # what compiled the initial state
        self._ends = jax.device_put(ends(self.config), replicated(self._mesh))
        self._steps, self._host = 0, []
        if weights:
            self._save(weights)

    def _save(self, path: pathlib.Path) -> None:
        """The parameters, and the learning rates of the first steps, for the twin."""
        from flax.traverse_util import flatten_dict

        from nmm_jax.training.schedule import make_schedule

        rates = np.asarray(make_schedule(self.config)(np.arange(1_000)))
        flat = flatten_dict(self.state["params"], sep="/")
        np.savez(path, **{"learning rates": rates}, **{name: np.asarray(x) for name, x in flat.items()})

    def step(self, batch: int | dict[str, np.ndarray] | None = None) -> float:
        """batch: its number, or itself; None is the next one."""
        from nmm_jax.parallel.batches import to_global

        if not isinstance(batch, dict):
            batch = self.batches[(self._steps if batch is None else batch) % len(self.batches)]
        began = time.perf_counter()
        arrays = to_global(batch, self._mesh, self.config.batch_rows)
        self.state, metrics = self.compiled(self.state, arrays, self._ends)
        self._host.append(time.perf_counter() - began)
        self._steps += 1
        return float(metrics["loss"])

    def peak_memory(self) -> int:
        """Bytes."""
        import jax

        stats = jax.local_devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use") or self._memory.peak()

    def facts(self) -> dict[str, float]:
        return {
            "compile_seconds": self._compile_seconds,
            "host_milliseconds": 1e3 * statistics.median(self._host),
        }

    def parts(self) -> dict[str, Any]:
        """Shares of the time of instructions, by part of the step; and `by_part` of the model."""
        found = self.profile()
        passes = [(share.passed, share.seconds) for share in found.shares]
        own = {"forward": ("forward",), "backward": ("backward", "recomputed"), "optimizer": ("update",)}
        whole = sum(seconds for passed, seconds in passes if passed != "other")
        shares: dict[str, Any] = {part: sum(s for p, s in passes if p in names) / whole for part, names in own.items()}
        by_part = {part: sum(of.values()) / found.busy for part, of in found.by_part().items()}
        return shares | {"by_part": by_part}

    def profile(self) -> Any:
        """nmm_jax.compilation.trace.Profile of a few steps."""
        import jax

        from nmm_jax.compilation import trace
        from nmm_jax.compilation.program import Program

        program = Program(self.compiled.as_text())
        with tempfile.TemporaryDirectory() as folder:
            jax.profiler.start_trace(folder)
            for _ in range(TRACED):
                self.step()
            jax.profiler.stop_trace()
            names = [name for inside in program.computations.values() for name in inside]
            events = trace.events_of(trace.newest_trace(pathlib.Path(folder)), names)
        return trace.profile_of(events, program)

    def product(self, width: int) -> None:
        """One product of two square matrices of the config's type; two when it is first asked."""
        import jax
        import jax.numpy as jnp

        if not hasattr(self, "_multiply"):
            keys = jax.random.split(jax.random.key(0))
            self._matrices = [jax.random.normal(key, (width, width), self.config.model.dtype) for key in keys]
            self._multiply = jax.jit(jnp.matmul)
            self.product(width)
        jax.block_until_ready(self._multiply(*self._matrices))


class TheirStep:
    def __init__(self, config: str, folder: pathlib.Path, weights: pathlib.Path, compiled: bool):
        import torch
        from flax.traverse_util import unflatten_dict

        from benchmarks import torch_twin
        from configs import loading
        from nmm_jax.models.spec import Spec

        self._cuda = torch.cuda.is_available()
        self.batches = load_batches(folder)
        parsed, saved = loading.from_json(config), dict(np.load(weights))
        rates = saved.pop("learning rates")
        self._memory = HostMemory()
        self._trainer = torch_twin.Trainer(
            parsed,
            lambda t: float(rates[t]),
            torch_twin.state_dict(unflatten_dict(saved, sep="/"), Spec.from_config(parsed)),
            attention="flex" if self._cuda else "sdpa",
            device="cuda" if self._cuda else "cpu",
            compiled=compiled,
        )
        if self._cuda:
            torch.set_float32_matmul_precision("high")
        self._seconds: list[dict[str, float]] = []

    def step(self) -> float:
        """Waits after every part; on a GPU that is 10 us or so."""
        trainer, times = self._trainer, [time.perf_counter()]
        minimised, loss = trainer.forward(self.batches[trainer.steps % len(self.batches)])
        times.append(self._now())
        minimised.backward()
        times.append(self._now())
        trainer.update()
        times.append(self._now())
        self._seconds.append({part: b - a for part, a, b in zip(PARTS, times, times[1:], strict=False)})
        return loss.item()

    def peak_memory(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated() if self._cuda else self._memory.peak()

    def facts(self) -> dict[str, float]:
        first, *others = [sum(parts.values()) for parts in self._seconds]
        return {"compile_seconds": first - statistics.median(others)}

    def parts(self) -> dict[str, float]:
        medians = {part: statistics.median(s[part] for s in self._seconds[1:]) for part in PARTS}
        return {part: seconds / sum(medians.values()) for part, seconds in medians.items()}

    def _now(self) -> float:
        if self._cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()
