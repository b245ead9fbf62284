"""Weights to begin a run with, from other runs: our own, or imported ones (docs/checkpoints.md).

    start.vision      vision/...                                             an encoder's run has them at the same names
    start.decoder     embed, layers, final_norm, head
    start.connector   connector, delimiters

Each is a run's folder, or FOLDER@STEP, of which just these parameters are read, every shard onto its device. They must
fit by name and shape, but for what can be made to fit: learned positions are interpolated for another image.size, a
smaller vocabulary fills the first rows, and layers are regrouped where the model has them in periods.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from configs.loading import from_json
from nmm_jax.models import Model
from nmm_jax.models.vision import resize_positions
from nmm_jax.parallel.sharding import param_shardings
from nmm_jax.training import compatibility
from nmm_jax.training.checkpoints import CheckpointError, Checkpoints
from nmm_jax.training.progress import say

Flat = dict[str, Any]  # by name, "layers/ffn/up"

# In early fusion the patch embedding is all that there is of vision.
PARTS = {
    "vision": ("vision", "patches"),
    "decoder": ("embed", "layers", "final_norm", "image_final_norm", "head"),
    "connector": ("connector", "delimiters"),
}
# Keys of the config, or beginnings of them, that decide what a part computes; and of these the ones that may differ.
_KEYS = {
    "vision": ("model.vision.", "model.patch_positions", "image.patch", "image.mean", "image.std"),
    "decoder": ("model.", "data.tokenizer"),
    "connector": ("model.connector.", "model.delimiter_vectors", "model.vision.width", "model.width", "image."),
}
_NOT_THE_DECODERS = tuple(
    f"model.{k}" for k in ("vision.", "connector.", "contrastive.", "aim.", "deep.", "delimiter_")
)
_MAY_DIFFER = (*compatibility.MODEL_FREE, "model.family", "model.init", "model.vision.feature_layer")

POSITIONS = "vision/positions"
VOCABULARY = {"embed/tokens": 0, "head/kernel": 1}  # the axis of it


class StartError(ValueError):
    """The weights of a `start` key do not fit the model; the message tells what differs."""


def load(config: ConfigDict, model: Model, mesh: Mesh) -> dict[str, Any]:
    """The parameters that `config.start` names, laid out over the mesh as the model's; {} if it names none.

    An embedding of fewer tokens than the model has comes as it is (training/state.py puts it in its place).

    Raises:
      StartError: they do not fit.
      CheckpointError: there is no such run or checkpoint.
    """
    loaded: Flat = {}
    for part in PARTS:
        if config.start[part]:
            loaded |= _Source.open(part, config.start[part]).load(config, model, mesh)
    return unflatten_dict(loaded, sep="/")


@dataclasses.dataclass(frozen=True)
class _Source:
    """A part of another run's model."""

    part: str
    checkpoints: Checkpoints
    step: int
    config: ConfigDict
    arrays: Mapping[str, jax.ShapeDtypeStruct]

    @classmethod
    def open(cls, part: str, where: str) -> "_Source":
        workdir, at, step = where.rpartition("@")
        if not (at and step.isdigit()) or epath.Path(where).is_dir():
            workdir, step = where, ""
        try:
            checkpoints = Checkpoints(workdir, read_only=True)
            meta = checkpoints.meta(int(step) if step else None)
        except CheckpointError as e:
            raise CheckpointError(f"start.{part} = {where!r}: {e}") from e
        arrays = _of_part(part, checkpoints.abstract_params(meta["step"]))
        return cls(part, checkpoints, meta["step"], from_json(meta["config"]), arrays)

    @property
    def key(self) -> str:
        return f"start.{self.part} = {self.checkpoints.path(self.step)}"

    def load(self, config: ConfigDict, model: Model, mesh: Mesh) -> Flat:
        wanted = _of_part(self.part, model.abstract)
        shardings = _of_part(self.part, param_shardings(model.abstract, model.logical_axes, mesh))
        arrays, notes = self.arrays, []
        if not (_images(arrays) and _images(wanted)):  # what images have for themselves is taken if both models have it
            wanted, arrays = ({n: x for n, x in side.items() if n not in _images(side)} for side in (wanted, arrays))
        period = _period(wanted) if _period(arrays) == 1 else 1
        there = _in_periods(arrays, period)
        sides = _sides(model, there, wanted)
        self._check(config, there, wanted, resized=bool(sides))

        # A layer's array is cut over the mesh as each of the periods' will be.
        targets = {name if period == 1 else _without_block(name): shardings[name] for name in wanted}
        asked = {
            name: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=_divisible(targets[name], x.shape))
            for name, x in arrays.items()
        }
        found = flatten_dict(self.checkpoints.restore_some(self.step, unflatten_dict(asked, sep="/")), sep="/")
        if sides:
            resize = partial(resize_positions, side_from=sides[0], side_to=sides[1], class_token=_class_token(model))
            found[POSITIONS] = jax.jit(resize, out_shardings=shardings[POSITIONS])(found[POSITIONS])
            notes.append(f"positions interpolated from {sides[0]} x {sides[0]} patches to {sides[1]} x {sides[1]}")
        if period > 1:
            found = _regrouped(found, period)
        for name, axis in VOCABULARY.items():
            if name in found and found[name].shape != wanted[name].shape:
                notes.append(f"{found[name].shape[axis]} of {wanted[name].shape[axis]} tokens in {name}")
        size = sum(x.size for x in found.values())
        say("; ".join([f"{self.key}: {size:,} parameters", *notes]))
        if differing := self._differing(config):
            say(f"{self.key} was trained with {'; '.join(differing)}")
        return found

    def _check(self, config: ConfigDict, there: Flat, wanted: Flat, resized: bool) -> None:
        if not wanted:
            names = "/*, ".join(PARTS[self.part])
            raise StartError(f"{self.key}: the model of this config has no {self.part} (no parameters {names}/*)")
        depths = _depth(self.arrays), _depth(wanted)
        problems = {
            "of another depth": ["{} layers there, {} here".format(*depths)] if depths[0] != depths[1] else [],
            "not there": [n for n in wanted if n not in there],
            "left over": [n for n in there if n not in wanted],
            "of another shape": [
                f"{name} {there[name].shape} there, {x.shape} here"
                for name, x in wanted.items()
                if name in there and not (_fits(name, there[name].shape, x.shape) or (name == POSITIONS and resized))
            ],
        }
        if any(problems.values()):
            differing = self._differing(config)
            lines = [f"{self.key} does not fit this config."]
            lines += [f"  It was trained with {'; '.join(differing)}."] if differing else []
            lines += [f"  {what}: {_listed(names)}" for what, names in problems.items() if names]
            raise StartError("\n".join([*lines, "Give the config the same values, or another run."]))

    def _differing(self, config: ConfigDict) -> list[str]:
        """Keys that decide about this part and are not the same, one phrase each."""
        return [
            f"{key} = {before!r} (here {now!r})"
            for key, (before, now) in compatibility.differences(self.config, config).items()
            if key.startswith(_KEYS[self.part]) and key not in _MAY_DIFFER
            if self.part != "decoder" or not key.startswith(_NOT_THE_DECODERS)
        ]


