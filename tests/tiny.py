"""A config that trains on tests/data_pipelines/small_corpus.py in a second or two: some ten thousand parameters."""

from configs.base import base


def get_config():
    c = base()
    c.steps = 40
    c.batch_rows = 8
    c.row_length = 48
    c.data.window = 16
    c.image.size = 4
    c.image.patch = 2
    c.image.positions = 4
    c.image.per_row = 3
    c.model.vocab_size = 264
    c.model.width = 32
    c.model.depth = 1
    c.model.heads = 4
    c.model.ffn_width = 64
    c.model.init = "normal"
    c.model.dtype = "float32"
    c.model.remat = "none"
    c.optimizer.learning_rate = 1e-2
    c.schedule.warmup = 4
    c.checkpoint.every = 7
    c.checkpoint.keep = 2
    c.log.every = 1
    c.log.tensorboard = False
    return c
