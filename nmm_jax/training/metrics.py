"""metrics.jsonl, the run's numbers: one line a logged step, and TensorBoard and Weights & Biases beside it.

    {"step": 20, "loss": 5.1, "loss/captions": 4.9, "learning_rate": 0.001, ..., "tokens": 81920, "time/step": 0.1}

A model with experts has `moe/` keys too. Of this step: the router's losses (0 where there is no router), load_imbalance
(the busiest expert's tokens over its group's mean; the mean of layers), router_entropy (nats; the mean of tokens and
layers) and tokens_per_expert (a list of experts for each layer that has them). Of the run so far: dropped_tokens.

Late fusion has `vision/empty`: of the image slots that the vision tower went through in the run so far, the share that
held no image. An objective of several terms has each one's loss, `loss_text` and `loss_pixels`; `loss` and
`loss/<source>` are their weighted sums. What contrastive training tells is under `contrastive/`.

Keys that start with `time/`, `speed/` or `memory/` depend on the machine; all others are the same to the bit
whenever the same run is repeated or goes on from a checkpoint. After a restart the file tells the surviving
trajectory: lines after the restored step, and a torn last line, are dropped first.

A run directory in a bucket gets the files whole, in the background and before each checkpoint (training/spool.py): so
whatever checkpoint a run goes on from, on whichever machine, the lines up to it are there.
"""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from data_pipelines import paths
from nmm_jax.training.spool import Spool
from nmm_jax.training.wandb_board import WandbBoard

Fetched = Mapping[str, Any]  # a step's metrics (training/step.py) on the host


class Diverged(RuntimeError):
    """The loss, a gradient or a parameter is no finite number any more."""


def check_finite(step: int, metrics: Fetched) -> None:
    """Raises Diverged if step number `step` ended in numbers that no later step can recover from."""
    for name in ("loss", "grad_norm", "param_norm"):
        if not math.isfinite(metrics[name]):
            raise Diverged(
                f"{name} is {metrics[name]} at step {step}. Checkpoints are from before it. Restart with a lower "
                "optimizer.learning_rate, a longer schedule.warmup or a smaller optimizer.clip_norm; "
                "model.qk_norm and optimizer.z_loss help where it comes back"
            )


