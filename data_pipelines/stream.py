"""The training stream: row g is a pure function of (plans, weights, seed, g), so the state of the data is a number.

    source   smooth weighted round robin over a period of 10,000 rows
    rank     how many rows of that source came before, by counting
    epoch    rank // rows of the source's plan
    row      a permutation of the plan's rows, without a table, new each epoch
    pixels   augmented by uniforms hashed from (seed, source, rank, slot)

Weights are shares of real positions: the rate of a source is its weight over the mean real positions of its rows, so
that padding counts for nobody.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence

import grain
import numpy as np
from ml_collections import ConfigDict

from data_pipelines import images, store, tokenizer
from data_pipelines.geometry import Geometry
from data_pipelines.plan import Plan, plan_folder
from data_pipelines.rows import Batch, RowBuilder, allocate

PERIOD = 10_000  # rows after which the pattern of sources repeats


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a row of the stream comes from."""

    source: int
    rank: int  # rows of this source that came before it
    epoch: int
    row: int  # of the source's plan


@dataclasses.dataclass(frozen=True)
class Mixture:
    """In which order the sources take turns."""

    rates: tuple[int, ...]  # rows of each source in a period; they add up to PERIOD

    @classmethod
    def of(cls, weights: Sequence[float], positions_per_row: Sequence[float]) -> "Mixture":
        """Shares of rows that give shares of positions, rounded by largest remainder; everyone gets a row."""
        shares = np.asarray(weights, np.float64) / np.asarray(positions_per_row, np.float64)
        exact = shares / shares.sum() * PERIOD
        rates = np.maximum(np.floor(exact), 1).astype(int)
        while (missing := PERIOD - int(rates.sum())) != 0:
            behind = exact - rates
            if missing < 0:  # the least rates were raised to 1
                behind = np.where(rates > 1, -behind, -np.inf)
            rates[int(np.argmax(behind))] += 1 if missing > 0 else -1
        return cls(tuple(int(r) for r in rates))

    @functools.cached_property
    def pattern(self) -> np.ndarray:
        """Source of each row of a period, int8 [PERIOD]: in every run of n rows each source has its share, to a row.

        Each turn everyone earns their rate; who has most goes, and pays a period (nginx's smooth weighted round robin).
        """
        rates, credit = np.array(self.rates), np.zeros(len(self.rates), int)
        pattern = np.zeros(PERIOD, np.int8)
        for n in range(PERIOD):
            credit += rates
            pattern[n] = k = int(np.argmax(credit))
            credit[k] -= PERIOD
        return pattern

    @functools.cached_property
    def _before(self) -> np.ndarray:
        """Rows of each source before row n of a period, int [PERIOD, sources]."""
        taken = self.pattern[:, None] == np.arange(len(self.rates))
        return np.cumsum(taken, axis=0) - taken

    def locate(self, g: int) -> tuple[int, int]:
        """(source, rank) of row g."""
        period, n = divmod(g, PERIOD)
        source = int(self.pattern[n])
        return source, period * self.rates[source] + int(self._before[n, source])


