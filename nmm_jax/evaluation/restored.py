"""The flags that name a trained model, and the model they name: what evaluate, generate and report start from."""

import os

from absl import flags

from data_pipelines import tokenizer
from nmm_jax.parallel import processes
from nmm_jax.training.checkpoints import Run, open_run

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run, as given to train")
_STEP = flags.DEFINE_integer("step", None, "checkpoint to restore; the last, unless given")
_DATA_ROOT = flags.DEFINE_string("data_root", None, "where the data is now, if no longer in the run's data.root")


def require() -> None:
    """Makes --workdir required; for the `__main__` of a command."""
    flags.mark_flag_as_required("workdir")


def workdir() -> str:
    return _WORKDIR.value


def restore() -> tuple[Run, tokenizer.Tokenizer]:
    """The run that the flags name, its parameters over all devices, and its tokenizer.

    Raises:
      CheckpointError: no such run or step (the message lists the steps there are).
      FileNotFoundError: the tokenizer is neither here nor in the data's root.
    """
    processes.initialize()
    run = open_run(_WORKDIR.value, _STEP.value)
    if _DATA_ROOT.value:
        with run.config.unlocked():
            run.config.data.root = os.path.abspath(_DATA_ROOT.value)
    return run, tokenizer.load(run.config.data.tokenizer, run.config.data.root)
