"""Parameters, FLOPs and memory of a config: no array is made and nothing is compiled.

Parameters are those of the model's abstract tree, by their names. FLOPs are those that the mathematics needs: two for
each multiply-add of a matrix product, forwards, backwards to the weights that are trained, and backwards to the inputs
as far down as something is trained; attention over the keys that the mask lets through; nothing for norms and
activations, nothing for what rematerialisation computes again, nothing for empty image slots. (XLA's own analysis does
not multiply loop bodies.)
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from nmm_jax.models import build, connectors
from nmm_jax.models.spec import MoESpec, Spec, StackSpec
from nmm_jax.scaling.optima import FLOPS
from nmm_jax.training.freezing import frozen_names

FLOAT32 = 4  # bytes
IMAGE_SHARE = 0.5  # of positions, where nothing is known of the rows

PARTS = (
    "token_embedding", "patch_embedding", "vision_tower", "connector", "delimiters", "attention", "ffn", "experts",
    "routers", "visual_expert", "norms", "head",
)  # fmt: skip


class Work(NamedTuple):
    """What grows with each position of a row, each (query, key) pair of its attention, and each image."""

    token: float = 0.0
    pair: float = 0.0
    image: float = 0.0

    def plus(self, other: "Work", times: float = 1.0) -> "Work":
        return Work(*(a + times * b for a, b in zip(self, other, strict=True)))

    def of(self, tokens: float, pairs: float, images: float) -> float:
        return self.token * tokens + self.pair * pairs + self.image * images


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a model is made of.

    Attributes:
      parts: parameters by part of the network, of PARTS and of what an encoder has besides; they sum to `parameters`.
      trainable_parts: those of them that `optimizer.freeze` leaves.
      active_parameters: those that one position meets; all of them in a dense model.
      paper_text, paper_vision: N and N_v as Shukor et al. (arXiv 2504.07951) count them: the decoder's matrices and
        both embedding matrices, of experts and of modalities' weights those that one position meets, without routers;
        and the matrices of the vision tower's layers. (Tied embeddings are one matrix and count once.)
      paper_total: their sum with all experts and all modalities' weights; what the paper calls a mixture's total.
      forward, training: FLOPs.
      image_flops: those of forward that an image costs outside of the decoder, by part.
    """

    parts: dict[str, int]
    trainable_parts: dict[str, int]
    active_parameters: int
    paper_text: int
    paper_vision: int
    paper_total: int
    forward: Work
    training: Work
    image_flops: dict[str, float]

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())

    @property
    def trainable_parameters(self) -> int:
        return sum(self.trainable_parts.values())

    @property
    def paper_parameters(self) -> int:
        return self.paper_text + self.paper_vision

    def forward_flops(self, tokens: float, pairs: float, images: float) -> float:
        """FLOPs of a forward pass.

        Args:
          tokens: positions of rows, of text and of images, without padding.
          pairs: (query, key) pairs that their attention needs (`attended_pairs`).
          images: that are filled in.
        """
        return self.forward.of(tokens, pairs, images)

    def training_flops(self, tokens: float, pairs: float, images: float) -> float:
        """FLOPs of forward and backward pass."""
        return self.training.of(tokens, pairs, images)

    def paper_flops(self, tokens: float, tower_tokens: float = 0.0) -> float:
        """C, the FLOPs of training as the paper counts them: 6 (N_text D + N_vision D_v).

        Args:
          tokens: D, positions of rows, of text and of images, without padding.
          tower_tokens: D_v, that a vision tower goes through; of no account without one.
        """
        return FLOPS * (self.paper_text * tokens + self.paper_vision * tower_tokens)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a run was trained on; padding counts for nothing.

    Attributes:
      by_source: positions of rows, of text and of images.
      text: those that are no image's: words, delimiters, BOS and EOS.
      vision: D_v, those of images; in late fusion what the vision tower went through, patches.
    """

    by_source: dict[str, int]
    text: int
    vision: int

    @property
    def total(self) -> int:
        """D."""
        return sum(self.by_source.values())


def count(config: ConfigDict) -> Counts:
    """Counts the model of a config.

    Raises:
      ValueError: a pattern of optimizer.freeze matches nothing.
    """
    model = build(config)
    spec = model.spec
    sizes = {name: math.prod(x.shape) for name, x in flatten_dict(model.abstract, sep="/").items()}
    frozen = frozen_names(sizes, config.optimizer.freeze)
    parts, trainable = (Counter({name: 0 for name in PARTS}) for _ in range(2))
    for name, size in sizes.items():
        parts[_part(name)] += size
        trainable[_part(name)] += size * (name not in frozen)
    experts, apart = parts["experts"], parts["visual_expert"]
    active = sum(parts.values()) - apart
    unused = 0
    if spec.moe:
        unused = experts - experts * spec.moe.top_k // spec.moe.experts
        active -= unused

    matrices = {name: size for name, size in sizes.items() if _is_matrix(name)}
    tower = sum(size for name, size in matrices.items() if name.startswith("vision/layers/"))
    everything = sum(size for name, size in matrices.items() if name.startswith("layers/") and "/router/" not in name)
    both = sum(size for name, size in matrices.items() if _is_image(name))
    embeddings = parts["token_embedding"] + parts["head"]
    forward, training, by_part = _flops(spec, matrices, set(sizes), frozen, config.batch_rows)
    return Counts(
        parts=dict(parts),
        trainable_parts=dict(trainable),
        active_parameters=active,
        paper_text=everything - both - unused + embeddings,
        paper_vision=tower,
        paper_total=everything + embeddings + tower,
        forward=forward,
        training=training,
        image_flops=by_part,
    )


def tokens_seen(config: ConfigDict, by_source: Mapping[str, int], images: int) -> Tokens:
    """D of a run, from what its checkpoints count: real positions by source, and images."""
    spec = Spec.from_config(config)
    in_rows = images * spec.image_positions
    vision = images * spec.vision.patches if spec.vision else in_rows
    return Tokens(dict(by_source), sum(by_source.values()) - in_rows, vision)


def tower_tokens(config: ConfigDict) -> float:
    """D_v / D: what a vision tower goes through for one position of rows that are half images; 0 without one."""
    spec = Spec.from_config(config)
    return IMAGE_SHARE * spec.vision.patches / spec.image_positions if spec.vision else 0.0


def causal_keys(row_length: int) -> float:
    """Mean number of keys a query sees when a row is one causal document."""
    return (row_length + 1) / 2


def full_rows(config: ConfigDict) -> tuple[float, float, float]:
    """Positions, (query, key) pairs and images of a step of full rows.

    A row is one causal document, an upper bound for packed ones, and half of it images; of pairs it has one image.
    """
    positions = config.batch_rows * config.row_length
    if config.data.rows == "pairs":
        images = float(config.batch_rows)
    else:
        images = IMAGE_SHARE * positions / Spec.from_config(config).image_positions
    return positions, positions * causal_keys(config.row_length), images


def of_matrices(config: ConfigDict) -> dict[str, Work]:
    """FLOPs of the forward pass in each parameter that is multiplied with rows, but a connector's."""
    model = build(config)
    sizes = {name: math.prod(x.shape) for name, x in flatten_dict(model.abstract, sep="/").items()}
    rows, matrices = _rows(model.spec, set(sizes)), filter(_is_matrix, sizes)
    return {name: Work().plus(rows(name), 2 * sizes[name]) for name in matrices if _part(name) != "connector"}