class Stream:
    """An endless sequence of rows, any of which any process can build. May be sent to another process."""

    def __init__(
        self,
        names: Sequence[str],
        builders: Sequence[RowBuilder],
        weights: Sequence[float],
        seed: int,
        augment: dict | None,
    ):
        """augment: the arguments `crop_scale` and `flip` of images.to_train; None only resizes."""
        self.names = tuple(names)
        self.builders = tuple(builders)
        self.geometry = builders[0].geometry
        self.tokenizer = builders[0].tokenizer
        self.seed = seed
        self.augment = augment
        self.weights = tuple(w / sum(weights) for w in weights)
        means = [b.plan.positions / len(b.plan) for b in builders]
        self.mixture = Mixture.of(self.weights, means)

    @classmethod
    def open(cls, config: ConfigDict, split: str = store.TRAIN) -> "Stream":
        """Opens the plans, which must have been made (plan.ensure_plans)."""
        names = config.data.sources
        augment = {"crop_scale": tuple(config.image.crop_scale), "flip": config.image.flip}
        return cls(
            names,
            [_builder(config, k, split) for k in range(len(names))],
            config.data.weights,
            config.seed,
            augment if config.image.augment else None,
        )

    @staticmethod
    def held_out(config: ConfigDict, source: str) -> "HeldOut":
        """The held-out rows of one source."""
        if source not in config.data.sources:
            raise ValueError(f"no source {source!r} in data.sources = {tuple(config.data.sources)!r}")
        return HeldOut(_builder(config, config.data.sources.index(source), store.HELD_OUT))

    @property
    def row_shares(self) -> tuple[float, ...]:
        """Share of the rows that each source has; `weights` are its shares of real positions."""
        return tuple(rate / PERIOD for rate in self.mixture.rates)

    @property
    def fingerprints(self) -> dict[str, str]:
        """What the rows depend on, by name: tells what changed when `fingerprint` did."""
        plans = {f"plan of {name}": b.plan.fingerprint for name, b in zip(self.names, self.builders, strict=True)}
        return plans | {
            "weights": repr(self.weights),
            "seed": str(self.seed),
            "tokenizer": self.tokenizer.fingerprint,
            "geometry": repr(self.geometry),
            "augmentation": repr(self.augment),
        }

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(sorted(self.fingerprints.items())).encode()).hexdigest()[:16]

    @property
    def bad_images(self) -> int:
        """Images, of the rows built in this process, that could not be decoded."""
        return sum(b.bad_images for b in self.builders)

    def locate(self, g: int) -> Location:
        """Where row g comes from; takes no longer for a large g."""
        g = int(g)  # hashes below are of Python's numbers
        source, rank = self.mixture.locate(g)
        rows = len(self.builders[source].plan)
        epoch, place = divmod(rank, rows)
        seed = int.from_bytes(self._hash(4, "epoch", source, epoch), "little")
        row = grain.experimental.index_shuffle(place, max_index=rows - 1, seed=seed, rounds=4)
        return Location(source, rank, epoch, row)

    def images(self, g: int) -> int:
        """Filled image slots of row g, known from its plan."""
        at = self.locate(g)
        return int(self.builders[at.source].plan[at.row]["images"].sum())

    def records(self, g: int) -> list[str]:
        """Ids of the documents that row g was made of, in their order in the row."""
        at = self.locate(g)
        builder = self.builders[at.source]
        return [builder.dataset[int(fragment["document"])].id for fragment in builder.plan[at.row]]

    def batch(self, rows: Sequence[int]) -> Batch:
        """These rows of the stream, built."""
        out = allocate(len(rows), self.geometry, self.tokenizer.pad)
        for b, g in enumerate(rows):
            at = self.locate(g)
            to_pixels = None if self.augment is None else functools.partial(self._augmented, at)
            self.builders[at.source].build(at.row, out, b, to_pixels)
        return out

    def _augmented(self, at: Location, data: bytes, slot: int) -> np.ndarray:
        digest = self._hash(8 * images.UNIFORMS, "augmentation", at.source, at.rank, slot)
        uniforms = (np.frombuffer(digest, "<u8") >> np.uint64(11)) * 2.0**-53
        return images.to_train(data, self.geometry.size, uniforms, **(self.augment or {}))

    def _hash(self, size: int, use: str, source: int, *numbers: int) -> bytes:
        """Random bytes that depend on the name of a source, not on how many others there are."""
        return hashlib.shake_128(repr((self.seed, use, self.names[source], *numbers)).encode()).digest(size)


class HeldOut:
    """Rows to evaluate on: in the order of the plan, images only resized."""

    def __init__(self, builder: RowBuilder):
        self._builder = builder

    def __len__(self) -> int:
        return len(self._builder.plan)

    def batch(self, indices: Sequence[int], rows: int = 0) -> Batch:
        """These rows, and empty ones (without loss) after them until there are `rows`."""
        out = allocate(max(rows, len(indices)), self._builder.geometry, self._builder.tokenizer.pad)
        for b, row in enumerate(indices):
            self._builder.build(row, out, b)
        return out


def _builder(config: ConfigDict, k: int, split: str) -> RowBuilder:
    source = config.data.sources[k]
    dataset = store.Dataset.open(pathlib.Path(config.data.root) / source, split)
    encoder = tokenizer.load(config.data.tokenizer, config.data.root)
    plan = Plan.open(plan_folder(config, source, dataset, encoder))
    return RowBuilder(dataset, plan, encoder, Geometry.from_config(config), k)
