"""The row plan of a source: which fragments of which documents make up each of its rows.

    data.root/plans/captions-train-1f0c…/
      fragments.npy    FRAGMENT[fragments]: rows one after another
      rows.npy         int64[rows + 1]: row i is fragments[rows[i] : rows[i + 1]]
      plan.json        what the plan was made of, and its report

Windows of `data.window` documents are packed apart, so they can be made in parallel; each finished one is a file, so a
run that was killed goes on where it stopped. Whatever the plan depends on is hashed into its folder's name: another
tokenizer, or another row length, is another plan.

data.plans may be in a bucket (gs://, s3://). A plan is made on the disk of the machine that makes it and uploaded,
plan.json last; it is read from a copy on each machine's disk, in $XDG_CACHE_HOME/nmm_jax/plans (~/.cache unless set).

    python -m data_pipelines.plan --config=configs/small.py --config.data.root=data
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
from collections.abc import Iterable, Sequence

import numpy as np
import tqdm
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from configs import command_line, loading
from data_pipelines import paths, pieces, store, tokenizer
from data_pipelines.geometry import Geometry
from data_pipelines.locking import locked
from data_pipelines.packing import cut, pack

FORMAT_VERSION = 1
FILES = ("fragments.npy", "rows.npy", "plan.json")  # a folder that has the last one has all
_BLOCK = 16 << 20  # bytes copied at a time

# A run of positions [start, stop) of a document. `piece` holds position `start` and itself begins at `origin`.
FRAGMENT = np.dtype(
    [("document", "<i8"), ("start", "<i4"), ("stop", "<i4"), ("piece", "<i4"), ("origin", "<i4"), ("images", "<i4")]
)


class Plan:
    """The rows of a source: `plan[i]` is the array of FRAGMENT that makes up row i."""

    def __init__(self, folder: pathlib.Path):
        """folder: on disk, as the arrays are mapped into memory."""
        self.folder = folder
        self._description = json.loads((folder / "plan.json").read_text())
        self.report: dict = self._description["report"]
        self.fingerprint: str = self._description["fingerprint"]
        self.positions: int = self.report["positions"]  # real ones, without padding
        self.images: int = self.report["images"]
        self.fill: float = self.report["fill"]
        self._rows = np.load(folder / "rows.npy", mmap_mode="r", allow_pickle=False)
        self._fragments = np.load(folder / "fragments.npy", mmap_mode="r", allow_pickle=False)

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "Plan":
        """Opens the plan that is there; one in a bucket is copied to this machine first.

        Raises:
          FileNotFoundError: there is none.
          BucketError: the bucket cannot be reached.
        """
        if paths.is_remote(folder):
            cached = _cached(folder)
            with locked(_lock(cached)):
                if not (cached / "plan.json").exists():
                    _download(paths.reach(folder), cached)
            return cls(cached)
        folder = pathlib.Path(folder).absolute()
        if not (folder / "plan.json").exists():
            raise _no_plan(folder)
        return cls(folder)

    def __reduce__(self):  # worker processes open the files themselves
        return Plan.open, (self.folder,)

    def __len__(self) -> int:
        return len(self._rows) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of plan {self.folder}, which has {len(self)}")
        return self._fragments[self._rows[row] : self._rows[row + 1]]


def key(dataset: store.Dataset, encoder: tokenizer.Tokenizer, geometry: Geometry, window: int) -> dict:
    """Everything that a plan depends on."""
    return {
        "format_version": FORMAT_VERSION,
        "longest_piece": pieces.LONGEST_PIECE,
        "dataset": dataset.fingerprint,
        "tokenizer": encoder.fingerprint,
        "window": window,
    } | geometry.packing_key()


def fingerprint(made_of: dict) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def make_plan(
    dataset: store.Dataset,
    encoder: tokenizer.Tokenizer,
    geometry: Geometry,
    folder: str | os.PathLike,
    window: int,
    workers: int = 0,
    progress: bool = False,
) -> Plan:
    """Packs a dataset into rows, or opens the plan that is there already. Its content depends on no worker count.

    Several processes may ask for the same plan: one makes it, the others wait. On different machines, for a folder in a
    bucket, each would make and upload the same files.

    Raises:
      ValueError: for an image in a document when rows have no image slots; names the document. For a dataset without a
        single pair, when rows are pairs.
    """
    if paths.is_remote(folder):
        remote = paths.reach(folder)
        if not (remote / "plan.json").exists():
            _upload(make_plan(dataset, encoder, geometry, _cached(folder), window, workers, progress), remote)
        return Plan.open(folder)
    folder = pathlib.Path(folder).absolute()
    with locked(_lock(folder)):
        if not (folder / "plan.json").exists():
            partial = folder.with_name(folder.name + ".incomplete")
            partial.mkdir(parents=True, exist_ok=True)
            files = _pack_windows(dataset, encoder, geometry, partial, window, workers, progress)
            counts = _join(files, partial, geometry)
            if geometry.pairs and not counts["rows"]:
                raise ValueError(
                    f"source {dataset.source!r} has no pairs: none of the {len(dataset)} documents of "
                    f"{dataset.folder}, split {dataset.split!r}, has exactly one image and some text (data.rows = "
                    "'pairs'); leave it out of data.sources"
                )
            report = _report(len(dataset), counts, geometry)
            made_of = key(dataset, encoder, geometry, window)
            description = {"fingerprint": fingerprint(made_of), "made_of": made_of, "report": report}
            (partial / "plan.json").write_text(json.dumps(description, indent=2) + "\n")
            shutil.rmtree(folder, ignore_errors=True)  # a folder without plan.json is no plan
            os.rename(partial, folder)
            shutil.rmtree(folder / "windows")
    return Plan.open(folder)


def _no_plan(folder: os.PathLike) -> FileNotFoundError:
    return FileNotFoundError(
        f"there is no row plan in {folder}; make it with python -m data_pipelines.plan --config=… "
        "(the same config: the folder's name depends on the dataset, the tokenizer and the shape of rows). Of several "
        "machines one makes it: data.plans must then be a folder that all of them see, or in a bucket"
    )


def _cached(folder: str | os.PathLike) -> pathlib.Path:
    """Where the copy of a plan in a bucket is; its name has the fingerprint, so what is there is never out of date."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache, "nmm_jax", "plans", epath.Path(folder).name).absolute()