def _part(name: str) -> str:
    """Which part of the network a parameter is of: one of PARTS, or its own first name."""
    first, *rest = name.split("/")
    if first != "layers":
        whole = {"embed": "token_embedding", "patches": "patch_embedding", "vision": "vision_tower"}
        whole |= {"final_norm": "norms", "image_final_norm": "visual_expert"}
        return whole.get(first, first)
    if "image" in rest:
        return "visual_expert"
    for inner, part in (("experts", "experts"), ("router", "routers")):
        if inner in rest:
            return part
    if any(each.endswith("norm") for each in rest):
        return "norms"
    return "attention" if "attention" in rest else "ffn"


def _is_matrix(name: str) -> bool:
    """Whether a parameter is multiplied with rows: no norm, bias, position or vector."""
    return re.search(r"norm|bias|positions|class_token|delimiters|queries|probe|contrastive/scale", name) is None


def _is_image(name: str) -> bool:
    return name.startswith("layers/") and "/image/" in name


# Bottom to top; gradients flow down to the lowest stage that has something to train.
_PIXELS, _TOWER, _BRIDGE, _INPUTS, _DECODER, _TOP = range(6)


def _stage(name: str) -> int:
    if name.startswith("vision/"):
        return _TOWER if name.startswith(("vision/layers", "vision/final_norm")) else _PIXELS
    if name == "contrastive/image":
        return _BRIDGE
    stages = {"connector": _BRIDGE, "projection": _BRIDGE, "pooling": _BRIDGE, "layers": _DECODER}
    stages |= {"embed": _INPUTS, "patches": _INPUTS, "delimiters": _INPUTS, "final_norm": _DECODER}
    stages |= {"image_final_norm": _DECODER}
    return stages.get(name.split("/")[0], _TOP)


