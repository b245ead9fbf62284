"""A study of tests/tiny.py at two widths: 2 sizes by 2 budgets, a second or two of training."""

from configs.study import base, grid


def get_config():
    c = base()
    c.name = "tiny"
    c.architectures.early = "tests/tiny.py"
    c.run.data = {"root": "corpus"}
    c.run.evaluation = {"rows": 8, "batch_rows": 8}
    c.run.schedule = {"warmup": 4}
    c.changes = (("early-w16-*", {"model.width": 16}),)
    c.mixtures["45-45-10"] = (0.45, 0.45, 0.10)
    c.grids.early = grid()
    c.grids.early.update(architecture="early", sizes=("w16", "w32"), tokens=(3_840.0, 7_680.0))  # 10 and 20 steps
    return c.lock()
