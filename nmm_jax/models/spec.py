"""The network's dimensions and choices, resolved from a config: zeros that mean "choose" become numbers here, once."""

import dataclasses

from ml_collections import ConfigDict

FFN_MULTIPLE = 256  # the paper's code base rounds the SwiGLU width up to a multiple of this


def swiglu_width(width: int) -> int:
    """2/3 * 4 * width (as many parameters as an ungated FFN of 4 * width), rounded up to a multiple of 256."""
    return -(-int(8 * width / 3) // FFN_MULTIPLE) * FFN_MULTIPLE


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

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Spec":
        model, image = config.model, config.image
        return cls(
            vocab_size=model.vocab_size,
            width=model.width,
            depth=model.depth,
            heads=model.heads,
            kv_heads=model.kv_heads or model.heads,
            head_dim=model.head_dim or model.width // model.heads,
            ffn_width=model.ffn_width or swiglu_width(model.width),
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
        )