def _flops(
    spec: Spec, matrices: dict[str, int], names: set[str], frozen: set[str], batch_rows: int
) -> tuple[Work, Work, dict[str, float]]:
    """FLOPs of the forward pass and of training, and of the former those of an image outside of the decoder."""
    trained = {_stage(name) for name in names - frozen}
    forward, training = Work(), Work()
    by_part: dict[str, float] = {}

    def flows(stage: int) -> bool:
        """Whether gradients flow through a stage to its inputs: all but its first product's, if none is trained below.

        Nothing is below pixels and tokens; what is on top is one product.
        """
        lowest = _INPUTS if spec.family == "contrastive" and stage >= _DECODER else _PIXELS
        highest = stage - (stage == _TOP)
        return stage not in (_PIXELS, _INPUTS) and any(lowest <= each <= highest for each in trained)

    def add(work: Work, stage: int, part: str, gradients: int) -> None:
        nonlocal forward, training
        forward = forward.plus(work)
        training = training.plus(work, 1 + gradients)
        if stage <= _INPUTS or part not in PARTS:
            by_part[part] = by_part.get(part, 0.0) + work.image

    rows = _rows(spec, names)
    for name, size in matrices.items():
        stage, part = _TOP if name.startswith("embed/") else _stage(name), _part(name)  # multiplied if it is tied
        if part != "connector":
            work = Work().plus(rows(name), 2 * size)
            add(work, stage, part, (name not in frozen) + flows(stage))
    if spec.connector:
        trains = any(name.startswith("connector/") for name in names - frozen)
        add(Work(image=connectors.flops(spec.connector)), _BRIDGE, "connector", trains + flows(_BRIDGE))
    if spec.vision:
        seen = spec.vision.layers_used * spec.vision.tokens**2
        add(Work(image=seen * _flops_of_pair(spec.vision)), _TOWER, "vision_tower", 2 * flows(_TOWER))
    if any(name.startswith("pooling/") for name in names) and spec.vision:  # its probe's query
        seen = spec.vision.patches
        add(Work(image=seen * _flops_of_pair(spec.vision)), _BRIDGE, "pooling", 2 * flows(_BRIDGE))
    if spec.contrastive:  # similarities with all texts of the batch
        add(Work(image=2 * batch_rows * spec.contrastive.width), _TOP, "contrastive", 2 * flows(_TOP))
    if any(name.startswith("layers/") for name in names):
        pairs = Work(pair=1)
        if spec.family == "aimv2" and spec.vision:  # patches come before the text of their row, which sees them
            p = spec.vision.patches
            pairs = Work(token=p, pair=1, image=p * (p + 1) / 2)
        add(Work().plus(pairs, spec.depth * _flops_of_pair(spec)), _DECODER, "attention", 2 * flows(_DECODER))
    return forward, training, by_part


def _flops_of_pair(spec: StackSpec) -> int:
    """Of one query seeing one key, in all heads of a layer, forward: q k and weights v."""
    return 2 * 2 * spec.heads * spec.head_dim


def _rows(spec: Spec, names: set[str]) -> Callable[[str], Work]:
    """The function from a matrix's name to the rows that it is multiplied with."""
    vision = spec.vision
    patches = vision.patches if vision else spec.image_positions
    of_image = spec.image_positions  # positions that meet the images' weights
    if spec.image_delimiters:
        of_image += {"text": 0, "boi_image": 1, "image": 2}[spec.delimiter_weights]

    def rows(name: str) -> Work:
        first, *rest = name.split("/")
        if first == "vision" and vision:
            if rest[0] == "layers":
                return Work(image=vision.tokens * vision.layers_used / vision.depth)
            return Work(image=vision.patches)
        if first == "layers":
            if "image" in rest:
                return Work(image=of_image)
            if "experts" in rest and spec.moe:
                return Work(token=spec.moe.top_k / spec.moe.experts)
            before = patches if spec.family == "aimv2" else 0  # in the decoder, before the text
            own = "/image/".join(re.match(r"(layers(?:/block_\d+)?)/(.*)", name).groups())  # type: ignore[union-attr]
            return Work(token=1, image=before - of_image * (own in names))
        if first == "embed":
            return Work(token=spec.tie_embeddings)
        if first == "head":
            return Work(token=1)
        if first == "pooling":  # a probe looks at all patches
            return Work(image=patches if rest[-1] in ("key", "value") else 1)
        if first == "contrastive":
            return Work(image=1)
        return Work(image=patches)  # patch embedding; what predicts pixels

    return rows


