"""Deep fusion: images have weights of their own inside the decoder, at the FLOPs of one set.

    python -m nmm_jax.describe --config=configs/deep_fusion.py:cogvlm-17b
    python -m nmm_jax.train --config=configs/deep_fusion.py:cogvlm-17b --config.data.root=DATA --workdir=RUN \\
        --config.start.decoder=VICUNA --config.start.vision=ENCODER
    python -m nmm_jax.train --config=configs/deep_fusion.py:mot-1.6b --config.data.root=DATA --workdir=RUN

The argument is a name and, after a comma, the steps:

    cogvlm-17b    CogVLM's first stage (Wang et al., arXiv 2311.03079)
    cogvlm2-19b   CogVLM2 on Llama 3 8B: 1344 pixels, halved to 48 x 48 positions, 8,192 positions a row
    mot-SIZE      Mixture-of-Transformers (Liang et al., arXiv 2411.04996): a size of configs/early_fusion.py with all
                  weights but the embeddings twice. Its data, steps and rates are the dense model's

**CogVLM.** The tower is EVA2-CLIP-E without its last layer, norms behind the sublayers and no final one; the adapter a
linear layer, LayerNorm, GELU and SwiGLU; two learned vectors stand around an image. In every layer query, key, value,
output and feed-forward weights of images begin as copies of the text's (norms are shared); boi meets the images'
weights, eoi the text's. All patches of an image have one rotary position, and all attention is causal. Trained are
those weights, the adapter and the two vectors: 6.476 + 0.143 = 6.619 B parameters; language model and tower are frozen.

Stage 1: 120,000 steps, warm-up 12,000, peak 1e-4, a cosine (here to 0: the paper does not say), decay 0.05 of the rate,
224 pixels, resized without a crop. Its 8,192 pairs a batch are here 1,152 rows of up to 7 pairs. `cogvlm-17b,size=490`
is like the end of stage 2: 490 pixels, 30,000 steps at 1e-5, its 1,024 pairs in 352 rows of up to 3.
`cogvlm-17b,every=4` is the paper's ablation with a visual expert in every 4th layer only. CogVLM2's recipe is not
published: it has stage 1's, with up to 3 images in a row of 8,192.

    name          parameters    trained     tower    adapter    visual expert   FLOPs a position*
    cogvlm-17b       17.64 B     6.62 B    4.28 B     142.6M          6.476 B             39.3 G
    cogvlm2-19b      19.50 B     7.18 B    4.30 B     196.4M          6.980 B             69.5 G
    mot-SIZE: the dense model's, and its layers' once more; FLOPs are the dense model's
    * of training, half of the positions being images; all computed by `describe`

Hardware: TPU slices or GPU clusters. Time and loss: nobody has made these runs yet.

For 2 CPU cores, from scratch and with nothing frozen: mot-quickstart, cogvlm-quickstart on the scenes of
configs/quickstart.py, mot-small, cogvlm-small on the data of configs/small.py.

    python -m nmm_jax.train --config=configs/deep_fusion.py:mot-quickstart --config.data.root=runs/scenes \\
        --workdir=runs/mot
"""

from ml_collections import ConfigDict

from configs import early_fusion, encoder, late_fusion, quickstart, small
from configs.argument import parse
from configs.base import base

COGVLM = ("cogvlm-17b", "cogvlm2-19b")
ON_CPU = {"quickstart": quickstart, "small": small}
NAMES = (
    *COGVLM,
    *(f"mot-{size}" for size in early_fusion.SIZES),
    *(f"{kind}-{size}" for kind in ("mot", "cogvlm") for size in ON_CPU),
)
EXPERT = ("qkv", "out", "ffn")  # CogVLM's visual expert
ALL = (*EXPERT, "norms")  # Mixture-of-Transformers