@dataclasses.dataclass
class Seen:
    """What the run has been trained on so far, in exact integers."""

    tokens: dict[str, int]  # real positions by source
    images: int = 0
    dropped: int = 0  # (token, choice) pairs that found no room in a bounded buffer, in all layers
    vision_slots: int = 0  # image slots that a vision tower went through, filled or not

    @classmethod
    def nothing(cls, sources: Sequence[str]) -> "Seen":
        return cls(dict.fromkeys(sources, 0))

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], sources: Sequence[str]) -> "Seen":
        tokens = {s: meta["tokens"].get(s, 0) for s in sources}
        return cls(tokens, meta["images"], meta.get("dropped", 0), meta.get("vision_slots", 0))

    def to_meta(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def add(self, metrics: Fetched) -> None:
        for source, count in zip(self.tokens, metrics["tokens_by_source"], strict=True):
            self.tokens[source] += int(count)
        self.images += int(metrics["images"])
        self.vision_slots += int(metrics["vision_slots"])
        if metrics["router"]:
            self.dropped += int(metrics["router"]["dropped_tokens"].sum())


@dataclasses.dataclass
class Speed:
    """Rates since the last line."""

    training_flops: Callable[[int, float, int], float]  # of tokens, (query, key) pairs that attention needs, images
    peak_flops: float | None  # of all devices together
    since: float = dataclasses.field(default_factory=time.perf_counter)
    steps: int = 0
    tokens: int = 0
    images: int = 0
    pairs: float = 0.0
    data_wait: float = 0.0

    def add(self, metrics: Fetched, data_wait: float) -> None:
        self.steps += 1
        self.tokens += int(metrics["tokens_by_source"].sum())
        self.images += int(metrics["images"])
        self.pairs += float(metrics["attended_pairs"])
        self.data_wait += data_wait

    def take(self) -> dict[str, float]:
        """The rates, and a new beginning."""
        now = time.perf_counter()
        seconds = now - self.since
        flops = self.training_flops(self.tokens, self.pairs, self.images)
        rates = {
            "time/step": seconds / self.steps,
            "time/data_wait": self.data_wait / self.steps,
            "speed/tokens_per_second": self.tokens / seconds,
            "speed/images_per_second": self.images / seconds,
            "speed/tflops_per_second": flops / seconds / 1e12,
        }
        if self.peak_flops:
            rates["speed/mfu"] = flops / seconds / self.peak_flops
        memory = jax.local_devices()[0].memory_stats()
        if memory:  # None on CPU
            rates["memory/peak_gib"] = memory["peak_bytes_in_use"] / 2**30
        self.since, self.steps, self.tokens, self.images, self.pairs, self.data_wait = now, 0, 0, 0, 0.0, 0.0
        return rates


def line(step: int, metrics: Fetched, seen: Seen, rates: Mapping[str, float]) -> dict[str, Any]:
    """What is logged of step number `step`; a source without targets in this batch has no loss."""
    sums = zip(seen.tokens, metrics["loss_sum_by_source"], metrics["mask_sum_by_source"], strict=True)
    return {
        "step": step,
        "loss": float(metrics["loss"]),
        **{f"loss/{source}": float(total / count) for source, total, count in sums if count > 0},
        **(
            {f"loss_{name}": float(loss) for name, loss in metrics["terms"].items()}
            if len(metrics["terms"]) > 1
            else {}
        ),
        "learning_rate": float(metrics["learning_rate"]),
        "grad_norm": float(metrics["grad_norm"]),
        "param_norm": float(metrics["param_norm"]),
        "tokens": sum(seen.tokens.values()),
        **{f"tokens/{source}": count for source, count in seen.tokens.items()},
        "images": seen.images,
        **({"vision/empty": 1 - seen.images / seen.vision_slots} if seen.vision_slots else {}),
        **{name: float(value) for name, value in metrics["logged"].items()},
        **_of_router(metrics["router"], int(metrics["tokens_by_source"].sum()), seen.dropped),
        **rates,
    }


def _of_router(router: Fetched, tokens: int, dropped: int) -> dict[str, Any]:
    if not router:
        return {}
    by_expert = router["expert_tokens"].sum(1)  # [L,E]
    return {
        "moe/balance_loss": float(router["balance_loss"]),
        "moe/router_z_loss": float(router["router_z_loss"]),
        "moe/router_entropy": float(router["router_entropy"].sum() / len(by_expert) / max(tokens, 1)),
        "moe/load_imbalance": float(router["load_imbalance"].mean()),
        "moe/dropped_tokens": dropped,
        "moe/tokens_per_expert": by_expert.tolist(),
    }


def trim(path: epath.Path | pathlib.Path, step: int) -> None:
    """Drops the lines after `step` and a torn last line, atomically."""
    if not path.exists():
        return
    text = path.read_text()
    kept = [whole for whole in text.splitlines(keepends=True) if whole.endswith("\n") and _step_of(whole, path) <= step]
    if "".join(kept) != text:
        paths.write_text(path, "".join(kept))


def _step_of(whole_line: str, path: epath.Path | pathlib.Path) -> int:
    try:
        return int(json.loads(whole_line)["step"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: {whole_line.strip()[:80]!r} is no line of metrics; move the file away") from e


class Writer:
    """Appends lines to workdir/metrics.jsonl; a line is there when `write` returns, in a bucket when `upload` does."""

    def __init__(self, workdir: epath.Path | pathlib.Path, step: int, config: ConfigDict):
        """Goes on after `step`. Of the config it is told which boards get the lines as well."""
        folder = epath.Path(workdir)
        trim(folder / "metrics.jsonl", step)
        self._spool = Spool(folder)
        self._file = self._spool.file("metrics.jsonl").open("a")
        self._board = SummaryWriter(str(self._spool.folder), purge_step=step + 1) if config.log.tensorboard else None
        self._wandb = WandbBoard(folder, config) if config.log.wandb else None
        self._spool.upload()

    def write(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._board:
            for name, value in values.items():
                if name != "step" and not isinstance(value, list):
                    self._board.add_scalar(name, value, values["step"])
        if self._wandb:
            self._wandb.write(values)

    def upload(self, patience: float = 0.0) -> None:
        """Returns when all lines are in workdir, wherever that is (Spool.upload)."""
        if self._board:
            self._board.flush()
        self._spool.upload(patience)

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.close()
        self._spool.close()
