"""What a person watches: where the run is and when it ends, on stderr of the first process.

On a terminal the line of the last logged step is rewritten in place; elsewhere each is a line of its own.
"""

import datetime
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax


class Progress:
    """The live line."""

    def __init__(self, start: int, steps: int, shown: bool):
        """A run from after step `start` to step `steps`."""
        self._start, self._steps, self._began = start, steps, time.perf_counter()
        self._shown = shown and jax.process_index() == 0
        self._live = sys.stderr.isatty()

    def show(self, line: Mapping[str, Any]) -> None:
        """`line` is one of metrics.jsonl."""
        if not self._shown:
            return
        step = line["step"]
        elapsed = time.perf_counter() - self._began
        left = datetime.timedelta(seconds=round(elapsed / (step - self._start) * (self._steps - step)))
        sources = ", ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in line.items() if k.startswith("loss/"))
        mfu = f"  mfu {line['speed/mfu']:.1%}" if "speed/mfu" in line else ""
        dropped = f"  dropped {line['moe/dropped_tokens']:,}" if line.get("moe/dropped_tokens") else ""
        text = (
            f"step {step}/{self._steps} ({step / self._steps:.0%})  loss {line['loss']:.4f} ({sources})  "
            f"{line['speed/tokens_per_second']:,.0f} tokens/s{mfu}{dropped}  "
            f"data wait {line['time/data_wait'] / line['time/step']:.0%}  ETA {left}"
        )
        print(f"\r\x1b[K{text}" if self._live else text, end="" if self._live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._shown and self._live:
            print(file=sys.stderr)


def say(remark: str) -> None:
    """A line of its own, from the first process."""
    if jax.process_index() == 0:
        print(remark, file=sys.stderr, flush=True)
