"""A small early-fusion model on data you converted: the first run on your own captions, documents and text.

    python -m data_pipelines.convert --format=webdataset --input='captions-*.tar' --output=data/captions
    python -m data_pipelines.convert --format=obelics --input=docs.parquet --output=data/interleaved
    python -m data_pipelines.convert --format=jsonl --input=pages.jsonl.zst --output=data/text
    python -m data_pipelines.tokenizer train --input=data/captions,data/interleaved,data/text \\
        --vocab_size=8192 --output=data/tokenizer.json
    python -m nmm_jax.train --config=configs/small.py --config.data.root=data --workdir=runs/small

Hardware: 2 CPU cores and 2 GB of memory. Time: 30 minutes, measured while tests ran on the same cores. Result to
expect: on the corpus of docs/results.md (1,339 captions, 297 web pages, 1,249 texts) held-out losses of 4.35, 4.58 and
5.65 nats a token; more data, lower losses.
"""

from configs.base import base


def get_config():
    c = base()
    c.steps = 1_500
    c.batch_rows = 8
    c.row_length = 256
    c.data.root = "data"
    c.data.tokenizer = "tokenizer.json"
    c.image.size = 64
    c.image.patch = 16
    c.image.positions = 16
    c.image.per_row = 8
    c.image.crop_scale = (0.6, 1.0)

    c.model.vocab_size = 8_192
    c.model.width = 128
    c.model.depth = 4
    c.model.heads = 2
    c.model.rope_theta = 1_000.0
    c.model.patch_positions = True
    c.model.dtype = "float32"
    c.model.remat = "none"
    c.model.scan_layers = False

    c.optimizer.learning_rate = 2e-3
    c.schedule.warmup = 100
    c.schedule.cooldown = 300
    c.checkpoint.every = 250
    return c.lock()
