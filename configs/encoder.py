"""Vision encoders to start from: CLIP, SigLIP, AIM and AIMv2, trained on captions.

    python -m nmm_jax.describe --config=configs/encoder.py:clip-b
    python -m nmm_jax.train --config=configs/encoder.py:clip-b --config.data.root=DATA --workdir=RUN
    python -m nmm_jax.train --config=configs/encoder.py:clip-small --config.data.root=data --workdir=runs/clip

The argument is a name and, after a comma, the steps. A row is one pair: the image, and its text cut at row_length. The
run's folder is then named as the beginning of another's tower, --config.start.vision=RUN.

    clip      two towers, a softmax over the global batch (Radford et al., arXiv 2103.00020). Rates, batch and decay
              are the paper's for b and l; h is OpenCLIP's (LAION-2B). Quick GELU, as OpenAI's and DFN's weights have
    siglip    a sigmoid for each pair of the batch (Zhai et al., arXiv 2303.15343; dimensions of so400m: 2305.13035)
    aim       the next patch's pixels, behind a prefix that sees itself (El-Nouby et al., arXiv 2401.08541)
    aimv2     pixels, then text, by a decoder of 12 layers of width 1,024 (Fini et al., arXiv 2411.14402)

What differs from the papers: text towers have rotary positions in the place of learned ones; the heads and the
feed-forward width of AIMv2's decoder, which the paper does not state, are 8 and 2,816; AIM's norms have no biases.

Hardware: TPU slices and clusters of GPUs. Nobody has made these runs yet. Parameters
and FLOPs of training, of pairs with full rows, are computed by `describe`:

    name            width x depth   heads   patch   pixels    of the tower        in all   FLOPs a pair    the run
    clip-b              768 x 12      12      16      224          85.8 M       149.6 M          123 G     1.6e21
    clip-l             1024 x 24      16      14      224         303.2 M       427.6 M          526 G     6.7e21
    clip-h             1280 x 32      16      14      224         630.8 M       986.0 M        1,144 G     3.7e22
    siglip-b            768 x 12      12      16      224          85.8 M       203.7 M          139 G     1.2e21
    siglip-l           1024 x 24      16      16      256         303.4 M       653.1 M          604 G     5.4e21
    siglip-so400m      1152 x 27      16      14      224         412.4 M       878.7 M          820 G     7.4e21
    aim-0.6b           1536 x 24      12      14      224         680.5 M     1,087.5 M        1,699 G     3.5e21
    aim-1b             2048 x 24      16      14      224       1,209.3 M     1,617.3 M        2,522 G     1.2e22
    aim-3b             3072 x 24      24      14      224       2,719.9 M     3,130.0 M        4,865 G     2.4e22
    aim-7b             4096 x 32      32      14      224       6,445.1 M     6,857.4 M       10,630 G     5.2e22
    aimv2-l            1024 x 24       8      14      224         309.2 M       530.6 M          827 G     1.0e22
    aimv2-h            1536 x 24      12      14      224         680.9 M       902.7 M        1,408 G     1.7e22
    aimv2-1b           2048 x 24      16      14      224       1,235.0 M     1,457.4 M        2,269 G     2.8e22
    aimv2-3b           3072 x 24      24      14      224       2,720.7 M     2,944.1 M        4,572 G     5.6e22

Batch, steps and warm-up of clip-h and siglip are those of OpenCLIP's and big_vision's runs as remembered, not looked
up: check them before spending on them.

`small` encoders are for 2 CPU cores and the captions that configs/small.py is about, with towers of the same size that
configs/late_fusion.py:small,encoder=KIND and configs/mm1.py:small take: 400 steps of 64 pairs. Time, computed and not
measured: 1.1e13 (aim) to 3.0e13 FLOPs (aimv2), which is two to six minutes at 80 GFLOP/s. Loss to begin with: ln 64 =
4.16 (clip), near 10 (siglip, all bias), 1 for each normalised pixel (aim).
"""

from typing import Any

from ml_collections import ConfigDict

from configs import small
from configs.argument import parse
from configs.base import base

