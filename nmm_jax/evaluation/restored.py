"""A trained model and its tokenizer, as evaluate, generate and report are told on the command line to find them."""

from absl import flags

from data_pipelines import paths, store, tokenizer
from nmm_jax.parallel import processes
from nmm_jax.training.checkpoints import Run, open_run


def restore(workdir: str, step: int | None = None, data_root: str = "") -> tuple[Run, tokenizer.Tokenizer]:
    """The run with its parameters of `step` (None: the last) over all devices, and its tokenizer.

    Args:
      data_root: where the data is now, if no longer in the run's data.root.

    Raises:
      CheckpointError: no such run or step (the message lists the steps there are).
      TokenizerError: the tokenizer is neither here nor in the data's root.
      ValueError: the data is in a bucket.
    """
    run = open_run(workdir, step)
    if data_root:
        with run.config.unlocked():
            run.config.data.root = str(paths.absolute(data_root))
    store.require_on_disk(run.config.data.root)
    return run, tokenizer.load(run.config.data.tokenizer, run.config.data.root)


class RunFlags:
    """Defines --workdir, --step and --data_root; for the `__main__` of a command."""

    def __init__(self):
        self._workdir = flags.DEFINE_string("workdir", None, "folder of the run, as given to train", required=True)
        self._step = flags.DEFINE_integer("step", None, "checkpoint to restore; the last, unless given")
        self._data_root = flags.DEFINE_string("data_root", "", "where the data is now, if no longer in data.root")

    @property
    def workdir(self) -> str:
        return self._workdir.value

    def restore(self) -> tuple[Run, tokenizer.Tokenizer]:
        """Joins the other processes, if there are any, and restores."""
        processes.initialize()
        return restore(self._workdir.value, self._step.value, self._data_root.value)
