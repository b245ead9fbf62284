"""On CPUs, a step's temporary memory is that of the step before.

XLA asks malloc for it anew in each step. glibc takes blocks so large from the system and gives them back when they are
freed, so that in each step the system clears them again, page by page: 21,600 pages of a step of
configs/moe.py:quickstart-dense, a quarter of its time. What the process keeps is there already. Only glibc's main arena
can hold such blocks, which is the main thread's: so steps are run by the thread that asks for them, none of XLA's.
"""

import ctypes

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_MOST = 2**31 - 1


def keep_freed() -> None:
    """Has this process keep the memory that it frees, if its devices are CPUs. Comes before anything touches a device.

    Does nothing to other allocators than glibc's, and little where several devices are simulated: each has a thread.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() == "cpu" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _MOST)
