"""MM1's ablations at the scale of one CPU core: a base, one change at a time; and the families on the same tokens.

    launch/ablations.sh DATA                                     # data, all runs, their evaluation, tables and figure
    python -m nmm_jax.sweep --runs='clip,base,connector-*'       # some of them
    python -m nmm_jax.train --config=configs/ablations.py:base --workdir=runs/ablations/base         # one by hand

McKinzie et al. 2024 (arXiv 2403.09611), section 3: image encoder and its objective, resolution, tokens an image,
connector, share of captions against interleaved documents, share of text, synthetic captions. The base is late fusion
(configs/mm1.py:small, narrower and less deep) from a CLIP tower of the same data, 64 pixels, 16 tokens an image,
45/45/10. Captions are two sources, `captions` (sentences) and `emoji` (names, two positions to one). In all runs, early
fusion's too, an image takes as many positions and stands between delimiters, unless that is the change: so rows are the
very same. `scenes-*` are the families on the rendered scenes of configs/quickstart.py, where there is more to be seen.

The argument is the name of a run; RUNS says what each changes in its base, GROUPS which are compared. Hardware: one
CPU core. Time and results: docs/results.md.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import deep_fusion, encoder, late_fusion, mm1, quickstart

FOLDER = "runs/ablations"  # of the runs; those that begin with another's encoder look for it here
STEPS, ENCODER_STEPS = 300, 250
NEVER = 1e-6  # a weight that is one row of 10,000: the source is evaluated, and not trained on


def _weights(captions: float, interleaved: float, text: float) -> tuple[float, ...]:
    return tuple(max(w, NEVER) for w in (1 / 3 * captions, 2 / 3 * captions, interleaved, text))


SCRATCH = {"start.vision": "", "optimizer.vision_scale": 1.0}
EARLY = {"model.family": "early_fusion", "image.patch": 16, "model.patch_positions": True} | SCRATCH
MOT = {"model.deep.modules": deep_fusion.ALL}
COGVLM = {
    "data.image_attention": "causal",
    "data.image_rotary": "shared",
    "model.connector.kind": "glu",
    "model.deep.modules": deep_fusion.EXPERT,
    "model.delimiter_vectors": True,
    "model.delimiter_weights": "boi_image",
}

# Encoders of pairs, to start from: name -> objective.
ENCODERS = {"clip": "clip", "siglip": "siglip", "aim": "aim", "aimv2": "aimv2", "scenes-clip": "clip"}

# What a run changes; `encoder` is whose tower it has, and begins with.
RUNS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ENCODERS},
    "base": {},
    "base-seed-1": {"seed": 1},
    "base-seed-2": {"seed": 2},
    "encoder-siglip": {"encoder": "siglip"},
    "encoder-aim": {"encoder": "aim"},
    "encoder-aimv2": {"encoder": "aimv2"},
    "encoder-none": SCRATCH,
    "pixels-32": {"image.size": 32},
    "pixels-96": {"image.size": 96},
    "tokens-36": {"image.positions": 36},
    "tokens-64": {"image.positions": 64},
    "tokens-144": {
        "image.positions": 144, "image.size": 96, "row_length": 512, "batch_rows": 2, "evaluation.batch_rows": 4,
    },
    "connector-attention": {"model.connector.kind": "attention"},
    "connector-c_abstractor": {"model.connector.kind": "c_abstractor"},
    "connector-mlp": {"model.connector.kind": "mlp", "image.positions": 64},
    "captions-0": {"data.weights": _weights(0, 0.9, 0.1)},
    "captions-33": {"data.weights": _weights(0.3, 0.6, 0.1)},
    "captions-66": {"data.weights": _weights(0.6, 0.3, 0.1)},
    "captions-100": {"data.weights": _weights(0.9, 0, 0.1)},
    "text-0": {"data.weights": _weights(0.5, 0.5, 0)},
    "text-33": {"data.weights": _weights(1 / 3, 1 / 3, 1 / 3)},
    "text-67": {"data.weights": _weights(1 / 6, 1 / 6, 2 / 3)},
    "synthetic": {"data.root": "runs/ablations/data-synthetic"},
    "early": EARLY,
    "mot": EARLY | MOT,
    "cogvlm": COGVLM | SCRATCH | {"model.connector.downsample": 2},
    "scenes-early": {},
    "scenes-late": {},
    "scenes-late-slow": {"optimizer.vision_scale": 0.1},
    "scenes-late-clip": {"start.vision": f"{FOLDER}/scenes-clip"},
    "scenes-mot": MOT,
    "scenes-cogvlm": COGVLM,
}  # fmt: skip

GROUPS = {
    "noise": ("base", "base-seed-1", "base-seed-2"),
    "encoders": tuple(ENCODERS),
    "encoder's objective": ("base", "encoder-siglip", "encoder-aim", "encoder-aimv2", "encoder-none"),
    "pixels": ("pixels-32", "base", "pixels-96"),
    "tokens an image": ("base", "tokens-36", "tokens-64", "tokens-144"),
    "connector": ("base", "connector-attention", "connector-c_abstractor", "tokens-64", "connector-mlp"),
    "captions against interleaved": ("captions-0", "captions-33", "base", "captions-66", "captions-100"),
    "text": ("text-0", "base", "text-33", "text-67"),
    "synthetic captions": ("base", "synthetic"),
    "families": ("early", "encoder-none", "base", "mot", "cogvlm"),
    "families on scenes": (
        "scenes-early",
        "scenes-mot",
        "scenes-late",
        "scenes-late-slow",
        "scenes-late-clip",
        "scenes-cogvlm",
    ),
}
LABELS = {
    "base": "base (CLIP, 64 pixels, 16 tokens, average, 45/45/10)",
    "encoder-none": "from scratch",
    "tokens-64": "64 tokens, average",
}


def get_config(name: str = "base"):
    """name: one of RUNS."""
    if name not in RUNS:
        raise ValueError(f"configs/ablations.py:{name}: expected one of {', '.join(RUNS)}")
    changes = dict(RUNS[name])
    kind = changes.pop("encoder", ENCODERS.get(name, "clip"))
    c = _scenes(name) if name.startswith("scenes") else _real(kind)
    if name in ENCODERS:
        _make_encoder(c, kind)
    for key, value in changes.items():
        *groups, last = key.split(".")
        group = c
        for g in groups:
            group = group[g]
        group[last] = value
    c.log.tensorboard = False
    c.data.workers = 1
    return c.lock()


def _real(kind: str) -> ConfigDict:
    c = mm1.get_config(f"small,{STEPS},encoder={kind}-small,connector=average").unlock()
    c.data.root = f"{FOLDER}/data"
    c.data.sources, c.data.weights = ("captions", "emoji", "interleaved", "text"), _weights(0.45, 0.45, 0.10)
    c.data.image_delimiters = True
    c.model.vocab_size = 2_048
    c.model.width, c.model.depth, c.model.heads, c.model.ffn_width = 96, 2, 2, 256
    c.model.vision.width, c.model.vision.depth, c.model.vision.ffn_width = 96, 2, 256 if kind == "aimv2" else 384
    c.model.connector.width = 96
    c.start.vision = f"{FOLDER}/{kind}"
    c.optimizer.vision_scale = 0.25  # of a tower that was trained before
    c.batch_rows = 4
    c.schedule.warmup = 50
    c.checkpoint.every = 200
    return c


def _scenes(name: str) -> ConfigDict:
    late = name != "scenes-early" and name != "scenes-mot"
    c = (late_fusion.get_config("quickstart") if late else quickstart.get_config()).unlock()
    c.data.image_delimiters = True
    c.optimizer.vision_scale = 1.0
    return c


def _make_encoder(c: ConfigDict, kind: str) -> None:
    """The objective on captions, 64 pairs a step, cut at 48 positions."""
    sources = ("captions",) if "scenes" in c.data.root else ("captions", "emoji")
    encoder.set_objective(c, kind)
    c.data.sources, c.data.weights = sources, (1.0,) * len(sources)
    c.data.image_delimiters = False
    c.start.vision = ""
    c.optimizer.vision_scale = 1.0
    c.model.contrastive.width = c.model.aim.head_width = c.model.width
    c.model.aim.head_depth = 2
    if kind == "clip" and not c.model.vision.class_token:  # the tower of configs/late_fusion.py:quickstart
        c.model.contrastive.pooling = "mean"
    c.batch_rows, c.row_length = 64, 48
    c.steps = ENCODER_STEPS
    c.schedule.warmup, c.schedule.cooldown = 50, 0
    c.optimizer.learning_rate = 1e-3
