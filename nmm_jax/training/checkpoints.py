"""Checkpoints of a run: workdir/checkpoints/<step>/, written by Orbax in the background.

Each holds `params` and `progress` (step and optimizer) as arrays of any size, and as JSON the config, the
fingerprints of the data and the host's counters. A checkpoint appears under its name when it is complete and not
before; a killed save leaves a folder with `tmp` in its name, which nobody reads and the next run removes.
They are read onto any mesh and any number of processes.

In a bucket (gs://, s3://) nothing can be renamed: there a checkpoint is complete when it has a commit_success.txt.
"""

import contextlib
import dataclasses
import errno
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils

from configs.loading import from_json
from data_pipelines import paths
from nmm_jax import models
from nmm_jax.parallel.sharding import param_shardings
from nmm_jax.training import orbax_on_s3
from nmm_jax.training.state import State, mesh_for

Meta = dict[str, Any]

# Orbax tells some fifty lines a save, as information (level 20), to the log that it shares with us.
logging.get_absl_handler().addFilter(lambda r: r.levelno > 20 or "orbax" not in r.pathname)


class CheckpointError(RuntimeError):
    """A checkpoint could not be found, written or read; the message names its path and what to do."""


class Checkpoints:
    """The checkpoints of one run. All processes make every call, in the same order."""

    def __init__(self, workdir: str, *, keep: int = 1, keep_every: int = 0, read_only: bool = False):
        """Keeps the last `keep`, and for ever those at multiples of `keep_every` (0: none).

        Args:
          workdir: of the run.
          read_only: touches nothing there, so that another process may be writing.

        Raises:
          CheckpointError: there is nothing to read.
          BucketError: the bucket that `workdir` is in cannot be reached.
        """
        self.folder = paths.reach(workdir) / "checkpoints"
        if read_only and not self.folder.is_dir():
            raise CheckpointError(f"{workdir} is no run: it has no folder `checkpoints`; give the --workdir of train")
        if not read_only and jax.process_index() == 0:
            # Now, and not in the background as Orbax does, where it could meet a new save under the same name.
            for leftover in _leftovers(self.folder):
                leftover.rmtree()
        policies = ocp.training.preservation_policies
        preserved = [policies.LatestN(keep)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.PreserveAll() if read_only else policies.AnyPreservationPolicy(preserved),
            context=_context(self.folder),
        )
        self._saving: tuple[int, Any] | None = None

    def steps(self) -> list[int]:
        """Of the complete checkpoints, ascending."""
        return [c.step for c in self._checkpointer.checkpoints]

    def save(self, step: int, state: State, meta: Meta) -> None:
        """Copies the state off the devices and writes it in the background; waits for the save before this one.

        Raises:
          CheckpointError: that save, or this one's beginning, failed.
        """
        self.wait()
        if step in self.steps():
            return
        arrays = {"params": state["params"], "progress": {k: v for k, v in state.items() if k != "params"}}
        try:
            response = self._checkpointer.save_checkpointables_async(step, arrays, force=True, custom_metadata=meta)
        except Exception as e:
            raise self._not_saved(step, e) from e
        self._saving = (step, response)

    def wait(self) -> None:
        """Returns when what was begun is written.

        Raises:
          CheckpointError: it could not be.
        """
        if self._saving is None:
            return
        (step, response), self._saving = self._saving, None
        try:
            response.result()
        except Exception as e:
            raise self._not_saved(step, e) from e

    def close(self) -> None:
        self.wait()
        self._checkpointer.close()

    def meta(self, step: int | None = None) -> Meta:
        """What `save` was given, and its "step"; of the last checkpoint, unless told."""
        step = self._existing(step)
        return {**self._checkpointer.checkpointables_metadata(step).custom_metadata, "step": step}

    def restore(self, step: int | None, abstract: State) -> tuple[State, Meta]:
        """The state of `step` (None: the last), each array as `abstract` says: shape, type and sharding."""
        step = self._existing(step)
        wanted = {"params": abstract["params"], "progress": {k: v for k, v in abstract.items() if k != "params"}}
        read = self._read(step, wanted)
        return {**read["progress"], "params": read["params"]}, self.meta(step)

    def restore_params(self, step: int | None, abstract_params: Any) -> tuple[Any, Meta, int]:
        """The parameters alone; the optimizer's moments are not read."""
        step = self._existing(step)
        return self._read(step, {"params": abstract_params})["params"], self.meta(step), step

    def abstract_params(self, step: int) -> Any:
        """Shapes and types of the parameters, as they were saved; reads none."""
        saved = self._checkpointer.checkpointables_metadata(step).metadata["params"]
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)

    def restore_some(self, step: int, abstract_params: Any) -> Any:
        """Some of the parameters: those in this tree, and nothing else is read."""
        return self._read(step, {"params": abstract_params}, partial=True)["params"]

    def path(self, step: int) -> epath.Path:
        return self.folder / str(step)

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise CheckpointError(
                f"{self.folder} holds no complete checkpoint yet; train saves one each checkpoint.every"
            )
        if step is None:
            return steps[-1]
        if step not in steps:
            raise CheckpointError(f"{self.folder} holds no checkpoint of step {step}; it has {steps}")
        return step

    def _read(self, step: int, wanted: dict[str, Any], partial: bool = False) -> dict[str, Any]:
        context = _context(self.folder)
        context.pytree.loading.partial_load = partial
        # What is being read is in memory twice. Orbax refuses an array that alone exceeds the limit.
        largest = max(x.size * max(4, x.dtype.itemsize) for x in jax.tree.leaves(wanted))
        context.memory.read_concurrent_bytes = largest * 2
        try:
            with context, _mapped_files():
                return self._checkpointer.load_checkpointables(step, wanted)
        except Exception as e:
            raise CheckpointError(
                f"{self.path(step)} could not be read into this model ({_first_line(e)}); if its files are damaged, "
                f"remove that folder to go on from the one before it (there are {self.steps()})"
            ) from e

    def _not_saved(self, step: int, error: Exception) -> CheckpointError:
        intact = f"the checkpoints {self.steps()} before it are intact" if self.steps() else "there is none before it"
        if _is_full(error):
            return CheckpointError(
                f"the disk is full: checkpoint {step} could not be written to {self.path(step)}; {intact}. Make room "
                "(or lower checkpoint.keep) and restart the same command"
            )
        return CheckpointError(
            f"checkpoint {step}, {self.path(step)}, was not written ({_first_line(error)}); {intact}"
        )


