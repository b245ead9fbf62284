"""SIGTERM: the cluster wants the machines back. The run saves a checkpoint and ends."""

import os
import signal

from jax._src import distributed  # whether JAX listens for SIGTERM is nowhere public
from jax.experimental import multihost_utils

EXIT_CODE = 128 + signal.SIGTERM  # not 0: whoever restarts failed jobs should restart this one


def end_without_saving() -> None:
    """Until there is something to save, SIGTERM ends the process, once the compilation under way is done.

    Not by itself: the first process of a container is not sent signals that it does nothing about. With several
    processes JAX's own handler takes over as soon as they have met.
    """
    signal.signal(signal.SIGTERM, _end)


def _end(*_: object) -> None:
    os.write(2, b"SIGTERM before the first step: there is nothing to save\n")
    os._exit(EXIT_CODE)  # an exception could be lost in a callback


class Preemption:
    """Tells the loop when to stop, all processes at the same step."""

    def __init__(self) -> None:
        self._told = False
        # A process that joined others, were it the only one, has JAX's own handler: told from then on, also while the
        # step compiles, it agrees with the others on a step.
        self._alone = distributed.global_state.preemption_sync_manager is None
        if self._alone:
            signal.signal(signal.SIGTERM, self._note)

    def reached(self, step: int) -> bool:
        """Whether to save now and end; every process asks after every step."""
        return self._told if self._alone else multihost_utils.reached_preemption_sync_point(step)

    def _note(self, *_: object) -> None:
        self._told = True