# Mean and standard deviation of pixels, as the published weights have them; AIM's are ImageNet's.
CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PIXELS = {
    "clip": CLIP_PIXELS,
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "aim": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "aimv2": CLIP_PIXELS,
}

# What the towers of a kind have in common; all else is as in configs/base.py.
KINDS: dict[str, dict[str, Any]] = {
    "clip": dict(
        ffn="quick_gelu", bias=True, patch_bias=False, class_token=True, embedding_norm="after_positions",
    ),
    "siglip": dict(ffn="gelu_tanh", bias=True, norm_eps=1e-6),
    "aim": dict(ffn="gelu", norm_eps=1e-6, positions="sincos", embedding_norm="before_positions"),
    "aimv2": dict(ffn="swiglu", norm="rmsnorm", embedding_norm="before_positions"),
}  # fmt: skip

# name: vision width, depth, heads, feed-forward width, patch, image size
TOWERS = {
    "clip-b": (768, 12, 12, 3_072, 16, 224),
    "clip-l": (1024, 24, 16, 4_096, 14, 224),
    "clip-h": (1280, 32, 16, 5_120, 14, 224),
    "siglip-b": (768, 12, 12, 3_072, 16, 224),
    "siglip-l": (1024, 24, 16, 4_096, 16, 256),
    "siglip-so400m": (1152, 27, 16, 4_304, 14, 224),
    "aim-0.6b": (1536, 24, 12, 6_144, 14, 224),
    "aim-1b": (2048, 24, 16, 8_192, 14, 224),
    "aim-3b": (3072, 24, 24, 12_288, 14, 224),
    "aim-7b": (4096, 32, 32, 16_384, 14, 224),
    "aimv2-l": (1024, 24, 8, 2_816, 14, 224),
    "aimv2-h": (1536, 24, 12, 4_096, 14, 224),
    "aimv2-1b": (2048, 24, 16, 5_632, 14, 224),
    "aimv2-3b": (3072, 24, 24, 8_192, 14, 224),
    "clip-small": (128, 4, 4, 512, 8, 64),
    "siglip-small": (128, 4, 4, 512, 8, 64),
    "aim-small": (128, 4, 4, 512, 8, 64),
    "aimv2-small": (128, 4, 4, 344, 8, 64),
}

# name: the text tower's width, depth, heads; width of the space that both are mapped to; learning rate
CONTRASTIVE = {
    "clip-b": (512, 12, 8, 512, 5e-4),
    "clip-l": (768, 12, 12, 768, 4e-4),
    "clip-h": (1024, 24, 16, 1024, 5e-4),
    "siglip-b": (768, 12, 12, 768, 1e-3),
    "siglip-l": (1024, 24, 16, 1024, 1e-3),
    "siglip-so400m": (1152, 27, 16, 1152, 1e-3),
}
AIMV2_RATES = {"aimv2-l": 1e-3, "aimv2-h": 8e-4, "aimv2-1b": 8e-4, "aimv2-3b": 4e-4}


