"""Which of our parameters is which tensor of another library: one table a layout, read in both directions.

    ours                      theirs                                          axes
    layers/attention/query    model.layers.{layer}.self_attn.q_proj.weight    (h k) d -> d h k

Our layers (and experts) are the first axes of one array; theirs are tensors of their own, numbered. Names are those
that the published weights have; `renamed` are other names of the same tensors.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping

from nmm_jax.interop.axes import Axes
from nmm_jax.interop.errors import InteropError


@dataclasses.dataclass(frozen=True)
class Rule:
    """A line of a table."""

    ours: str
    theirs: str  # with {layer}, or {layer} and {expert}, where ours is stacked
    axes: str = "d -> d"
    part: tuple[int, int] = (0, 1)  # (i, n): ours is the i-th of n equal parts of their first axis

    @property
    def stacked(self) -> int:
        """How many of our first axes are numbers in their names."""
        return self.theirs.count("{")

    def tensors(self, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
        """((layer, expert), name) of all tensors that our array of this shape is made of."""
        for place in itertools.product(*(range(n) for n in shape[: self.stacked])):
            yield place, self.theirs.format(**dict(zip(("layer", "expert"), place, strict=False)))

    def axes_of(self, shape: tuple[int, ...], known: Mapping[str, int]) -> Axes:
        """Of one tensor of it."""
        return Axes.of(self.axes, shape[self.stacked :], known)

    def under(self, prefix: str) -> "Rule":
        return dataclasses.replace(self, theirs=prefix + self.theirs)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tensors of one kind of model (`model_type` of its config.json)."""

    rules: tuple[Rule, ...]
    left_out: tuple[str, ...] = ()  # patterns of theirs that have no place in ours
    renamed: tuple[tuple[str, str], ...] = ()  # (pattern, replacement) that make another name the one in the table
    zeros: tuple[str, ...] = ()  # parts of ours that they have none of: made as zeros

    @property
    def paths(self) -> set[str]:
        """Of our parameters, those that it has tensors for."""
        return {rule.ours for rule in self.rules}

    @property
    def parts(self) -> tuple[str, ...]:
        """Of our tree, what the layout has."""
        return tuple(dict.fromkeys(rule.ours.split("/")[0] for rule in self.rules))

    def name(self, found: str) -> str:
        """The table's name of a tensor."""
        for pattern, replacement in self.renamed:
            found = re.sub(pattern, replacement, found)
        return found

    def under(self, prefix: str) -> "Layout":
        """The layout as a part of a larger one."""
        start = re.escape(prefix)
        return dataclasses.replace(
            self,
            rules=tuple(rule.under(prefix) for rule in self.rules),
            left_out=tuple(start + pattern for pattern in self.left_out),
            renamed=tuple((f"^{start}{old.removeprefix('^')}", prefix + new) for old, new in self.renamed),
        )


TABLE, MATRIX = "v d -> v d", "out in -> in out"
HEADS_IN, HEADS_OUT = "(h k) d -> d h k", "d (h k) -> h k d"
HEADS = "(h k) -> h k"
CONVOLUTION = "d colour row column -> (row column colour) d"


def pixel_axes(patch: int) -> dict[str, int]:
    """Sizes of what a patch's values are made of, by their names in CONVOLUTION."""
    return {"row": patch, "column": patch, "colour": 3}


# Buffers that older versions of the library saved among the weights.
_BUFFERS = (r".*\.position_ids", r".*\.rotary_emb\.inv_freq")


def _attention(theirs: str, out: str, ours: str = "layers/attention", bias: bool = False) -> tuple[Rule, ...]:
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    rules = [Rule(f"{ours}/{mine}", f"{theirs}.{name}.weight", HEADS_IN) for mine, name in names.items()]
    rules.append(Rule(f"{ours}/out", f"{theirs}.{out}.weight", HEADS_OUT))
    if bias:
        rules += [Rule(f"{ours}/{mine}_bias", f"{theirs}.{name}.bias", HEADS) for mine, name in names.items()]
        rules.append(Rule(f"{ours}/out_bias", f"{theirs}.{out}.bias"))
    return tuple(rules)


