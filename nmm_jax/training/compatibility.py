"""What may differ between a checkpoint and the run that goes on from it.

Anything about how a run is carried out may: the mesh, the number of processes and workers, steps, schedule,
rates, checkpoints, logs. What decides the model's shape may not, nor what is frozen, which decides the optimizer's
state; what decides the data's order may, where data.accept_changed_plans says that it is meant.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs.loading import flatten, from_json

# Of the same parameters: other ways to compute with them, and to arrange the computation.
MODEL_FREE = (
    "model.attention", "model.remat", "model.scan_layers", "model.vocab_chunks", "model.dtype",
    "model.moe.balance_loss", "model.moe.z_loss", "model.moe.bias_rate", "model.moe.buffer_factor",
    "model.moe.transport", "model.moe.grouped_matmul", "model.contrastive.max_scale", "model.aim.pixel_weight",
    "model.deep.initial", "model.contrastive.scale", "model.contrastive.bias",  # only of the first weights
)  # fmt: skip
_MODEL_ALSO = ("image.size", "image.patch", "image.positions")
_DATA_FREE = (
    "data.root",  # the fingerprints tell whether the data is another
    "data.plans",
    "data.tokenizer",  # its fingerprint tells
    "data.workers",
    "data.worker_kind",
    "data.prefetch",
    "data.accept_changed_plans",
)
_DATA_ALSO = ("seed", "batch_rows", "row_length")


class IncompatibleCheckpoint(ValueError):
    """This checkpoint is of another model or of other data; the message says what differs."""


def differences(saved: ConfigDict, config: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """{key: (its value in the checkpoint, its value now)} of those that differ."""
    before, now = flatten(saved), flatten(config)
    return {key: (before[key], now[key]) for key in sorted(now) if before[key] != now[key]}


def check(meta: Mapping[str, Any], config: ConfigDict, fingerprints: Mapping[str, str], where: str) -> list[str]:
    """What differs and is allowed to, one line each.

    Args:
      meta: the checkpoint's, with "config" (JSON text) and "data" (fingerprints by name).
      config: of the run that would go on.
      fingerprints: of its data, by name.
      where: the checkpoint's path, for messages.

    Raises:
      IncompatibleCheckpoint: the model is another, or the data is and data.accept_changed_plans is off.
    """
    changed = differences(from_json(meta["config"]), config)
    lines = {key: f"{key} was {before!r}, is {now!r}" for key, (before, now) in changed.items()}
    model = [line for key, line in lines.items() if _is_model(key)]
    if model:
        raise IncompatibleCheckpoint(
            f"{where} holds another model: {'; '.join(model)}. Give the same values, or another --workdir"
        )
    frozen = lines.get("optimizer.freeze")
    if frozen:
        raise IncompatibleCheckpoint(
            f"{where} has the optimizer's state of other parameters: {frozen}. Give the same, or begin another run "
            "with its weights (start.decoder, start.vision, start.connector)"
        )
    data = [line for key, line in lines.items() if _is_data(key)]
    names = sorted({*meta["data"], *fingerprints})
    data += [f"{n} differs" for n in names if meta["data"].get(n) != fingerprints.get(n)]
    if data and not config.data.accept_changed_plans:
        raise IncompatibleCheckpoint(
            f"{where} was trained on other data: {'; '.join(data)}. Give the same data, or another --workdir, or go on "
            "with what there is now by --config.data.accept_changed_plans=true"
        )
    return [*(line for key, line in lines.items() if not _is_data(key)), *data]


def _is_model(key: str) -> bool:
    return key in _MODEL_ALSO or (key.startswith("model.") and key not in MODEL_FREE)


def _is_data(key: str) -> bool:
    inside = key.startswith(("data.", "image.")) and key not in _DATA_FREE + _MODEL_ALSO
    return inside or key in _DATA_ALSO