def memory(config: ConfigDict) -> dict[str, int]:
    """Bytes in all devices together while a step runs, by part; "activations" is an estimate.

    What the mesh holds several times over counts as often: everything over `replica`, all but the experts over
    `expert`. (An axis of -1 counts as 1.) Frozen parameters have neither gradients nor optimizer state. Activations are
    what layers keep for the backward pass of one microbatch under the config's remat policy, the vision tower's of all
    image slots. Not in it: one layer's workspace, a chunk of logits, parameters gathered for use.
    """
    counts = count(config)
    replicas, expert_axis = max(config.mesh.replica, 1), max(config.mesh.expert, 1)

    def held(parts: dict[str, int]) -> int:
        return replicas * (parts["experts"] + (sum(parts.values()) - parts["experts"]) * expert_axis)

    return {
        "parameters": FLOAT32 * held(counts.parts),
        "optimizer": 2 * FLOAT32 * held(counts.trainable_parts),  # Adam's two moments
        "gradients": FLOAT32 * held(counts.trainable_parts),
        "activations": sum(layers * kept for layers, kept, _ in _of_layers(config, expert_axis, 1)),
    }


def activations(config: ConfigDict, expert_axis: int, tensor_axis: int) -> tuple[int, int]:
    """Bytes of a microbatch's activations in all devices that have other rows than each other.

    Returns:
      What all layers keep for the backward pass, and what the backward pass of one layer, the largest, has besides:
      what is computed again, and the gradients of its output and of its widest product.
    """
    layers = _of_layers(config, expert_axis, tensor_axis)
    return sum(n * kept for n, kept, _ in layers), max((working for _, _, working in layers), default=0)


def _of_layers(config: ConfigDict, expert_axis: int, tensor_axis: int) -> list[tuple[int, int, int]]:
    """(how many, bytes that one keeps, bytes that one's backward pass has besides), by kinds of layers."""
    spec, counts = Spec.from_config(config), count(config)
    size = {"float32": 4, "bfloat16": 2}[spec.dtype]
    rows = math.ceil(config.batch_rows / config.gradient_accumulation)
    images = rows * config.image.per_row
    found = []

    def add(layers: int, tokens: int, stack: StackSpec, ffn_width: float, travelled: float = 0.0) -> None:
        kept = _kept(stack, ffn_width, travelled, tensor_axis)
        everything = _kept(dataclasses.replace(stack, remat="none"), ffn_width, travelled, tensor_axis)
        working = everything - kept + stack.width + ffn_width / tensor_axis
        found.append((layers, int(size * tokens * kept), int(size * tokens * working)))

    if counts.parts["attention"]:
        tokens = rows * config.row_length
        if spec.family == "aimv2" and spec.vision:
            tokens += images * spec.vision.tokens
        with_experts = spec.depth // spec.moe.every if spec.moe else 0
        if spec.depth > with_experts:
            add(spec.depth - with_experts, tokens, spec, spec.ffn_width)
        if spec.moe:
            received, travelled = buffer_rows(spec.moe, expert_axis)
            add(with_experts, tokens, spec, (received + spec.moe.shared) * spec.moe.width, travelled)
    if spec.vision and counts.trainable_parts["vision_tower"]:
        add(spec.vision.layers_used, images * spec.vision.tokens, spec.vision, spec.vision.ffn_width)
    return found


def buffer_rows(moe: MoESpec, expert_axis: int) -> tuple[float, float]:
    """Rows for each token: of the buffers that experts compute on, and of those that crossed the network and came back.

    Dropless buffers have room for all tokens of the axis at each of its devices.
    """
    if expert_axis == 1:
        return moe.top_k, 0
    worst = expert_axis * min(moe.top_k, moe.experts // expert_axis)
    received = min(worst, moe.buffer_factor * moe.top_k) if moe.buffer_factor else worst
    return received, received + moe.top_k


def _kept(spec: StackSpec, ffn_width: float, travelled: float, tensor_axis: int) -> float:
    """Values that a layer keeps of a position, on one of the devices of the tensor axis.

    These share heads and feed-forward width, and each has the whole width. `travelled` rows are buffers of an exchange.
    """
    d = spec.width
    query_width, key_width, ffn_width = (
        n / tensor_axis for n in (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, ffn_width)
    )
    inner = 2 * ffn_width if spec.ffn == "swiglu" else ffn_width
    named = 2 * query_width + 2 * key_width + inner + travelled * d  # what models.decoder.KEPT names
    return {
        "full": d,
        "exchanges": d + travelled * d,
        "minimal": d + named,
        "none": d + named + 2 * d + query_width + key_width + ffn_width,
    }[spec.remat]
