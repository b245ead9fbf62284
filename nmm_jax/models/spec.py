"""The network's dimensions and choices, resolved from a config: zeros that mean "choose" become numbers here, once."""

import dataclasses

from ml_collections import ConfigDict

FFN_MULTIPLE = 256  # the paper's code base rounds the SwiGLU width up to a multiple of this


def swiglu_width(width: int) -> int:
    """2/3 * 4 * width (as many parameters as an ungated FFN of 4 * width), rounded up to a multiple of 256."""
    return -(-int(8 * width / 3) // FFN_MULTIPLE) * FFN_MULTIPLE


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
    def from_config(cls, config: ConfigDict, ffn_width: int) -> "MoESpec | None":
        """None for a dense model."""
        moe = config.model.moe
        if not moe.experts:
            return None
        split = moe.granularity
        if ffn_width % split:
            raise ValueError(
                f"the feed-forward width {ffn_width} (model.ffn_width, or derived from model.width) does not divide "
                f"into model.moe.granularity = {split} parts"
            )
        groups = {"agnostic": 0, "grouped": moe.image_experts or moe.experts // 2, "fixed": moe.experts // 2}
        return cls(
            experts=split * moe.experts,
            top_k=split * moe.top_k,
            width=ffn_width // split,
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
class Spec:
    """Everything about a model that does not depend on its weights or its input."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    norm: str
    norm_eps: float
    norm_position: str
    qk_norm: str
    rope_theta: float
    tie_embeddings: bool
    init: str
    dtype: str
    attention: str
    scan_layers: bool
    remat: str
    patch: int
    patch_positions: int  # learned positions, one per patch of an image; 0 is none
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    moe: MoESpec | None

    @property
    def period(self) -> int:
        """Layers after which the kinds of layers repeat."""
        return self.moe.every if self.moe else 1

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Spec":
        model, image = config.model, config.image
        ffn_width = model.ffn_width or swiglu_width(model.width)
        return cls(
            vocab_size=model.vocab_size,
            width=model.width,
            depth=model.depth,
            heads=model.heads,
            kv_heads=model.kv_heads or model.heads,
            head_dim=model.head_dim or model.width // model.heads,
            ffn_width=ffn_width,
            norm=model.norm,
            norm_eps=model.norm_eps,
            norm_position=model.norm_position,
            qk_norm=model.qk_norm,
            rope_theta=model.rope_theta,
            tie_embeddings=model.tie_embeddings,
            init=model.init,
            dtype=model.dtype,
            attention=model.attention,
            scan_layers=model.scan_layers,
            remat=model.remat,
            patch=image.patch,
            patch_positions=image.positions if model.patch_positions else 0,
            pixel_mean=tuple(image.mean),
            pixel_std=tuple(image.std),
            moe=MoESpec.from_config(config, ffn_width),
        )