def _context(folder: epath.Path) -> ocp.Context:
    context = ocp.Context()
    context.array.saving.use_compression = False  # weights shrink by 8 % and take twice as long to read
    if str(folder).startswith("s3://"):
        orbax_on_s3.teach()
    if paths.is_remote(folder):
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    return context


@contextlib.contextmanager
def _mapped_files() -> Iterator[None]:
    """Meanwhile TensorStore maps files on disks, so that arrays are copied out of the page cache once and not twice.

    A third less time, and less memory. Orbax (0.12.8) has no option for it; another Orbax may read as it always does.
    """
    names = "_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT"
    settings = [getattr(tensorstore_utils, name, {}) for name in names]
    for setting in settings:
        setting["file_io_mode"] = {"mode": "memmap"}
    try:
        yield
    finally:
        for setting in settings:
            del setting["file_io_mode"]


def _leftovers(folder: epath.Path) -> list[epath.Path]:
    """What killed saves left."""
    if not paths.is_remote(folder):
        return list(folder.glob("*.orbax-checkpoint-tmp*"))
    there = folder.iterdir() if folder.exists() else ()
    return [saved for saved in there if saved.name.isdigit() and not (saved / "commit_success.txt").exists()]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def _is_full(error: BaseException | None) -> bool:
    """Whether this error, or one that led to it, is about space; TensorStore reports that as text."""
    while error is not None:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model, for evaluation and generation."""

    config: ConfigDict  # the checkpoint's
    model: models.Model
    params: Any
    step: int
    mesh: Mesh

    @property
    def language_model(self) -> models.LanguageModel:
        """The model, where text is asked of it.

        Raises:
          ValueError: the run is an encoder's.
        """
        if not isinstance(self.model, models.LanguageModel):
            raise ValueError(
                f"this run is an encoder (model.family = {self.config.model.family!r}) and writes no text; "
                "python -m nmm_jax.evaluate measures what it does, and start.vision of another run takes its tower"
            )
        return self.model


def open_run(workdir: str, step: int | None = None, mesh: Mesh | None = None) -> Run:
    """The model of a run with its parameters of `step` (None: the last), on `mesh`.

    The mesh (where none is given) and how experts are computed and reached are chosen for the devices there are,
    whatever the run's config says.

    Raises:
      CheckpointError: `workdir` is no run, or has no such checkpoint.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    config = from_json(checkpoints.meta(step)["config"])
    with config.unlocked():
        config.model.moe.transport = config.model.moe.grouped_matmul = "auto"
    model = models.build(config)
    if mesh is None:
        mesh = mesh_for(model)
    there = checkpoints.abstract_params(checkpoints.meta(step)["step"])
    if missing := sorted(model.abstract.keys() - there.keys()):
        raise CheckpointError(
            f"{workdir} holds {', '.join(sorted(there))} and no {', '.join(missing)}: a part of a model to start from; "
            f"name it in --config.start.{'vision' if 'vision' in there else 'decoder'} of a run"
        )
    shardings = param_shardings(model.abstract, model.logical_axes, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), model.abstract, shardings)
    params, _, step = checkpoints.restore_params(step, abstract)
    logging.info("restored step %d of %s", step, workdir)
    return Run(config, model, params, step, mesh)