def get_config(argument: str = "clip-b"):
    """argument: NAME or NAME,STEPS; names are the keys of TOWERS."""
    name, steps, _ = parse(argument, "configs/encoder.py", TOWERS, {})
    kind, _, size = name.partition("-")
    c = small.get_config().unlock() if size == "small" else _of_paper(kind, name)
    if size == "small":
        _make_small(c, kind)
    set_objective(c, kind)
    set_tower(c, name)
    c.steps = steps or c.steps
    c.schedule.warmup = min(c.schedule.warmup, c.steps // 4)
    return c.lock()


def set_tower(c: ConfigDict, name: str) -> None:
    """Gives a config the vision tower of an encoder, its patch, resolution and normalisation of pixels."""
    kind = name.partition("-")[0]
    vision, plain = c.model.vision, base().model.vision
    vision.update({**plain, **KINDS[kind]})
    vision.width, vision.depth, vision.heads, vision.ffn_width, c.image.patch, c.image.size = TOWERS[name]
    c.image.mean, c.image.std = PIXELS[kind]


def set_objective(c: ConfigDict, kind: str) -> None:
    """Makes a config one of pairs for an encoder's objective."""
    c.data.sources, c.data.weights = ("captions",), (1.0,)
    c.data.rows = "pairs"
    c.image.positions, c.image.per_row = 0, 1
    c.model.family = kind if kind in ("aim", "aimv2") else "contrastive"
    c.model.patch_positions = False
    if kind == "siglip":
        contrastive = c.model.contrastive
        contrastive.loss, contrastive.pooling, contrastive.text_attention = "sigmoid", "attention", "bidirectional"
        contrastive.scale, contrastive.max_scale, contrastive.bias = 10.0, 0.0, -10.0
    c.schedule.kind = "cosine"


def _of_paper(kind: str, name: str) -> ConfigDict:
    c = base()
    c.data.tokenizer = "tokenizer.json"
    c.model.init = "normal"
    c.model.qk_norm = "none"
    c.checkpoint.every = 1_000
    c.evaluation.rows = 1_000
    {"clip": _clip, "siglip": _siglip, "aim": _aim, "aimv2": _aimv2}[kind](c, name)
    return c


def _text_tower(c: ConfigDict, name: str, like: str) -> None:
    model = c.model
    model.width, model.depth, model.heads, model.contrastive.width, c.optimizer.learning_rate = CONTRASTIVE[name]
    model.ffn, model.bias, model.norm = KINDS[like]["ffn"], True, "layernorm"
    if name == "siglip-so400m":
        model.ffn_width = 4_304


def _clip(c: ConfigDict, name: str) -> None:
    _text_tower(c, name, "clip")
    c.model.vocab_size = 49_408
    c.row_length = 77
    c.image.crop_scale, c.image.flip = (0.9, 1.0), 0.0
    if name == "clip-h":
        c.batch_rows, c.steps, c.schedule.warmup = 79_104, 404_000, 10_000  # 32 B pairs
    else:
        c.batch_rows, c.steps, c.schedule.warmup = 32_768, 390_625, 2_000  # 32 times 400 M pairs
    c.optimizer.beta1, c.optimizer.beta2, c.optimizer.eps = 0.9, 0.98, 1e-6
    c.optimizer.weight_decay = 0.2 * c.optimizer.learning_rate


def _siglip(c: ConfigDict, name: str) -> None:
    _text_tower(c, name, "siglip")
    c.model.norm_eps = 1e-6
    c.model.vocab_size = 32_000
    c.row_length = 64
    c.image.augment = False  # resized only
    c.batch_rows, c.steps, c.schedule.warmup = 32_768, 274_658, 10_000  # 9 B pairs
    c.optimizer.beta2 = 0.95
    c.optimizer.weight_decay = 1e-4


def _aim(c: ConfigDict, name: str) -> None:
    c.row_length = 77  # its text is not used
    c.batch_rows, c.steps = 4_096, 500_000 if name == "aim-0.6b" else 1_200_000
    c.schedule.warmup = 31_250
    c.optimizer.learning_rate = 1e-3
    c.optimizer.weight_decay = 0.05 * c.optimizer.learning_rate


def _aimv2(c: ConfigDict, name: str) -> None:
    c.model.vocab_size = 32_000
    c.model.width, c.model.depth, c.model.heads, c.model.ffn_width = 1_024, 12, 8, 2_816
    c.row_length = 77
    c.batch_rows, c.steps, c.schedule.warmup = 8_192, 1_500_000, 12_500
    c.optimizer.learning_rate = AIMV2_RATES[name]
    c.optimizer.weight_decay = 1e-4
    c.schedule.final_ratio = 1e-5 / c.optimizer.learning_rate


def _make_small(c: ConfigDict, kind: str) -> None:
    c.steps = 400
    c.batch_rows = 64
    c.row_length = 64
    c.model.depth = 2
    c.model.contrastive.width = 128
    c.model.aim.head_width, c.model.aim.head_depth = 128, 2
    c.optimizer.learning_rate = 1e-3
    c.schedule.warmup = 50
    c.schedule.cooldown = 0
    c.checkpoint.every = 200