def _lock(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(folder.name + ".lock")


def _download(remote: epath.Path, folder: pathlib.Path) -> None:
    if not (remote / "plan.json").exists():
        raise _no_plan(remote)
    partial = folder.with_name(folder.name + ".copy")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in FILES:
        with (remote / name).open("rb") as source, open(partial / name, "wb") as target:
            shutil.copyfileobj(source, target, _BLOCK)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)


def _upload(plan: Plan, remote: epath.Path) -> None:
    with paths.reaching(remote):
        for name in FILES:
            with open(plan.folder / name, "rb") as source, (remote / name).open("wb") as target:
                shutil.copyfileobj(source, target, _BLOCK)


def _pack_windows(dataset, encoder, geometry, partial, window, workers, progress) -> list[pathlib.Path]:
    """Packs the windows that are not there yet; returns the files of all of them, in order."""
    (partial / "windows").mkdir(exist_ok=True)
    count = -(-len(dataset) // window)
    files = [partial / "windows" / f"{w:08d}.npz" for w in range(count)]
    missing = [w for w in range(count) if not files[w].exists()]
    work = _Window(dataset, encoder, geometry, window)
    workers = min(workers, len(missing))
    title = f"planning {dataset.source} {dataset.split}"
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm.tqdm(total=len(dataset), desc=title, unit=" documents", unit_scale=True, disable=not progress)
        )
        bar.update(sum(work.documents(w) for w in set(range(count)).difference(missing)))
        done: Iterable[int]
        if workers > 1:
            pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
            stack.callback(pool.shutdown, cancel_futures=True)
            futures = [pool.submit(work.write, w, files[w]) for w in missing]
            done = (future.result() for future in concurrent.futures.as_completed(futures))
        else:
            done = (work.write(w, files[w]) for w in missing)
        for w in done:
            bar.update(work.documents(w))
    return files


