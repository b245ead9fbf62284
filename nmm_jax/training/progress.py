"""The live line: where the run is and when it ends. Rewritten in place on a terminal, else printed line by line."""

import datetime
import sys
import time
from collections.abc import Mapping
from typing import Any


class Progress:
    """Prints to stderr what of a metrics line a person watches."""

    def __init__(self, start: int, steps: int):
        self._start, self._steps, self._began = start, steps, time.perf_counter()
        self._live = sys.stderr.isatty()

    def show(self, line: Mapping[str, Any]) -> None:
        step = line["step"]
        elapsed = time.perf_counter() - self._began
        left = datetime.timedelta(seconds=round(elapsed / max(step - self._start, 1) * (self._steps - step)))
        sources = ", ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in line.items() if k.startswith("loss/"))
        mfu = f"  mfu {line['speed/mfu']:.1%}" if "speed/mfu" in line else ""
        text = (
            f"step {step}/{self._steps} ({step / self._steps:.0%})  loss {line['loss']:.4f} ({sources})  "
            f"{line['speed/tokens_per_second']:,.0f} tokens/s{mfu}  "
            f"data wait {line['time/data_wait'] / line['time/step']:.0%}  ETA {left}"
        )
        print(f"\r\x1b[K{text}" if self._live else text, end="" if self._live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._live:
            print(file=sys.stderr)