def _swiglu(ours: str, theirs: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{ours}/{name}", f"{theirs}.{name}_proj.weight", MATRIX) for name in ("gate", "up", "down"))


def _mlp(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{ours}/up", f"{theirs}.fc1.weight", MATRIX),
        Rule(f"{ours}/up_bias", f"{theirs}.fc1.bias"),
        Rule(f"{ours}/down", f"{theirs}.fc2.weight", MATRIX),
        Rule(f"{ours}/down_bias", f"{theirs}.fc2.bias"),
    )


def _layer_norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    return Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")


_LAYER = "model.layers.{layer}"
_NORMS_BEFORE = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_NORMS_AFTER = {"attention_norm": "post_attention_layernorm", "ffn_norm": "post_feedforward_layernorm"}
_EXPERTS = {"gate": "w1", "up": "w3", "down": "w2"}
_MIXTURE = (
    Rule("layers/ffn/router/kernel", f"{_LAYER}.block_sparse_moe.gate.weight", MATRIX),
    *(
        Rule(f"layers/ffn/experts/{mine}", f"{_LAYER}.block_sparse_moe.experts.{{expert}}.{name}.weight", MATRIX)
        for mine, name in _EXPERTS.items()
    ),
)


def _decoder(
    norms: Mapping[str, str], head_norm: str = "", ffn: Iterable[Rule] = _swiglu("layers/ffn", f"{_LAYER}.mlp")
) -> Layout:
    """head_norm: pattern of the norms of queries and keys, if there are any."""
    rules = [
        Rule("embed/tokens", "model.embed_tokens.weight", TABLE),
        *_attention(f"{_LAYER}.self_attn", "o_proj"),
        *ffn,
        *(Rule(f"layers/{mine}/scale", f"{_LAYER}.{name}.weight") for mine, name in norms.items()),
        Rule("final_norm/scale", "model.norm.weight"),
        Rule("head/kernel", "lm_head.weight", MATRIX),
    ]
    if head_norm:
        rules += [
            Rule(f"layers/attention/{mine}_norm/scale", f"{_LAYER}.self_attn.{name}_norm.weight", head_norm)
            for mine, name in (("query", "q"), ("key", "k"))
        ]
    bare = (r"^(embed_tokens|layers|norm)\.", r"model.\1.")  # saved without the head around it
    return Layout(tuple(rules), left_out=_BUFFERS, renamed=(bare,), zeros=("patches",))


# CLIP's and SigLIP's towers are published under vision_model, AIMv2's bare; the library saves both in either form.
_BARE = (r"^(embeddings|encoder|pre_layrnorm|post_layernorm|head)\b", r"vision_model.\1")
_TOWER = "vision_model.encoder.layers.{layer}"


def _tower(*rules: Rule | tuple[Rule, ...], renamed: tuple[str, str] = _BARE, left_out: tuple[str, ...] = ()) -> Layout:
    flat = itertools.chain.from_iterable([rule] if isinstance(rule, Rule) else rule for rule in rules)
    others = (r"text_model\..*", r"visual_projection\..*", r"text_projection\..*", "logit_scale", "logit_bias")
    return Layout(tuple(flat), left_out=(*others, *_BUFFERS, *left_out), renamed=(renamed,))


_CLIP_LAYERS = (
    Rule("vision/patches/kernel", "vision_model.embeddings.patch_embedding.weight", CONVOLUTION),
    Rule("vision/positions", "vision_model.embeddings.position_embedding.weight", TABLE),
    *_attention(f"{_TOWER}.self_attn", "out_proj", "vision/layers/attention", bias=True),
    *_mlp("vision/layers/ffn", f"{_TOWER}.mlp"),
    *_layer_norm("vision/layers/attention_norm", f"{_TOWER}.layer_norm1"),
    *_layer_norm("vision/layers/ffn_norm", f"{_TOWER}.layer_norm2"),
    *_layer_norm("vision/final_norm", "vision_model.post_layernorm"),
)
_CLIP = _tower(
    Rule("vision/class_token", "vision_model.embeddings.class_embedding"),
    _layer_norm("vision/embedding_norm", "vision_model.pre_layrnorm"),
    _CLIP_LAYERS,
)
_POOLING = "vision_model.head.attention"
_SIGLIP = _tower(
    Rule("vision/patches/bias", "vision_model.embeddings.patch_embedding.bias"),
    _CLIP_LAYERS,
    Rule("pooling/probe", "vision_model.head.probe", "1 1 d -> d"),
    *(
        Rule(f"pooling/attention/{name}", f"{_POOLING}.in_proj_weight", HEADS_IN, part=(i, 3))
        for i, name in enumerate(("query", "key", "value"))
    ),
    *(
        Rule(f"pooling/attention/{name}_bias", f"{_POOLING}.in_proj_bias", HEADS, part=(i, 3))
        for i, name in enumerate(("query", "key", "value"))
    ),
    Rule("pooling/attention/out", f"{_POOLING}.out_proj.weight", HEADS_OUT),
    Rule("pooling/attention/out_bias", f"{_POOLING}.out_proj.bias"),
    _layer_norm("pooling/norm", "vision_model.head.layernorm"),
    _mlp("pooling/ffn", "vision_model.head.mlp"),
)
_AIMV2 = _tower(
    Rule("vision/patches/kernel", "embeddings.patch_embed.weight", CONVOLUTION),
    Rule("vision/patches/bias", "embeddings.patch_embed.bias"),
    Rule("vision/positions", "embeddings.position_embedding.weight", TABLE),
    Rule("vision/embedding_norm/scale", "embeddings.rms_norm.weight"),
    _attention("encoder.layers.{layer}.attention", "out_proj", "vision/layers/attention"),
    _swiglu("vision/layers/ffn", "encoder.layers.{layer}.ffn"),
    Rule("vision/layers/attention_norm/scale", "encoder.layers.{layer}.rms_norm1.weight"),
    Rule("vision/layers/ffn_norm/scale", "encoder.layers.{layer}.rms_norm2.weight"),
    Rule("vision/final_norm/scale", "rms_norm.weight"),
    renamed=(r"^vision_model\.", ""),
    left_out=(r"head\..*",),  # its pooling is of another form than ours
)

TOWERS = {"clip_vision_model": _CLIP, "siglip_vision_model": _SIGLIP, "aimv2_vision_model": _AIMV2}
DECODERS = {
    "llama": _decoder(_NORMS_BEFORE),
    "olmo2": _decoder(_NORMS_AFTER, HEADS),
    "qwen3": _decoder(_NORMS_BEFORE, "k -> k"),
    "mixtral": _decoder(_NORMS_BEFORE, ffn=_MIXTURE),
}


def llava(tower: str, decoder: str) -> Layout:
    """A tower, an MLP and a decoder."""
    connector = tuple(
        Rule(f"connector/{mine}/{ours}", f"multi_modal_projector.linear_{i}.{theirs}", axes)
        for i, mine in ((1, "up"), (2, "down"))
        for ours, theirs, axes in (("kernel", "weight", MATRIX), ("bias", "bias", "d -> d"))
    )
    vision, text = TOWERS[tower].under("vision_tower."), DECODERS[decoder].under("language_model.")
    newer = (  # names since transformers 4.52
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        (r"^lm_head\.", "language_model.lm_head."),
    )
    return Layout(
        (*vision.rules, *connector, *text.rules),
        left_out=(*vision.left_out, *text.left_out),
        renamed=(*newer, *vision.renamed, *text.renamed),
    )


def match(layout: Layout, ours: Mapping[str, tuple[int, ...]], theirs: Iterable[str], where: str) -> "Matched":
    """Names of both sides, paired.

    Args:
      ours: the shape of every parameter of the model, by path.
      theirs: the tensors of the folder.
      where: the folder, for messages.

    Raises:
      InteropError: lists the tensors that are missing and those that are left over.
    """
    unknown = [path for path in ours if path.split("/")[0] in layout.parts and path not in layout.paths]
    if unknown:
        raise InteropError(f"the layout has no tensors for the parameters {', '.join(unknown)} of this config")
    found: dict[str, str] = {}
    for name in sorted(theirs):
        if (other := found.setdefault(layout.name(name), name)) != name:
            raise InteropError(f"{where} has {other} and {name}, which are names of the same tensor; remove one")
    rules = [rule for rule in layout.rules if rule.ours in ours]
    wanted = {name for rule in rules for _, name in rule.tensors(ours[rule.ours])}
    absent = [re.sub(r"\\\{\w+\\\}", r"\\d+", re.escape(r.theirs)) for r in layout.rules if r.ours not in ours]
    patterns = re.compile("|".join(f"(?:{p})" for p in (*layout.left_out, *absent)) or "(?!)")
    missing = wanted - found.keys()
    others = found.keys() - wanted
    left_out = {name for name in others if patterns.fullmatch(name)}
    if missing or others - left_out:
        lines = [f"{where} does not have the tensors that its config.json describes."]
        lines += [f"  missing: {line}" for line in summary(missing)]
        lines += [f"  left over: {line}" for line in summary(found[name] for name in others - left_out)]
        raise InteropError("\n".join(lines))
    return Matched(rules, {name: found[name] for name in wanted}, summary(found[name] for name in left_out))


@dataclasses.dataclass(frozen=True)
class Matched:
    rules: list[Rule]
    names: dict[str, str]  # of the table -> in the folder
    left_out: list[str]  # a summary, a line each


def summary(names: Iterable[str], most: int = 20) -> list[str]:
    """Names that differ in a number are one line, with how many they are."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    lines = [f"{name} ({n} of them)" if n > 1 else name for name, n in sorted(counts.items())]
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more kinds"]
