"""SIGTERM: the cluster wants the machines back. The run saves a checkpoint and ends."""

import signal

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 128 + signal.SIGTERM  # not 0: whoever restarts failed jobs should restart this one


class Preemption:
    """Tells the loop when to stop, all processes at the same step."""

    def __init__(self) -> None:
        self._told = False
        # With several processes JAX's own handler is told, and agrees with the others on a step.
        self._alone = jax.process_count() == 1
        if self._alone:
            signal.signal(signal.SIGTERM, self._note)

    def reached(self, step: int) -> bool:
        """Whether to save now and end; every process asks after every step."""
        return self._told if self._alone else multihost_utils.reached_preemption_sync_point(step)

    def _note(self, *_: object) -> None:
        self._told = True