def _of_part(part: str, tree: dict[str, Any]) -> Flat:
    return {name: x for name, x in flatten_dict(tree, sep="/").items() if name.split("/")[0] in PARTS[part]}


def _images(flat: Mapping[str, Any]) -> set[str]:
    """Of a deep model's decoder, what images have for themselves."""
    return {
        n for n in flat if n.startswith("image_final_norm/") or (n.startswith("layers/") and "image" in n.split("/"))
    }


def _class_token(model: Model) -> bool:
    return bool(model.spec.vision and model.spec.vision.class_token)


def _sides(model: Model, there: Flat, wanted: Flat) -> tuple[int, int] | None:
    """Patches along an edge there and here, if the positions have to be interpolated."""
    if POSITIONS not in there or POSITIONS not in wanted or there[POSITIONS].shape == wanted[POSITIONS].shape:
        return None
    before, now = (math.isqrt(flat[POSITIONS].shape[0] - _class_token(model)) for flat in (there, wanted))
    square = before**2 + _class_token(model) == there[POSITIONS].shape[0]
    return (before, now) if square and there[POSITIONS].shape[1] == wanted[POSITIONS].shape[1] else None


def _fits(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    axis = VOCABULARY.get(name)
    smaller = axis is not None and shape[axis] < wanted[axis] and shape[1 - axis] == wanted[1 - axis]
    return shape == wanted or smaller


def _divisible(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding without the axes that do not divide this shape, which is not the one that it was made for."""
    names = [
        name if name is None or size % sharding.mesh.shape[name] == 0 else None
        for size, name in zip(shape, sharding.spec, strict=True)
    ]
    return NamedSharding(sharding.mesh, PartitionSpec(*names))


def _period(flat: Mapping[str, Any]) -> int:
    """Layers after which the kinds of layers repeat, each kind stacked apart under layers/block_<j>."""
    return len({n.split("/")[1] for n in flat if n.startswith("layers/block_")}) or 1


def _without_block(name: str) -> str:
    first, *others = name.split("/")
    return "/".join([first, *others[1:]]) if others and others[0].startswith("block_") else name


def _depth(flat: Mapping[str, Any]) -> int:
    """Layers of a decoder; 0 where there is none."""
    return next((_period(flat) * x.shape[0] for name, x in flat.items() if name.startswith("layers/")), 0)


def _in_periods(flat: Mapping[str, jax.ShapeDtypeStruct], period: int) -> Flat:
    """layers/ffn/up [L,...] -> layers/block_0/ffn/up [L / period,...], ..., layers/block_<period - 1>/ffn/up."""
    result: Flat = {}
    for name, x in flat.items():
        if period > 1 and name.startswith("layers/"):
            shape = (x.shape[0] // period, *x.shape[1:])
            rest = name.removeprefix("layers/")
            result |= {f"layers/block_{j}/{rest}": jax.ShapeDtypeStruct(shape, x.dtype) for j in range(period)}
        else:
            result[name] = x
    return result


def _regrouped(found: Flat, period: int) -> Flat:
    """The same of arrays; each one's memory is free before the next one's is taken."""
    result: Flat = {}
    for name in sorted(found):
        x = found.pop(name)
        if name.startswith("layers/"):
            split = jax.jit(lambda x: [x[j::period] for j in range(period)], out_shardings=x.sharding)
            rest = name.removeprefix("layers/")
            result |= {f"layers/block_{j}/{rest}": one for j, one in enumerate(split(x))}
        else:
            result[name] = x
    return result


def _listed(names: list[str], most: int = 8) -> str:
    return "; ".join(sorted(names)[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