@dataclasses.dataclass(frozen=True)
class _Window:
    """Packs one window at a time; sent to worker processes."""

    dataset: store.Dataset
    encoder: tokenizer.Tokenizer
    geometry: Geometry
    size: int

    def documents(self, window: int) -> int:
        return min(self.size, len(self.dataset) - window * self.size)

    def write(self, window: int, file: pathlib.Path) -> int:
        begin = window * self.size
        fragments = self.fragments(range(begin, begin + self.documents(window)))
        rows, leftover = [], fragments[:0]
        for row in pack_fragments(fragments, self.geometry):
            if self._is_sparse(row):
                leftover = row
            else:
                rows.append(row)
        part = file.with_suffix(".part")
        with open(part, "wb") as f:
            np.savez(
                f,
                fragments=np.concatenate([fragments[:0], *rows]),
                lengths=np.array([len(row) for row in rows], np.int64),
                leftover=leftover,
            )
        os.replace(part, file)
        return window

    def _is_sparse(self, row: np.ndarray) -> bool:
        """At most half full in both budgets. A window has one such row at most (packing.pack); the fragments of all of
        them are packed together in the end, as the last rows of the plan."""
        positions, images = (row["stop"] - row["start"]).sum(), row["images"].sum()
        return 2 * positions <= self.geometry.row_length and 2 * images <= self.geometry.per_row

    def fragments(self, documents: Iterable[int]) -> np.ndarray:
        """FRAGMENT[n] of these documents, in their order."""
        return self._pairs(documents) if self.geometry.pairs else self._cuts(documents)

    def _pairs(self, documents: Iterable[int]) -> np.ndarray:
        """One fragment for each that is a pair. As each takes its row's only image slot, each gets a row."""
        found = []
        for d in documents:
            pair = pieces.of_pair(self.dataset[d])
            if pair:
                tokens = pieces.pair_tokens(pair[1], self.encoder, self.geometry.row_length)
                found.append((d, 0, len(tokens), 0, 0, 1))
        return np.array(found, FRAGMENT)

    def _cuts(self, documents: Iterable[int]) -> np.ndarray:
        found = []
        for d in documents:
            document = self.dataset[d]
            parts = pieces.of_document(document, self.geometry.caption_order)
            lengths = [pieces.length(piece, self.encoder, self.geometry.image_span) for piece in parts]
            is_image = [isinstance(piece, bytes) for piece in parts]
            try:
                for c in cut(lengths, is_image, self.geometry.row_length, self.geometry.per_row):
                    found.append((d, c.start, c.stop, c.piece, c.origin, c.images))
            except ValueError as e:
                raise ValueError(
                    f"dataset {self.dataset.folder} split {self.dataset.split!r}, document {d} ({document.id!r}): {e}"
                ) from e
        return np.array(found, FRAGMENT)


def pack_fragments(fragments: np.ndarray, geometry: Geometry) -> list[np.ndarray]:
    """Rows of fragments; FRAGMENT[n] -> one FRAGMENT[k] a row."""
    positions = (fragments["stop"] - fragments["start"]).tolist()
    rows = pack(positions, fragments["images"].tolist(), geometry.row_length, geometry.per_row)
    return [fragments[row] for row in rows]