def get_config(argument: str = "cogvlm-17b"):
    """argument: NAME or NAME,STEPS; names are NAMES. cogvlm-17b has the options size=490 and every=2, 4, 8."""
    options = {"size": ("224", "490"), "every": ("1", "2", "4", "8")} if argument.startswith("cogvlm-17b") else {}
    name, steps, chosen = parse(argument, "configs/deep_fusion.py", NAMES, options)
    kind, _, size = name.partition("-")
    if name in COGVLM:
        c = _cogvlm(name, int(chosen.get("size", 224)), int(chosen.get("every", 1)))
        c.steps = steps or c.steps
        c.schedule.warmup = min(c.schedule.warmup, c.steps // 4)
    elif kind == "mot":
        c = _mot(size, steps)
    else:
        c = _cogvlm_on_cpu(size)
        c.steps = steps or c.steps
    return c.lock()


def _cogvlm(name: str, size: int, every: int) -> ConfigDict:
    c = base()
    c.steps = 120_000
    c.batch_rows = 1_152
    c.row_length = 2_048
    c.data.sources, c.data.weights = ("captions",), (1.0,)
    c.data.tokenizer = "tokenizer.json"
    c.image.per_row = 7
    c.image.size = size
    c.image.augment = False
    c.image.mean, c.image.std = encoder.PIXELS["clip"]

    model, vision = c.model, c.model.vision
    model.width, model.depth, model.heads, model.ffn_width, model.vocab_size = 4096, 32, 32, 11_008, 32_000
    model.qk_norm = "none"
    model.init = "normal"
    vision.width, vision.depth, vision.heads, vision.ffn_width = 1792, 63, 16, 15_360
    vision.ffn, vision.bias, vision.norm_eps, vision.norm_position = "gelu", True, 1e-6, "post"
    vision.class_token, vision.final_norm = True, False
    _visual_expert(c)
    model.deep.initial, model.deep.every = "copy", every

    c.optimizer.learning_rate = 1e-4
    c.optimizer.freeze = _frozen(every)
    c.schedule.kind = "cosine"
    c.schedule.warmup = 12_000
    c.checkpoint.every = 1_000
    if size == 490:
        c.steps, c.batch_rows, c.row_length, c.image.per_row = 30_000, 352, 4_096, 3
        c.optimizer.learning_rate = 1e-5
        c.schedule.warmup = 1_200
    if name == "cogvlm2-19b":
        c.row_length, c.image.per_row, c.image.size, model.connector.downsample = 8_192, 3, 1_344, 2
        model.kv_heads, model.ffn_width, model.vocab_size, model.rope_theta = 8, 14_336, 128_256, 500_000.0
        model.deep.qkv_bias = True
    c.image.positions = (c.image.size // c.image.patch // model.connector.downsample) ** 2
    c.optimizer.weight_decay = 0.05 * c.optimizer.learning_rate
    return c


def _frozen(every: int) -> tuple[str, ...]:
    """All but the visual expert, the adapter and the vectors around an image."""
    layers = "layers" if every == 1 else "layers/block_?"  # layers of several kinds are stacked apart
    return ("embed/*", f"{layers}/attention*", f"{layers}/ffn*", "final_norm/*", "head/*", "vision/*")


def _visual_expert(c: ConfigDict) -> None:
    c.data.image_delimiters = True
    c.data.image_attention = "causal"
    c.data.image_rotary = "shared"
    c.model.family = "late_fusion"
    c.model.connector.kind = "glu"
    c.model.deep.modules = EXPERT
    c.model.delimiter_vectors = True
    c.model.delimiter_weights = "boi_image"


def _cogvlm_on_cpu(size: str) -> ConfigDict:
    c = late_fusion.get_config(size).unlock()
    _visual_expert(c)
    c.model.connector.downsample = 2 if size == "small" else 1  # 64 patches to 16 positions
    return c


def _mot(size: str, steps: int | None) -> ConfigDict:
    if size in ON_CPU:
        c = ON_CPU[size].get_config().unlock()
        c.steps = steps or c.steps
    else:
        c = early_fusion.get_config(f"{size},{steps}" if steps else size).unlock()
    c.model.deep.modules = ALL
    return c
