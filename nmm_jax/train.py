"""Trains a model, or goes on with it: the same command restarts a run from its last checkpoint, to the bit.

    python -m nmm_jax.train --config=configs/small.py --config.data.root=data --workdir=runs/small

A cooldown of any checkpoint of another run (a trunk, trained with schedule.cooldown = 0):

    python -m nmm_jax.train --config=configs/small.py --workdir=runs/cooled \\
        --config.trunk.workdir=runs/small --config.trunk.step=1000 --config.steps=1200 --config.schedule.cooldown=200

From scratch but for the weights of other runs, our own or imported (training/start.py):

    python -m nmm_jax.train --config=configs/late_fusion.py:small --config.start.vision=runs/clip --workdir=runs/late

Batch t is rows [t * batch_rows, (t + 1) * batch_rows) of the stream, so the step is the whole position in the data.
"""

import collections
import contextlib
import sys
import time
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from configs import command_line, loading
from data_pipelines import paths
from data_pipelines.loader import batches
from data_pipelines.plan import ensure_plans
from data_pipelines.stream import Stream
from nmm_jax import models
from nmm_jax.models.moe import check_platform
from nmm_jax.parallel import host_memory, processes
from nmm_jax.parallel.batches import abstract_batch, local_rows, to_global
from nmm_jax.parallel.chips import peak_flops
from nmm_jax.parallel.compiler_options import compile_with, compiler_options, keep_compiled
from nmm_jax.parallel.mesh import check_rows, make_mesh
from nmm_jax.parallel.sharding import divisor, replicated
from nmm_jax.scaling.counting import count
from nmm_jax.training import compatibility, goodput, metrics, preemption, start
from nmm_jax.training.checkpoints import Checkpoints
from nmm_jax.training.optimizer import make_optimizer
from nmm_jax.training.progress import Progress, say
from nmm_jax.training.schedule import ends, make_schedule
from nmm_jax.training.spool import PATIENCE, Spool, closing
from nmm_jax.training.state import State, abstract_state, initial_state
from nmm_jax.training.step import jit_step

AHEAD = 2  # steps that are queued on the devices while the host reads the metrics of the one before them


