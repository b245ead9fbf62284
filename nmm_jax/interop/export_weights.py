"""Writes a run's weights as safetensors, in the layout of Hugging Face's library that fits its config.

    python -m nmm_jax.interop.export_weights --workdir=RUN --output=FOLDER [--step=N] [--dtype=bfloat16]

Early fusion becomes a decoder (Llama, OLMo-2, Qwen3 or Mixtral), an encoder its vision tower (CLIP, SigLIP or AIMv2),
late fusion LLaVA; where none fits, the keys in the way are named. FOLDER gets config.json, model.safetensors or shards
of it and their index, and the tokenizer.
"""

import collections
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tqdm
from absl import app, flags
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from configs import command_line
from configs.loading import from_json
from data_pipelines import tokenizer
from nmm_jax import models
from nmm_jax.interop import their_config
from nmm_jax.interop.axes import Axes
from nmm_jax.interop.errors import InteropError
from nmm_jax.interop.import_weights import TOKENIZER
from nmm_jax.interop.layouts import Rule, pixel_axes, summary
from nmm_jax.interop.tensors import Entry, plan, write, write_json
from nmm_jax.parallel import processes
from nmm_jax.parallel.sharding import param_shardings
from nmm_jax.training.checkpoints import Checkpoints
from nmm_jax.training.progress import say
from nmm_jax.training.state import mesh_for

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def export_weights(
    workdir: str, output: str | os.PathLike, step: int | None = None, dtype: str = "float32", max_shard: int = 4 * 10**9
) -> None:
    """Writes the folder. All processes call it; the first one writes.

    Args:
      step: of the checkpoint; None is the last.
      max_shard: bytes of a file, at most, unless one tensor has more.

    Raises:
      InteropError: no layout fits the run's config, or `output` has weights already.
    """
    folder = pathlib.Path(output)
    if any(folder.glob("*.safetensors*")) or (folder / "config.json").exists():
        raise InteropError(f"{folder} holds a model already; give another --output")
    checkpoints = Checkpoints(workdir, read_only=True)
    meta = checkpoints.meta(step)
    step, config = meta["step"], from_json(meta["config"])
    tokens = meta.get("imported", {}).get("tokens", {}) | _special_tokens(config)
    target = their_config.write(config, tokens, dtype)

    model = models.build(config)
    shapes = {name: x.shape for name, x in _flat(checkpoints.abstract_params(step)).items()}
    rules = _rules(target, model, shapes, str(checkpoints.path(step)))
    say(f"{checkpoints.path(step)} as {target.kind}")
    for line in summary(shapes.keys() - {rule.ours for rule in rules}):
        say(f"left out: {line}, which has no place there")
    for note in target.notes:
        say(f"not there: {note}")

    pieces: dict[str, list[tuple[Rule, Axes, tuple[int, ...]]]] = {}  # of ours that their tensors are made of, in order
    known = pixel_axes(config.image.patch)
    for rule in sorted(rules, key=lambda rule: rule.part):
        axes = rule.axes_of(shapes[rule.ours], known)
        for place, name in rule.tensors(shapes[rule.ours]):
            pieces.setdefault(name, []).append((rule, axes, place))
    entries = [
        Entry(name, (sum(axes.shape[0] for _, axes, _ in of), *of[0][1].shape[1:]), DTYPES[dtype])
        for name, of in pieces.items()
    ]

    shardings = _flat(param_shardings(model.abstract, model.logical_axes, mesh_for(model)))
    wanted = {r.ours: jax.ShapeDtypeStruct(shapes[r.ours], np.float32, sharding=shardings[r.ours]) for r in rules}
    params = _flat(checkpoints.restore_some(step, unflatten_dict(wanted, sep="/")))

    def tensors() -> Iterator[np.ndarray]:
        for name in tqdm.tqdm(pieces, desc="writing", unit="tensors", disable=jax.process_index() > 0):
            parts = [axes.write(_whole(params[rule.ours], place)) for rule, axes, place in pieces[name]]
            yield (np.concatenate(parts) if len(parts) > 1 else parts[0]).astype(DTYPES[dtype], copy=False)

    files = plan(entries, max_shard)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, files, tensors())
        if target.processor:
            write_json(folder / "preprocessor_config.json", target.processor)
        for own in (epath.Path(config.data.root) / config.data.tokenizer, epath.Path(config.data.tokenizer)):
            if own.is_file():
                (folder / TOKENIZER).write_bytes(own.read_bytes())
        write_json(folder / "config.json", target.config)
    else:
        collections.deque(tensors(), maxlen=0)  # all processes take part in gathering each
    multihost_utils.sync_global_devices("exported")
    size = sum(e.bytes for e in entries)
    say(f"{folder}: {len(entries)} tensors, {size / 1e9:.3f} GB in {len(files)} file{'s' * (len(files) > 1)}")


def _rules(
    target: their_config.Target, model: models.Model, shapes: Mapping[str, tuple[int, ...]], where: str
) -> list[Rule]:
    """Those of the layout that the checkpoint has parameters for."""
    layout, ours = target.layout, _flat(model.abstract)
    missing = [name for name in ours if name in layout.paths and name not in shapes]
    unknown = [name for name in shapes if name.split("/")[0] in layout.parts and name not in layout.paths]
    if missing or unknown:
        lines = [f"{where} does not fit the layout {target.kind}."]
        lines += [f"  not there: {', '.join(missing)}"] if missing else []
        lines += [f"  without a place: {', '.join(unknown)}"] if unknown else []
        raise InteropError("\n".join(lines))
    return [rule for rule in layout.rules if rule.ours in shapes]


def _whole(array: jax.Array, place: tuple[int, ...]) -> np.ndarray:
    """array[place] on the host."""
    for i in place:
        array = jax.lax.dynamic_index_in_dim(array, i, keepdims=False)
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _special_tokens(config: ConfigDict) -> dict[str, int]:
    """Their ids in the run's tokenizer; {} if it is not there."""
    try:
        found = tokenizer.load(config.data.tokenizer, config.data.root)
    except (FileNotFoundError, tokenizer.TokenizerError):
        return {}
    return {name: getattr(found, name) for name in tokenizer.SPECIALS}


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")


def _bytes(text: str) -> int:
    """Of "4GB"."""
    found = re.fullmatch(r"([0-9.]+)\s*([KMG]?B?)", text.strip().upper())
    if not found or found[2] not in _UNITS:
        raise app.UsageError(f"--max_shard={text}: expected a size such as 4GB or 500MB")
    return int(float(found[1]) * _UNITS[found[2]])


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    OUTPUT = flags.DEFINE_string("output", None, "folder to make", required=True)
    STEP = flags.DEFINE_integer("step", None, "checkpoint to write; the last, unless given")
    DTYPE = flags.DEFINE_enum("dtype", "float32", list(DTYPES), "of the tensors; bfloat16 rounds them")
    MAX_SHARD = flags.DEFINE_string("max_shard", "4GB", "size of a file, at most")

    def main(_: list[str]) -> None:
        size = _bytes(MAX_SHARD.value)
        processes.initialize()
        export_weights(WORKDIR.value, OUTPUT.value, STEP.value, DTYPE.value, size)

    command_line.run(main)