def _join(files: Sequence[pathlib.Path], folder: pathlib.Path, geometry: Geometry) -> dict:
    """Writes fragments.npy and rows.npy from the windows; returns the counts of the report."""
    lengths, leftover = [], []
    for file in files:
        with np.load(file, allow_pickle=False) as window:
            lengths.append(window["lengths"])
            leftover.append(window["leftover"])
    last = pack_fragments(np.concatenate(leftover), geometry)
    lengths.append(np.array([len(row) for row in last], np.int64))
    rows = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))])
    np.save(folder / "rows.npy", rows)
    out = np.lib.format.open_memmap(folder / "fragments.npy", mode="w+", dtype=FRAGMENT, shape=(int(rows[-1]),))
    at = 0
    for file in files:
        with np.load(file, allow_pickle=False) as window:
            fragments = window["fragments"]
        out[at : at + len(fragments)] = fragments
        at += len(fragments)
    if last:
        out[at:] = np.concatenate(last)
    out.flush()
    return {
        "rows": len(rows) - 1,
        "fragments": len(out),
        "cuts": int(np.count_nonzero(out["start"])),
        "positions": int((out["stop"] - out["start"]).sum(dtype=np.int64)),
        "images": int(out["images"].sum(dtype=np.int64)),
    }


def _report(documents: int, counts: dict, geometry: Geometry) -> dict:
    """Counts and what follows from them."""
    rows, images, slots = counts["rows"], counts["images"], counts["rows"] * geometry.per_row
    used = counts["fragments"] if geometry.pairs else documents
    derived = {
        "text_tokens": counts["positions"] - images * geometry.image_span - 2 * used,
        "fill": counts["positions"] / (rows * geometry.row_length),  # real positions of all positions
        "images_per_row": images / rows,
        "slot_fill": images / slots if slots else 0.0,
    }
    return {"documents": documents} | counts | derived | ({"left_out": documents - used} if geometry.pairs else {})


def plan_folder(config: ConfigDict, source: str, dataset: store.Dataset, encoder: tokenizer.Tokenizer) -> epath.Path:
    """Where the plan of a source lies, or will."""
    root = epath.Path(config.data.plans or epath.Path(config.data.root) / "plans")
    made_of = key(dataset, encoder, Geometry.from_config(config), config.data.window)
    return root / f"{pathlib.Path(source).name}-{dataset.split}-{fingerprint(made_of)}"


def ensure_plans(
    config: ConfigDict, split: str = store.TRAIN, workers: int | None = None, progress: bool = True
) -> dict[str, Plan]:
    """The plans of all sources, made now where they are missing; by `data.workers` processes unless told otherwise."""
    encoder = tokenizer.load(config.data.tokenizer, config.data.root)
    make = functools.partial(
        make_plan,
        encoder=encoder,
        geometry=Geometry.from_config(config),
        window=config.data.window,
        workers=config.data.workers if workers is None else workers,
        progress=progress,
    )
    plans = {}
    for source in config.data.sources:
        dataset = store.Dataset.open(pathlib.Path(config.data.root) / source, split)
        plans[source] = make(dataset, folder=plan_folder(config, source, dataset, encoder))
    return plans


def table(plans: dict[str, Plan]) -> str:
    """The reports of plans, a line each."""
    lines = [f"{'source':<14}{'documents':>11}{'cuts':>8}{'rows':>10}{'fill':>8}{'images/row':>12}{'slot fill':>11}"]
    for source, plan in plans.items():
        r = plan.report
        lines.append(
            f"{source:<14}{r['documents']:>11,}{r['cuts']:>8,}{r['rows']:>10,}{r['fill']:>8.1%}"
            f"{r['images_per_row']:>12.2f}{r['slot_fill']:>11.1%}"
        )
    left_out = {source: plan.report.get("left_out") for source, plan in plans.items()}
    lines += [f"{source}: {n:,} documents are no pairs and were left out" for source, n in left_out.items() if n]
    return "\n".join(lines)


if __name__ == "__main__":
    _CONFIG = loading.define_config_flag()
    _SPLIT = flags.DEFINE_string("split", store.TRAIN, "which split of the datasets")
    _WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "processes that measure and pack")

    def main(_):
        print(table(ensure_plans(_CONFIG.value, _SPLIT.value, _WORKERS.value)))

    command_line.run(main)
