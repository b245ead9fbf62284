"""Makes a run of weights in a layout of Hugging Face's library: to evaluate, to generate with, to begin others with.

    python -m nmm_jax.interop.import_weights --input=FOLDER --workdir=RUN

FOLDER has config.json, model.safetensors (or its shards and their index), and perhaps tokenizer.json and
preprocessor_config.json. RUN gets config.json, checkpoints/0 with float32 parameters, and tokenizer.json. Parameters
are read shard by shard onto all devices; docs/interop.md tells which layouts there are and what is left out.
"""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from configs import command_line, loading
from data_pipelines import paths, tokenizer
from nmm_jax import models
from nmm_jax.interop import special_tokens, their_config
from nmm_jax.interop.axes import Index
from nmm_jax.interop.errors import InteropError
from nmm_jax.interop.layouts import Rule, match, pixel_axes
from nmm_jax.interop.tensors import Folder
from nmm_jax.interop.their_config import Source
from nmm_jax.parallel import processes
from nmm_jax.parallel.sharding import param_shardings, replicated
from nmm_jax.training.checkpoints import Checkpoints
from nmm_jax.training.metrics import Seen
from nmm_jax.training.progress import say
from nmm_jax.training.state import mesh_for

TOKENIZER = "tokenizer.json"


def import_weights(folder: str | os.PathLike, workdir: str | os.PathLike) -> None:
    """Makes the run. All processes call it.

    Raises:
      InteropError: the folder cannot be read, or is of a model that we have no counterpart of.
    """
    source_folder, run = pathlib.Path(folder), paths.reach(workdir)
    source = their_config.read(source_folder)
    tensors = Folder(source_folder)
    config = source.config
    model = models.build(config)
    checkpoints = Checkpoints(str(run))
    if checkpoints.steps():
        raise InteropError(f"{run} has checkpoints already, of steps {checkpoints.steps()}; give another --workdir")
    mesh = mesh_for(model)
    params = load(tensors, source, model, mesh)
    for note in source.notes:
        say(f"{source_folder / 'config.json'}: {note}")
    if jax.process_index() == 0:
        run.mkdir(parents=True, exist_ok=True)
        if (source_folder / TOKENIZER).is_file():
            _adopt_tokenizer(source_folder / TOKENIZER, run / TOKENIZER, source)
    with config.unlocked():
        config.data.tokenizer = str(run / TOKENIZER)
    text = loading.to_json(config)
    seen = Seen.nothing(config.data.sources).to_meta()
    meta = {"config": text, "data": {}, "seen": seen, "imported": {"layout": source.kind, "tokens": source.tokens}}
    step = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=replicated(mesh))()
    checkpoints.save(0, {"step": step, "params": params}, meta)
    checkpoints.close()
    if jax.process_index() == 0:
        paths.write_text(run / "config.json", text)
    multihost_utils.sync_global_devices("imported")
    size = sum(x.size for x in jax.tree.leaves(params))
    say(f"{run}: {size:,} parameters of {source.kind}, checkpoint 0")


def load(tensors: Folder, source: Source, model: models.Model, mesh: Mesh) -> dict[str, Any]:
    """The parameters, float32, each shard read by the process that has its device.

    Raises:
      InteropError: tensors are missing, left over, or of another shape or type.
    """
    layout, config = source.layout, source.config
    parts = (*layout.parts, *layout.zeros)
    shapes = {name: x.shape for name, x in _flat(model.abstract).items() if name.split("/")[0] in parts}
    shardings = _flat(param_shardings(model.abstract, model.logical_axes, mesh))
    matched = match(layout, shapes, tensors.names(), str(tensors.path))
    for line in matched.left_out:
        say(f"left out: {line}")
    known = pixel_axes(config.image.patch)
    for rule in matched.rules:
        axes = rule.axes_of(shapes[rule.ours], known)
        for _, name in rule.tensors(shapes[rule.ours]):
            tensors.check(matched.names[name], (axes.shape[0] * rule.part[1], *axes.shape[1:]))

    loaded: dict[str, jax.Array] = {}
    rules = {rule.ours: rule for rule in matched.rules}
    if zeros := shapes.keys() - rules.keys():
        say(f"not there, zeros here: {', '.join(sorted(zeros))}")
    for name in tqdm.tqdm(shapes, desc="reading", unit="parameters", disable=jax.process_index() > 0):
        shape, sharding = shapes[name], shardings[name]
        if name in rules:
            loaded[name] = _array(tensors, matched.names, rules[name], shape, known, sharding)
        else:
            loaded[name] = jax.jit(lambda shape=shape: jnp.zeros(shape), out_shardings=sharding)()
    return unflatten_dict(loaded, sep="/")


def _array(
    tensors: Folder,
    names: dict[str, str],
    rule: Rule,
    shape: tuple[int, ...],
    known: dict[str, int],
    sharding: NamedSharding,
) -> jax.Array:
    axes = rule.axes_of(shape, known)
    offset = axes.shape[0] * rule.part[0]

    def shard(index: Index) -> np.ndarray:
        """Filled tensor by tensor, of each of which only what lies in the shard is read."""
        ranges = [range(*i.indices(n)) for i, n in zip(index, shape, strict=True)]
        filled = np.empty([len(r) for r in ranges], np.float32)
        stacked = ranges[: rule.stacked]
        for place, name in rule.tensors(shape):
            if all(i in own for i, own in zip(place, stacked, strict=True)):

                def piece(theirs: Index, name: str = name) -> np.ndarray:
                    first, last, _ = theirs[0].indices(axes.shape[0])
                    return tensors.read(names[name], (slice(first + offset, last + offset), *theirs[1:]))

                here = tuple(i - own.start for i, own in zip(place, stacked, strict=True))
                filled[here] = axes.read(index[rule.stacked :], piece)
        return filled

    # jax.make_array_from_callback would read a shard again for each device that has a copy of it.
    copies: dict[str, tuple[Index, list[jax.Device]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        copies.setdefault(str(index), (index, []))[1].append(device)
    placed: list[jax.Array] = []
    for index, devices in copies.values():
        values = shard(index)
        placed += jax.block_until_ready([jax.device_put(values, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def _adopt_tokenizer(source: pathlib.Path, target: epath.Path, model: Source) -> None:
    try:
        added = special_tokens.adopt(source, target, model.tokens)
        size = tokenizer.load(str(target)).vocab_size
    except Exception as e:  # the tokenizers library raises Exception itself
        say(f"{source} is not taken over ({str(e)[:200]}); give data.tokenizer another")
        return
    vocabulary = model.config.model.vocab_size
    for name in ("bos", "eos"):
        if model.tokens[name] is not None and tokenizer.SPECIALS[name] in added:
            say(
                f"WARNING: {tokenizer.SPECIALS[name]} is new to the model: its own, {model.tokens[name]}, has another "
                f"of these tasks, or {source.name} lacks it"
            )
    say(f"{target}: {size:,} tokens, of which added: {' '.join(added) or 'none'}")
    if size > vocabulary:
        say(
            f"the model knows {vocabulary:,} of them; to train on images or packed rows begin a model of "
            f"model.vocab_size >= {size} with it (start.decoder), whose first rows it fills"
        )


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")


if __name__ == "__main__":
    INPUT = flags.DEFINE_string("input", None, "folder with config.json and safetensors", required=True)
    WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run to make", required=True)

    def main(_: list[str]) -> None:
        processes.initialize()
        import_weights(INPUT.value, WORKDIR.value)

    command_line.run(main)