def train(config: ConfigDict, workdir: str) -> bool:
    """Trains until `config.steps`; False if SIGTERM ended it before, after saving a checkpoint."""
    if config.compiler.cache:
        keep_compiled(str(paths.reach(config.compiler.cache)))
    chief = jax.process_index() == 0
    folder = paths.reach(workdir)
    model = models.build(config)
    mesh = make_mesh(config, width=divisor(model.abstract, model.logical_axes))
    check_rows(config, mesh)
    check_platform(model.spec.moe, mesh)
    if chief:
        folder.mkdir(parents=True, exist_ok=True)
    clock = goodput.Goodput(folder if chief else None)
    clock.enter("plans")
    if chief:
        ensure_plans(config, "train")
    processes.meet("plans are made")
    stream = Stream.open(config, "train")
    if stream.tokenizer.vocab_size > config.model.vocab_size and config.model.family != "aim":  # which reads no text
        raise ValueError(
            f"model.vocab_size = {config.model.vocab_size} has no room for the {stream.tokenizer.vocab_size} tokens of "
            f"data.tokenizer = {config.data.tokenizer!r}; make it at least as large"
        )

    clock.enter("restore")
    optimizer = make_optimizer(config)
    abstract = abstract_state(model, optimizer, mesh)
    keep = config.checkpoint
    checkpoints = Checkpoints(workdir, keep=keep.keep, keep_every=keep.keep_every)
    state, meta = _restore(config, checkpoints, stream, abstract)
    if state is None:
        state = initial_state(model, optimizer, mesh, config.seed, start.load(config, model, mesh))
    first = meta["step"]
    clock.restored(first)
    seen = metrics.Seen.from_meta(meta["seen"], config.data.sources)
    if first >= config.steps:
        say(f"{workdir} is at step {first} of {config.steps}: there is nothing to do")
        checkpoints.close()
        clock.discard()
        return True

    writer = None
    if chief:
        paths.write_text(folder / "config.json", loading.to_json(config))
        writer = metrics.Writer(folder, first, config)

    clock.enter("compile")
    began = time.perf_counter()
    options = compiler_options(config, mesh)
    lowered = jit_step(model, optimizer, config, mesh).lower(abstract, abstract_batch(config, mesh), ends(config))
    step_fn = compile_with(lowered, options)
    told = ", ".join(f"{name}={value}" for name, value in options.items()) or "none"
    say(f"compiled in {time.perf_counter() - began:.1f} s; compiler options: {told}")
    processes.meet("compiled")

    counts, peak = count(config), peak_flops(jax.devices()[0])
    progress = Progress(first, config.steps, config.log.progress)
    speed = metrics.Speed(counts.training_flops, peak and peak * mesh.size)
    in_flight: collections.deque[tuple[int, Any, float]] = collections.deque()

    def settle(ahead: int) -> None:
        """Reads the metrics of all but the last `ahead` steps; they were sent to the host when they were made."""
        while len(in_flight) > ahead:
            step, values, data_wait = in_flight.popleft()
            values = jax.device_get(values)
            clock.finished(step)
            metrics.check_finite(step, values)
            seen.add(values)
            speed.add(values, data_wait)
            if step % config.log.every == 0 or step in (1, config.steps):
                logged = metrics.line(step, values, seen, speed.take())
                if writer:
                    writer.write(logged)
                progress.show(logged)

    def save(step: int, state: State) -> None:
        settle(0)  # a checkpoint comes after its metrics, and no checkpoint comes after a loss that is not finite
        data = {"config": loading.to_json(config), "data": stream.fingerprints, "seen": seen.to_meta()}
        with clock.within("checkpoint"):
            behind = None
            if writer:
                try:
                    writer.upload()
                except paths.BucketError as e:
                    say(f"{e}; saving the checkpoint, then trying again")
                    behind = writer
            checkpoints.save(step, state, data)
            if behind:  # the checkpoint is worth more than its lines, and SIGTERM leaves little time
                checkpoints.wait()
                behind.upload(PATIENCE)

    stop = preemption.Preemption()
    stopped = False
    local = local_batches(config, stream, mesh, first)
    profile = _Profile(config, folder, step_fn)
    until = jax.jit(lambda: ends(config), out_shardings=replicated(mesh))()
    clock.enter("steps")
    with jax.transfer_guard("disallow"), closing(writer) if writer else contextlib.nullcontext():
        for step in range(first + 1, config.steps + 1):
            with clock.within("profiler"):
                profile.before(step, state)
            asked = time.perf_counter()
            batch = next(local)
            data_wait = time.perf_counter() - asked
            if not in_flight or in_flight[-1][1]["loss"].is_ready():
                clock.waited(data_wait)  # and the devices had nothing left to do
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, values = step_fn(state, to_global(batch, mesh, config.batch_rows), until)
            jax.tree.map(lambda x: x.copy_to_host_async(), values)
            in_flight.append((step, values, data_wait))
            settle(AHEAD)
            stopped = stop.reached(step) and step < config.steps
            if stopped or step % keep.every == 0 or step == config.steps:
                save(step, state)
            if stopped:
                say(f"SIGTERM: saving step {step}; the same command goes on from there")
                break
    clock.enter("profiler")
    profile.close()
    clock.enter("checkpoint")
    checkpoints.close()
    clock.enter("shutdown")
    local.close()
    if stream.bad_images:
        say(f"{stream.bad_images} images could not be decoded; their documents counted for nothing")
    progress.close()
    say(clock.close(goodput.STOPPED if stopped else goodput.FINISHED).table())
    return not stopped


