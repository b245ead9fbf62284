"""The network's dimensions and choices, resolved from a config: zeros that mean "choose" become numbers here, once."""

import dataclasses
import math

from ml_collections import ConfigDict

FFN_MULTIPLE = 256  # the paper's code base rounds the SwiGLU width up to a multiple of this


def ffn_width(kind: str, width: int) -> int:
    """4 * width; of SwiGLU 2/3 of it, as many parameters in its three matrices, rounded up to a multiple of 256."""
    return -(-int(8 * width / 3) // FFN_MULTIPLE) * FFN_MULTIPLE if kind == "swiglu" else 4 * width


@dataclasses.dataclass(frozen=True)
class MoESpec:
    """Layers of experts: `model.moe` of the config, with granularity resolved."""

    experts: int  # E; with groups, those of images come last
    top_k: int
    width: int  # of an expert
    every: int  # layer i, from 0, has experts when (i + 1) % every == 0
    shared: int
    modality: str
    image_experts: int  # 0 unless there are groups
    renormalise: bool
    balance: str
    bias_rate: float
    buffer_factor: float
    transport: str
    grouped_matmul: str

    @classmethod
    def from_config(cls, config: ConfigDict, dense_width: int) -> "MoESpec | None":
        """None for a dense model."""
        moe = config.model.moe
        if not moe.experts:
            return None
        split = moe.granularity
        if dense_width % split:
            raise ValueError(
                f"the feed-forward width {dense_width} (model.ffn_width, or derived from model.width) does not divide "
                f"into model.moe.granularity = {split} parts"
            )
        groups = {"agnostic": 0, "grouped": moe.image_experts or moe.experts // 2, "fixed": moe.experts // 2}
        return cls(
            experts=split * moe.experts,
            top_k=split * moe.top_k,
            width=dense_width // split,
            every=moe.every,
            shared=split * moe.shared,
            modality=moe.modality,
            image_experts=split * groups[moe.modality],
            renormalise=moe.renormalise,
            balance=moe.balance,
            bias_rate=moe.bias_rate,
            buffer_factor=moe.buffer_factor,
            transport=moe.transport,
            grouped_matmul=moe.grouped_matmul,
        )


@dataclasses.dataclass(frozen=True)
class DeepSpec:
    """Weights that image positions have for themselves: `model.deep` of the config."""

    modules: tuple[str, ...]  # of qkv, out, ffn, norms; at least one
    every: int  # layer i, from 0, has them when (i + 1) % every == 0
    copied: bool  # they begin as the text's
    qkv_bias: bool

    @classmethod
    def from_config(cls, config: ConfigDict) -> "DeepSpec | None":
        """None where all positions share their weights."""
        deep = config.model.deep
        if not deep.modules:
            return None
        return cls(tuple(deep.modules), deep.every, deep.initial == "copy", deep.qkv_bias)


@dataclasses.dataclass(frozen=True)
class StackSpec:
    """A stack of transformer blocks: the decoder's, the vision tower's, a resampler's."""

    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: str
    ffn_width: int
    bias: bool  # in all products and norms
    norm: str
    norm_eps: float
    norm_position: str
    qk_norm: str
    rope_theta: float  # 0: no rotary positions
    init: str
    dtype: str
    attention: str
    scan_layers: bool
    remat: str
    moe: MoESpec | None
    deep: DeepSpec | None

    @property
    def period(self) -> int:
        """Layers after which the kinds of layers repeat."""
        return math.lcm(self.moe.every if self.moe else 1, self.deep.every if self.deep else 1)

    def has_experts(self, layer: int) -> bool:
        return self.moe is not None and (layer + 1) % self.moe.every == 0

    def is_deep(self, layer: int) -> bool:
        return self.deep is not None and (layer + 1) % self.deep.every == 0


@dataclasses.dataclass(frozen=True)
class VisionSpec(StackSpec):
    """The vision tower: `model.vision`, and what it shares with the decoder."""

    size: int  # pixels, height and width
    patch: int
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    patch_bias: bool
    positions: str
    embedding_norm: str
    class_token: bool
    final_norm: bool
    layers_used: int  # of depth; with fewer than all of them there is no final norm

    @property
    def side(self) -> int:
        """Patches along an edge."""
        return self.size // self.patch

    @property
    def patches(self) -> int:
        """Of an image."""
        return self.side**2

    @property
    def tokens(self) -> int:
        """Patches and, if there is one, the class token before them."""
        return self.patches + self.class_token

    @classmethod
    def from_config(cls, config: ConfigDict) -> "VisionSpec":
        model, vision, image = config.model, config.model.vision, config.image
        return cls(
            width=vision.width,
            depth=vision.depth,
            heads=vision.heads,
            kv_heads=vision.heads,
            head_dim=vision.width // vision.heads,
            ffn=vision.ffn,
            ffn_width=vision.ffn_width or ffn_width(vision.ffn, vision.width),
            bias=vision.bias,
            norm=vision.norm,
            norm_eps=vision.norm_eps,
            norm_position=vision.norm_position,
            qk_norm=vision.qk_norm,
            rope_theta=0.0,
            init=model.init,
            dtype=model.dtype,
            attention=model.attention,
            scan_layers=model.scan_layers,
            remat=model.remat,
            moe=None,
            deep=None,
            size=image.size,
            patch=image.patch,
            pixel_mean=tuple(image.mean),
            pixel_std=tuple(image.std),
            patch_bias=vision.patch_bias,
            positions=vision.positions,
            embedding_norm=vision.embedding_norm,
            class_token=vision.class_token,
            final_norm=vision.final_norm,
            layers_used=vision.depth + 1 + vision.feature_layer,
        )


@dataclasses.dataclass(frozen=True)
class ConnectorSpec:
    """`model.connector`: from the vision tower's patches [patches, vision width] to [positions, decoder width]."""

    kind: str
    side: int  # patches along an edge that come in
    inputs: int  # width that comes in
    positions: int  # that go out
    outputs: int  # width that goes out
    width: int  # inside
    depth: int
    heads: int
    downsample: int
    init: str
    norm_eps: float

    @classmethod
    def from_config(cls, config: ConfigDict, vision: VisionSpec, decoder_ffn_width: int) -> "ConnectorSpec":
        connector, d = config.model.connector, config.model.width
        widths = {"mlp": d, "attention": vision.width, "c_abstractor": 1024, "glu": decoder_ffn_width}
        depths = {"attention": 1, "c_abstractor": 3}
        return cls(
            kind=connector.kind,
            side=vision.side,
            inputs=vision.width,
            positions=config.image.positions,
            outputs=d,
            width=connector.width or widths.get(connector.kind, 0),
            depth=connector.depth or depths.get(connector.kind, 0),
            heads=connector.heads or vision.heads,
            downsample=connector.downsample,
            init=config.model.init,
            norm_eps=vision.norm_eps,
        )


@dataclasses.dataclass(frozen=True)
class AIMSpec:
    """What predicts pixels: `model.aim` of the config."""

    head_width: int  # AIM's
    head_depth: int
    pixel_weight: float  # AIMv2's

    @classmethod
    def from_config(cls, config: ConfigDict) -> "AIMSpec | None":
        """None unless model.family is aim or aimv2."""
        aim = config.model.aim
        if config.model.family not in ("aim", "aimv2"):
            return None
        return cls(aim.head_width, aim.head_depth, aim.pixel_weight)


@dataclasses.dataclass(frozen=True)
class ContrastiveSpec:
    """`model.contrastive`: how images and texts are compared."""

    loss: str
    width: int  # E
    pooling: str
    causal: bool  # the text tower
    scale: float  # at the beginning
    max_scale: float  # 0: no clamp
    bias: float  # at the beginning; only sigmoid has one

    @classmethod
    def from_config(cls, config: ConfigDict) -> "ContrastiveSpec | None":
        """None unless model.family is contrastive."""
        model, how = config.model, config.model.contrastive
        if model.family != "contrastive":
            return None
        causal = how.text_attention == "causal"
        return cls(how.loss, how.width, how.pooling, causal, how.scale, how.max_scale, how.bias)


@dataclasses.dataclass(frozen=True)
class Spec(StackSpec):
    """Everything about a model that does not depend on its weights or its input: its decoder's stack, and the rest.

    Of an encoder the stack is the text tower's (contrastive) or the text decoder's (aimv2).
    """

    family: str
    vocab_size: int
    tie_embeddings: bool
    size: int
    patch: int
    patch_positions: int  # learned positions, one per patch of an image; 0 is none
    image_positions: int  # P: that an image takes in a row
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    image_delimiters: bool
    delimiter_vectors: bool
    delimiter_weights: str
    vision: VisionSpec | None  # None: patches are embedded by a linear layer
    connector: ConnectorSpec | None
    aim: AIMSpec | None
    contrastive: ContrastiveSpec | None

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Spec":
        model, image = config.model, config.image
        inner = model.ffn_width or ffn_width(model.ffn, model.width)
        vision = None if model.family == "early_fusion" else VisionSpec.from_config(config)
        connector = None
        if model.family == "late_fusion" and vision:
            connector = ConnectorSpec.from_config(config, vision, inner)
        return cls(
            width=model.width,
            depth=model.depth,
            heads=model.heads,
            kv_heads=model.kv_heads or model.heads,
            head_dim=model.head_dim or model.width // model.heads,
            ffn=model.ffn,
            ffn_width=inner,
            bias=model.bias,
            norm=model.norm,
            norm_eps=model.norm_eps,
            norm_position=model.norm_position,
            qk_norm=model.qk_norm,
            rope_theta=model.rope_theta,
            init=model.init,
            dtype=model.dtype,
            attention=model.attention,
            scan_layers=model.scan_layers,
            remat=model.remat,
            moe=MoESpec.from_config(config, inner),
            deep=DeepSpec.from_config(config),
            family=model.family,
            vocab_size=model.vocab_size,
            tie_embeddings=model.tie_embeddings,
            size=image.size,
            patch=image.patch,
            patch_positions=image.positions if model.patch_positions and vision is None else 0,
            image_positions=image.positions,
            pixel_mean=tuple(image.mean),
            pixel_std=tuple(image.std),
            image_delimiters=config.data.image_delimiters,
            delimiter_vectors=model.delimiter_vectors,
            delimiter_weights=model.delimiter_weights,
            vision=vision,
            connector=connector,
            aim=AIMSpec.from_config(config),
            contrastive=ContrastiveSpec.from_config(config),
        )
