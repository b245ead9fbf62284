"""The same bytes whoever builds them: any number of workers, of either kind, and of real processes."""

import contextlib
import hashlib
import subprocess
import sys

import numpy as np
import pytest
import small_corpus

from configs import loading
from data_pipelines import loader, plan
from data_pipelines.document import Document
from data_pipelines.store import DatasetWriter
from data_pipelines.stream import Stream

BATCH_ROWS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    small_corpus.write(root)
    config = small_corpus.config_for(root)
    config.image.augment = True
    plan.ensure_plans(config, progress=False)
    return config


def digest(batch) -> str:
    hashed = hashlib.sha256()
    for name in sorted(batch):
        hashed.update(np.ascontiguousarray(batch[name]).tobytes())
    return hashed.hexdigest()


@pytest.fixture(scope="module")
def expected(config):
    stream = Stream.open(config)
    return [digest(stream.batch(range(t * BATCH_ROWS, (t + 1) * BATCH_ROWS))) for t in range(50)]


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("start", [0, 17])
def test_threads(config, expected, workers, start):
    with contextlib.closing(
        loader.batches(Stream.open(config), range(BATCH_ROWS), BATCH_ROWS, start, workers, "threads", prefetch=3)
    ) as batches:
        assert [digest(next(batches)) for _ in range(start, 50)] == expected[start:]


@pytest.mark.parametrize(("workers", "start"), [(1, 0), (4, 17)])
def test_worker_processes(config, expected, workers, start):
    with contextlib.closing(
        loader.batches(Stream.open(config), range(BATCH_ROWS), BATCH_ROWS, start, workers, "processes", prefetch=3)
    ) as batches:
        assert [digest(next(batches)) for _ in range(start, 50)] == expected[start:]


# What each process of a run does: read the config, build its own rows, without hearing of the others.
PROCESS = """
import pathlib, sys
import numpy as np
from configs import loading
from data_pipelines import loader
from data_pipelines.stream import Stream
rank, count, rows, config, output = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
stream = Stream.open(loading.from_json(pathlib.Path(config).read_text()))
own = range(rank * rows // count, (rank + 1) * rows // count)
batches = loader.batches(stream, own, rows, 0, workers=1)
built = [next(batches) for _ in range(50)]
batches.close()
np.savez(output, **{name: np.stack([batch[name] for batch in built]) for name in built[0]})
"""


@pytest.mark.parametrize("count", [1, 2, 4])
def test_real_processes_build_their_own_rows(config, expected, tmp_path, count):
    (tmp_path / "config.json").write_text(loading.to_json(config))
    outputs = [tmp_path / f"{rank}.npz" for rank in range(count)]
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, *map(str, (rank, count, BATCH_ROWS)),
                          str(tmp_path / "config.json"), str(outputs[rank])], cwd=plan.__file__.rsplit("/", 2)[0])
        for rank in range(count)
    ]  # fmt: skip
    assert [process.wait(120) for process in processes] == [0] * count
    parts = [np.load(output, allow_pickle=False) for output in outputs]
    whole = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
    assert [digest({name: array[t] for name, array in whole.items()}) for t in range(50)] == expected


def test_rows_that_a_device_mesh_asks_for(config):
    stream = Stream.open(config)
    rows = [1, 4, 6]  # sorted, and not next to one another
    with contextlib.closing(loader.batches(stream, rows, BATCH_ROWS, start_step=2)) as batches:
        part = next(batches)
    whole = stream.batch(range(2 * BATCH_ROWS, 3 * BATCH_ROWS))
    assert digest(part) == digest({name: array[rows] for name, array in whole.items()})
    with pytest.raises(ValueError, match="batch_rows"):
        loader.batches(stream, [8], BATCH_ROWS)
    with pytest.raises(ValueError, match="expected threads or processes"):
        loader.batches(stream, [0], BATCH_ROWS, workers=1, kind="fibres")


def test_balanced_batches_are_the_same_rows_in_another_order(config):
    stream = Stream.open(config)
    plain = loader.LocalBatches(stream, range(BATCH_ROWS), BATCH_ROWS)[3]
    whole = loader.LocalBatches(stream, range(BATCH_ROWS), BATCH_ROWS, balanced_over=1)[3]
    parts = [
        loader.LocalBatches(stream, places, BATCH_ROWS, balanced_over=1)[3] for places in ([0, 1, 2, 3], [4, 5, 6, 7])
    ]
    for name in plain:
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])
    keys = [[row.tobytes() for row in batch["tokens"]] for batch in (plain, whole)]
    assert keys[0] != keys[1] and sorted(keys[0]) == sorted(keys[1])
    for b, images in enumerate(plain["image_mask"].sum(1)):
        assert stream.images(3 * BATCH_ROWS + b) == images


@pytest.mark.parametrize(("workers", "kind"), [(0, "threads"), (2, "threads"), (1, "processes")])
def test_errors_of_workers_arrive(tmp_path, workers, kind):
    """A dataset whose file is replaced behind the plan's back: the message of the builder reaches the caller."""
    config = small_corpus.config_for(tmp_path)
    config.data.sources, config.data.weights = ("text",), (1.0,)
    with DatasetWriter(tmp_path / "text", "text") as writer:
        writer.add(Document("0", "text", ("a longer text",)))
    plan.ensure_plans(config, progress=False)
    stream = Stream.open(config)
    with DatasetWriter(tmp_path / "text", "text", overwrite=True) as writer:
        writer.add(Document("0", "text", ("a",)))
    with contextlib.closing(loader.batches(stream, range(2), 2, workers=workers, kind=kind)) as batches:
        with pytest.raises(ValueError, match="is not what plan .* was made of"):
            next(batches)