def local_batches(config: ConfigDict, stream: Stream, mesh: jax.sharding.Mesh, first: int) -> Any:
    """An iterator over what this process's devices have of batch `first` and those behind it."""
    c, rows = config.data, local_rows(mesh, config.batch_rows).tolist()
    # What a tower between patches and decoder has to do is as much as there are images.
    balanced_over = config.gradient_accumulation if config.model.family == "late_fusion" else 0
    return batches(stream, rows, config.batch_rows, first, c.workers, c.worker_kind, c.prefetch, balanced_over)


def _restore(
    config: ConfigDict, checkpoints: Checkpoints, stream: Stream, abstract: State
) -> tuple[State | None, dict[str, Any]]:
    """State and meta of where this run begins: its own last checkpoint, its trunk's, or none."""
    if checkpoints.steps():
        step = None
    elif config.trunk.workdir:
        checkpoints = Checkpoints(config.trunk.workdir, read_only=True)
        step = checkpoints.meta(None if config.trunk.step == -1 else config.trunk.step)["step"]
        cooldown = config.schedule.cooldown if config.schedule.kind == "wsd" else 0
        if step > config.steps - cooldown:
            raise ValueError(
                f"trunk.step = {step} comes after the cooldown's beginning, steps - schedule.cooldown = "
                f"{config.steps} - {cooldown}; for a cooldown right from there give --config.steps={step + cooldown}"
            )
        _warn_of_cooled_trunk(config, checkpoints.meta(step), step)
    else:
        return None, {"step": 0, "seen": metrics.Seen.nothing(config.data.sources).to_meta()}
    meta = checkpoints.meta(step)
    path = checkpoints.path(meta["step"])
    for difference in compatibility.check(meta, config, stream.fingerprints, str(path)):
        say(f"{path}: {difference}")
    state, meta = checkpoints.restore(meta["step"], abstract)
    say(f"going on from {path}")
    return state, meta


def _warn_of_cooled_trunk(config: ConfigDict, meta: dict[str, Any], step: int) -> None:
    """A trunk is trained at a constant rate; one that was cooled down before `step` has to be heated again."""
    before, now = (float(make_schedule(c)(max(step - 1, 0))) for c in (loading.from_json(meta["config"]), config))
    if before < 0.99 * now:
        say(
            f"trunk.step = {step} of {config.trunk.workdir} was trained at a learning rate of {before:.3g} and this "
            f"run goes on at {now:.3g}: that trunk was cooling down already. Take a checkpoint from before its "
            "cooldown, or train the trunk with schedule.cooldown = 0"
        )


class _Profile:
    """A trace of the steps [start, start + steps) of config.profile that this process makes, in workdir/profile.

    Beside it the text of the compiled step, by which nmm_jax.profile knows what an instruction of the trace is for.
    """

    def __init__(self, config: ConfigDict, folder: epath.Path, step_fn: Any):
        self._step_fn = step_fn
        self._steps = range(config.profile.start, config.profile.start + config.profile.steps)
        self._spool = Spool(folder / "profile")  # the profiler knows no buckets
        self._tracing = False

    def before(self, step: int, state: State) -> None:
        """Begins or ends the window, when the devices have done what was asked of them before this step."""
        if self._tracing == (step in self._steps):
            return
        jax.block_until_ready(state)
        if self._tracing:
            return self.close()
        self._spool.folder.mkdir(parents=True, exist_ok=True)
        (self._spool.folder / "program.txt").write_text(self._step_fn.as_text())
        jax.profiler.start_trace(str(self._spool.folder))
        self._tracing = True

    def close(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._spool.close()
            self._tracing = False


if __name__ == "__main__":
    CONFIG = loading.define_config_flag()
    WORKDIR = flags.DEFINE_string("workdir", None, "folder of this run", required=True)

    def main(_: list[str]) -> None:
        preemption.end_without_saving()
        processes.initialize()
        host_memory.keep_freed()
        if not train(CONFIG.value, WORKDIR.value):
            sys.exit(preemption.EXIT_CODE)

    command_line.run(main)
