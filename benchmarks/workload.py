"""What a config's step works on: the config with what the command line sets, batches of its stream, their needs."""

import ast
import contextlib
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from benchmarks import corpus
from benchmarks.mixture_rows import first_of_segment
from configs import loading
from data_pipelines.rows import Batch


class Needs(NamedTuple):
    """Of the mean batch, as scaling/counting.py takes them."""

    tokens: float  # real positions
    pairs: float  # of a query and a key that it sees
    images: float


def configured(file: str, keys: Mapping[str, Any], settings: Iterable[str] = ()) -> ConfigDict:
    """FILE[:arg] with these keys, and then with settings KEY=VALUE; what is no Python literal is a word."""
    given = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set={setting}: expected KEY=VALUE, as in --set=batch_rows=4")
        given[key] = text
        with contextlib.suppress(ValueError, SyntaxError):
            given[key] = ast.literal_eval(text)
    return loading.load(file, dict(keys) | given)


def name_of(file: str) -> str:
    """configs/moe.py:quickstart-8e -> moe:quickstart-8e."""
    return file.removeprefix("configs/").replace(".py", "")


def has_data(config: ConfigDict) -> bool:
    return all((pathlib.Path(config.data.root) / source / "card.json").exists() for source in config.data.sources)


def read(config: ConfigDict, generated: pathlib.Path, count: int) -> list[Batch]:
    """Batches of a config's own data, or if it has none of the corpus generated in that folder, which it has then."""
    if not has_data(config):
        corpus.use(config, generated)
    return corpus.batches(config, count)


def needs(batches: list[Batch]) -> Needs:
    real = [batch["segment_ids"] > 0 for batch in batches]
    keys = [batch["attend_until"] - first_of_segment(batch["segment_ids"]) for batch in batches]
    return Needs(
        tokens=float(np.mean([own.sum() for own in real])),
        pairs=float(np.mean([seen[own].sum() for seen, own in zip(keys, real, strict=True)])),
        images=float(np.mean([batch["image_mask"].sum() for batch in batches])),
    )
