"""Runs, checkpoints, row plans and datasets in buckets, against servers of both protocols on this machine."""

import concurrent.futures
import importlib.util
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import loading
from data_pipelines import paths, plan, stage, store, tokenizer
from data_pipelines.locking import locked
from nmm_jax import sweep
from nmm_jax.interop.import_weights import import_weights
from nmm_jax.training import metrics, orbax_on_s3, spool, start
from nmm_jax.training.checkpoints import CheckpointError, Checkpoints, open_run
from tests import object_stores, tiny, training_runs
from tests.data_pipelines import small_corpus
from tests.fake_gcs import FakeGcs
from tests.interop.fake_folders import LLAMA, make_folder

ROOT = pathlib.Path(__file__).parent.parent


needs_libraries = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gcsfs", "s3fs", "moto", "flask", "flask_cors"))),
    reason="needs pip install 'nmm_jax[cloud,dev]'",
)


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=needs_libraries) for kind in object_stores.KINDS])
def bucket(request):
    with object_stores.KINDS[request.param]() as there, pytest.MonkeyPatch.context() as patch:
        for name, value in there.environment.items():
            patch.setenv(name, value)
        yield there


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    small_corpus.write(root)
    return root


@pytest.fixture(autouse=True)
def a_new_machine(tmp_path, monkeypatch):
    """Nothing is left in its caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# Checkpoints


def state(step=0):
    params = {"w": jnp.arange(6.0).reshape(2, 3) + step, "b": jnp.full(3, 0.1)}
    return {"step": jnp.asarray(step, jnp.int32), "params": params, "opt_state": (jnp.zeros((), jnp.int32), params)}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save(workdir, *steps, **rules):
    checkpoints = Checkpoints(workdir, **rules)
    for step in steps:
        checkpoints.save(step, state(step), {"seen": {"images": step}})
    checkpoints.close()


def test_what_is_saved_comes_back_and_the_rest_is_removed(bucket):
    workdir = f"{bucket.url}/saved"
    save(workdir, 5, 10, 15, keep=2)
    there = Checkpoints(workdir, read_only=True)
    assert there.steps() == [10, 15]
    restored, meta = there.restore(None, abstract(state()))
    jax.tree.map(np.testing.assert_array_equal, restored, state(15))
    assert meta == {"step": 15, "seen": {"images": 15}}
    some = there.restore_some(10, {"w": abstract(state()["params"]["w"])})
    np.testing.assert_array_equal(some["w"], state(10)["params"]["w"])
    assert {name.split("/")[0] for name in bucket.names("saved/checkpoints")} == {"10", "15"}


def test_a_save_that_was_killed_is_no_checkpoint_and_is_removed(bucket):
    workdir = f"{bucket.url}/killed"
    save(workdir, 5, 10, keep=2)
    bucket.remove("killed/checkpoints/10/commit_success.txt")
    before = bucket.names("killed")
    assert Checkpoints(workdir, read_only=True).steps() == [5]
    assert bucket.names("killed") == before
    assert Checkpoints(workdir).steps() == [5]
    assert {name.split("/")[0] for name in bucket.names("killed/checkpoints")} == {"5"}
    save(workdir, 10, keep=2)
    assert Checkpoints(workdir).steps() == [5, 10]


def test_no_run(bucket):
    with pytest.raises(CheckpointError, match=f"{bucket.url}/nothing is no run: it has no folder `checkpoints`"):
        Checkpoints(f"{bucket.url}/nothing", read_only=True)


def test_another_orbax_may_have_moved_what_is_replaced(monkeypatch):
    monkeypatch.delattr("orbax.checkpoint._src.serialization.tensorstore_utils.build_kvstore_tspec")
    with pytest.raises(RuntimeError, match="cannot be taught s3:// as 0.12.8 can .*requirements.txt"):
        orbax_on_s3.teach.__wrapped__()


# Files that grow


def lines_of(bucket, workdir):
    return [json.loads(line) for line in bucket.read(f"{workdir}/metrics.jsonl").splitlines()]


def logging(tensorboard):
    config = tiny.get_config()
    config.log.tensorboard = tensorboard
    return config


def test_lines_are_there_after_an_upload_and_trimmed_on_the_next_machine(bucket):
    workdir = epath.Path(bucket.url) / "grows"
    killed = metrics.Writer(workdir, 0, logging(tensorboard=True))
    for step in (1, 2, 3):
        killed.write({"step": step, "loss": 1.0})
    assert lines_of(bucket, "grows") == []
    killed.upload()
    killed.write({"step": 4, "loss": 1.0})  # and then it was killed
    killed._spool._closed.set()
    assert [line["step"] for line in lines_of(bucket, "grows")] == [1, 2, 3]

    writer = metrics.Writer(workdir, 2, logging(tensorboard=False))
    assert [line["step"] for line in lines_of(bucket, "grows")] == [1, 2]
    writer.write({"step": 3, "again": True})
    writer.close()
    assert lines_of(bucket, "grows")[2:] == [{"step": 3, "again": True}]
    events = [name for name in bucket.names("grows") if "tfevents" in name]
    assert len(events) == 1 and len(bucket.read(f"grows/{events[0]}")) > 100
    assert not list(pathlib.Path(writer._spool.folder).parent.glob(writer._spool.folder.name))


def test_who_watches_sees_it_grow(bucket, monkeypatch):
    monkeypatch.setattr(spool, "EVERY", 0.05)
    watched = spool.Spool(epath.Path(bucket.url) / "watched")
    with watched.file("log.txt").open("a") as log:
        watched.upload()
        log.write("one line\n")
        log.flush()
        until = time.monotonic() + 20
        while bucket.read("watched/log.txt") != b"one line\n":
            assert time.monotonic() < until
            time.sleep(0.02)
    watched.close()


def test_an_upload_that_fails_in_the_background_is_told_and_tried_again(bucket, monkeypatch, capsys):
    monkeypatch.setattr(spool, "EVERY", 0.05)
    monkeypatch.setattr(spool, "SHARE", 100.0)
    lost = spool.Spool(epath.Path(bucket.url.replace("bucket", "no-such-bucket")) / "run")
    (lost.folder / "log.txt").write_text("x")
    with pytest.raises(paths.BucketError, match="there is no bucket"):
        lost.upload()
    lost.target = epath.Path(bucket.url) / "found"
    lost.upload()
    lost.target = epath.Path(bucket.url.replace("bucket", "no-such-bucket")) / "run"
    (lost.folder / "log.txt").write_text("xy")
    until = time.monotonic() + 20
    while "trying again" not in capsys.readouterr().err:
        assert time.monotonic() < until
        time.sleep(0.02)
    lost.target = epath.Path(bucket.url) / "found"
    lost.close()
    assert bucket.read("found/log.txt") == b"xy"


# Row plans


def config_for(corpus, plans):
    config = small_corpus.config_for(corpus)
    config.data.plans = str(plans)
    return config


def arrays(plans):
    return {source: [plan_[i].tolist() for i in range(len(plan_))] for source, plan_ in plans.items()}


def test_plans_are_made_once_and_read_everywhere(bucket, corpus, tmp_path, monkeypatch):
    expected = arrays(plan.ensure_plans(config_for(corpus, tmp_path / "plans"), workers=0, progress=False))
    config = config_for(corpus, f"{bucket.url}/plans")
    assert arrays(plan.ensure_plans(config, workers=0, progress=False)) == expected
    made = bucket.names("plans")
    assert len(made) == 9 and {name.split("/")[1] for name in made} == set(plan.FILES)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    monkeypatch.setattr(plan, "_pack_windows", None)  # none is made again
    assert arrays(plan.ensure_plans(config, workers=0, progress=False)) == expected
    assert all(p.folder.is_relative_to(tmp_path / "another machine") for p in plan.ensure_plans(config).values())


def test_a_plan_whose_upload_was_killed_is_none(bucket, corpus, tmp_path, monkeypatch):
    config = config_for(corpus, f"{bucket.url}/cut")
    plans = plan.ensure_plans(config, workers=0, progress=False)
    name = plans["text"].folder.name
    bucket.remove(f"cut/{name}/plan.json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    with pytest.raises(FileNotFoundError, match=f"there is no row plan in {bucket.url}/cut/{name}.*all of them see"):
        plan.Plan.open(f"{bucket.url}/cut/{name}")
    plan.ensure_plans(config, workers=0, progress=False)
    assert f"{name}/plan.json" in bucket.names("cut")


# Datasets


@pytest.fixture(scope="module")
def data_in_bucket(bucket, corpus):
    for file in corpus.rglob("*"):
        if file.is_file():
            (epath.Path(bucket.url) / "data" / file.relative_to(corpus).as_posix()).write_bytes(file.read_bytes())
    (epath.Path(bucket.url) / "data" / "tokenizer.json").write_text("{}")
    return f"{bucket.url}/data"


def test_staged_data_is_the_data(data_in_bucket, corpus, tmp_path):
    assert "10 files" not in stage.stage(data_in_bucket, tmp_path)
    for source in small_corpus.SOURCES:
        assert store.Dataset.open(tmp_path / source).fingerprint == store.Dataset.open(corpus / source).fingerprint
    assert (tmp_path / "tokenizer.json").read_text() == "{}" and not list(tmp_path.rglob("*.partial"))


def test_staging_goes_on_where_it_was_stopped(data_in_bucket, tmp_path):
    stage.stage(data_in_bucket, tmp_path)
    assert "0 were copied" in stage.stage(data_in_bucket, tmp_path)
    shard = next((tmp_path / "text").glob("*.array_record"))
    shard.rename(f"{shard}.partial")
    os.truncate(f"{shard}.partial", 10)
    (tmp_path / "tokenizer.json").unlink()
    assert "3 were copied" in stage.stage(data_in_bucket, tmp_path)  # and the card of the dataset
    assert len(store.Dataset.open(tmp_path / "text")) == 50


def test_each_process_of_a_machine_may_stage(data_in_bucket, tmp_path):
    with concurrent.futures.ThreadPoolExecutor() as pool:  # a lock is held by who opened its file, threads as well
        with locked(tmp_path / stage.LOCK):
            three = [pool.submit(stage.stage, data_in_bucket, tmp_path) for _ in range(3)]
            time.sleep(0.5)
            assert [path.name for path in tmp_path.iterdir()] == [stage.LOCK]
        said = sorted(one.result().partition(" of which ")[2] for one in three)
    assert said[0] == said[1] == "0 were copied" != said[2]


def test_only_some(data_in_bucket, tmp_path):
    stage.stage(data_in_bucket, tmp_path, only=["captions", "tokenizer.json"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [stage.LOCK, "captions", "tokenizer.json"]
    with pytest.raises(FileNotFoundError, match="--only: there is no 'captoins' in .*captions, interleaved"):
        stage.stage(data_in_bucket, tmp_path, only=["captoins"])


def test_damage_in_the_bucket_is_found(bucket, corpus, tmp_path):
    there = epath.Path(bucket.url) / "damaged" / "text"
    for file in (corpus / "text").iterdir():
        (there / file.name).write_bytes(file.read_bytes())
    card = json.loads((there / store.CARD).read_text())
    shard = card["splits"]["train"]["shards"][0]
    name, card_is = shard["file"], f"{shard['file_bytes']:,}"

    (there / name).write_bytes(bytes(shard["file_bytes"]))
    with pytest.raises(stage.StageError, match=f"{name}: its records are not those of the dataset's card .digest none"):
        stage.stage(str(there.parent), tmp_path)
    assert not (tmp_path / "text" / name).exists() and not (tmp_path / "text" / store.CARD).exists()
    (there / name).write_bytes(b"short")
    with pytest.raises(stage.StageError, match=f"{name} has 5 bytes, its card says {card_is} bytes.*is not whole"):
        stage.stage(str(there.parent), tmp_path)
    bucket.remove(f"damaged/text/{name}")
    with pytest.raises(stage.StageError, match=f"{name} is missing, its card says {card_is}"):
        stage.stage(str(there.parent), tmp_path)

    (there / name).write_bytes((corpus / "text" / name).read_bytes())
    shard["digest"] = "0" * 32
    (there / store.CARD).write_text(json.dumps(card))
    with pytest.raises(stage.StageError, match="digest [0-9a-f]{32}, expected 0{32}"):
        stage.stage(str(there.parent), tmp_path)


def test_nothing_to_stage(bucket, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is nothing in"):
        stage.stage(f"{bucket.url}/nowhere", tmp_path)
    with pytest.raises(paths.BucketError, match="there is no bucket"):
        stage.stage(f"{bucket.url}y/data", tmp_path)


@pytest.mark.parametrize("root", ["gs://bucket/data", "s3://bucket/data"])
def test_documents_are_not_read_from_a_bucket(root):
    words = rf"{root}.*python -m data_pipelines.stage --input={root}"
    with pytest.raises(loading.ConfigError, match=f"data.root = .{words}"):
        loading.load("tests/tiny.py", {"data.root": root})
    for use in (store.Dataset.open, store.read_card, store.DatasetFolder):
        with pytest.raises(ValueError, match=words):
            use(f"{root}/captions")


def test_a_tokenizer_may_be_in_a_bucket(bucket, tmp_path):
    name = f"{bucket.url}/words/tokenizer.json"
    tokenizer.train_words(["a red square"], name)
    tokenizer.train_words(["a red square"], tmp_path / "tokenizer.json")
    assert bucket.read("words/tokenizer.json") == (tmp_path / "tokenizer.json").read_bytes()
    assert tokenizer.load(name, "data").fingerprint == tokenizer.load(str(tmp_path / "tokenizer.json")).fingerprint
    with pytest.raises(FileNotFoundError, match=f"there is no tokenizer '{bucket.url}/other.json'"):
        tokenizer.load(f"{bucket.url}/other.json")


# Other runs


def test_imported_weights_become_a_run_in_a_bucket(bucket, tmp_path):
    make_folder(tmp_path / "theirs", LLAMA)
    tokenizer.train_words(["a b c"], tmp_path / "theirs" / "tokenizer.json")
    import_weights(tmp_path / "theirs", f"{bucket.url}/imported")
    run = open_run(f"{bucket.url}/imported")
    assert run.step == 0 and run.config.data.tokenizer == f"{bucket.url}/imported/tokenizer.json"
    assert tokenizer.load(run.config.data.tokenizer).decode([6]) == "<|unknown|>"
    import_weights(tmp_path / "theirs", tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, run.params, open_run(str(tmp_path / "run")).params)
    wanted = run.config.copy_and_resolve_references().unlock()
    wanted.start.decoder = f"{bucket.url}/imported@0"
    begun = start.load(wanted, run.model, run.mesh)
    jax.tree.map(np.testing.assert_array_equal, begun, {part: run.params[part] for part in begun})
    assert {"embed", "layers", "head"} <= begun.keys()


class OneCommand(sweep.Sweep):
    def commands(self, name):
        evaluation, run = {"step": 3, "notes": [], "held_out": {}}, str(self.folder / name)
        evaluate = f"from nmm_jax.evaluation import results; results.save({evaluation!r}, {run!r})"
        return [["python", "-c", f"{evaluate}; print({name!r}, 'trained')"]]


def test_a_sweep_in_a_bucket(bucket, tmp_path):
    (tmp_path / "of_two.py").write_text(
        "from configs import small\nRUNS = {'a': {}, 'b': {}}\nGROUPS = {'both': ('a', 'b')}\n"
        "def get_config(name):\n    return small.get_config()\n"
    )
    runs = OneCommand(str(tmp_path / "of_two.py"), f"{bucket.url}/sweep", steps=3)
    assert runs.run(["a", "b"]) == []
    assert bucket.read("sweep/b/log.txt") == b"b trained\n"
    assert set(runs.outcomes()) == {"a", "b"} and "### both" in runs.write()
    assert {"tables.md", "results.json", "a/evaluation/3.json"} <= set(bucket.names("sweep"))


# What goes wrong


def reached(path, environment, before=""):
    program = f"{before}\nfrom data_pipelines import paths\nprint(paths.reach({path!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment)
    return done.stderr.strip().split("\n")[-1] if done.returncode else done.stdout.strip()


def test_a_folder_may_come_later_and_a_bucket_not(bucket):
    assert paths.reach(f"{bucket.url}/later") == epath.Path(f"{bucket.url}/later")
    with pytest.raises(paths.BucketError, match=f"{bucket.url}y/run: there is no bucket {bucket.url}y; make it"):
        paths.reach(f"{bucket.url}y/run")
    with pytest.raises(paths.BucketError, match="names no bucket; expected ...//BUCKET/FOLDER"):
        paths.reach(bucket.url.removesuffix("bucket"))


@needs_libraries
def test_no_credentials_for_google():
    with FakeGcs("bucket", authorized=True) as server:
        environment = os.environ | server.environment | {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        said = reached("gs://bucket/run", environment)
    assert "gs://bucket/run cannot be reached" in said and "Anonymous caller" in said
    assert "gcloud auth application-default login" in said and "GOOGLE_APPLICATION_CREDENTIALS" in said


@needs_libraries
def test_no_credentials_for_amazon(tmp_path):
    with object_stores.s3() as there:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")} | {
            "AWS_ENDPOINT_URL": there.environment["AWS_ENDPOINT_URL"],
            "AWS_EC2_METADATA_DISABLED": "true",
            "HOME": str(tmp_path),
        }
        said = reached("s3://bucket/run", environment)
    assert "s3://bucket/run cannot be reached (NoCredentialsError" in said
    assert all(name in said for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"))


@pytest.mark.parametrize("scheme, library", [("gs", "gcsfs"), ("s3", "s3fs")])
def test_the_libraries_are_an_extra(scheme, library):
    said = reached(f"{scheme}://bucket/run", os.environ, f"import sys; sys.modules[{library!r}] = None")
    assert f"{scheme}://bucket/run needs gcsfs or s3fs" in said and "pip install 'nmm_jax[cloud]'" in said


# All together


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    training_runs.train(corpus, workdir)
    return workdir


def kill_when(bucket, running, condition):
    while not condition():
        assert running.poll() is None, "the run ended before it was to be stopped"
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.wait()


def saved(bucket, workdir, least):
    done = [n for n in bucket.names(f"{workdir}/checkpoints") if n.count("/") == 1 and n.endswith("commit_success.txt")]
    return any(int(name.split("/")[0]) >= least for name in done)


def saving(bucket, workdir):
    names = bucket.names(f"{workdir}/checkpoints")
    return any(f"{name.split('/')[0]}/commit_success.txt" not in names for name in names)


@pytest.mark.slow
def test_kill_9_and_on_another_machine_it_goes_on_to_the_bit(bucket, corpus, uninterrupted, tmp_path, monkeypatch):
    seed = random.randrange(1 << 30)
    print("seed", seed)  # shown by pytest when the test fails
    pause = random.Random(seed).uniform(0, 1)
    workdir = f"{bucket.url}/runs/a"
    again = training_runs.command(corpus, workdir, f"data.plans={bucket.url}/plans-of-a", "log.tensorboard=True")

    def another_machine(name):
        (tmp_path / name).mkdir()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name / "cache"))
        monkeypatch.setenv("TMPDIR", str(tmp_path / name))

    another_machine("first")
    kill_when(bucket, training_runs.start(*again), lambda: saving(bucket, "runs/a"))
    another_machine("second")
    running = training_runs.start(*again)
    kill_when(bucket, running, lambda: saved(bucket, "runs/a", 14) and not time.sleep(pause))
    # No checkpoint is ahead of the lines, at any moment.
    steps = Checkpoints(workdir, read_only=True).steps()
    assert [line["step"] for line in lines_of(bucket, "runs/a")][: steps[-1]] == list(range(1, steps[-1] + 1))
    another_machine("third")
    running = training_runs.start(*again)
    said = training_runs.finish(running)
    assert running.returncode == 0, said[-4000:]

    assert f"going on from {workdir}/checkpoints/" in said
    machine = ("time/", "speed/", "memory/")
    lines = [{k: v for k, v in line.items() if not k.startswith(machine)} for line in lines_of(bucket, "runs/a")]
    assert lines == training_runs.timeless(uninterrupted)
    assert not saving(bucket, "runs/a") and saved(bucket, "runs/a", 40)
    assert json.loads(bucket.read("runs/a/config.json"))["steps"] == 40
    assert [name for name in bucket.names("runs/a") if "tfevents" in name]

    both = [Checkpoints(w, read_only=True) for w in (workdir, str(uninterrupted))]
    params = [one.restore_some(40, one.abstract_params(40)) for one in both]
    jax.tree.map(np.testing.assert_array_equal, *params)


@pytest.mark.slow
def test_a_run_in_a_bucket_is_evaluated_and_reported_on(bucket, tmp_path):
    with store.DatasetWriter(tmp_path / "data" / "captions", "captions") as writer:
        for i, document in enumerate(small_corpus.documents("captions", 60, seed=0)):
            writer.add(document, store.HELD_OUT if i % 3 == 0 else store.TRAIN)
    workdir = f"{bucket.url}/runs/b"
    overrides = ("data.sources=('captions',)", "data.weights=(1.0,)", f"data.plans={bucket.url}/plans-of-b", "steps=7")
    training_runs.train(tmp_path / "data", workdir, *overrides)

    def run(module, *flags):
        running = training_runs.start(sys.executable, "-m", f"nmm_jax.{module}", f"--workdir={workdir}", *flags)
        said = training_runs.finish(running)
        assert running.returncode == 0, said[-4000:]

    run("evaluate", "--tasks=held_out", "--rows=8", f"--output={tmp_path / 'copy.json'}")
    found = json.loads(bucket.read("runs/b/evaluation/7.json"))
    assert found == json.loads((tmp_path / "copy.json").read_text()) and set(found["held_out"]) == {"captions"}
    run("report")
    assert b"<html" in bucket.read("runs/b/report.html").lower()


@pytest.mark.slow
def test_processes_share_a_bucket(bucket, corpus, uninterrupted):
    workdir = f"{bucket.url}/runs/c"
    local = [str(ROOT / "launch" / "local.sh"), "--processes=2", "--devices=1", "--"]
    for steps in (14, 21):
        command = training_runs.command(corpus, workdir, f"data.plans={bucket.url}/plans-of-c", f"steps={steps}")
        running = training_runs.start(*local, *command)
        said = training_runs.finish(running)
        assert running.returncode == 0, said[-4000:]
    assert f"going on from {workdir}/checkpoints/14" in said
    losses = [line["loss"] for line in lines_of(bucket, "runs/c")]
    alone = [line["loss"] for line in training_runs.lines(uninterrupted)]
    np.testing.assert_allclose(losses[0], alone[0], rtol=1e-6)
    assert len(losses) == 21


@pytest.mark.slow
def test_train_tells_what_is_wrong_with_a_bucket(bucket, corpus):
    said = training_runs.fails(corpus, f"{bucket.url}y/run")
    assert said.strip().split("\n")[-1] == (
        f"train: {bucket.url}y/run: there is no bucket {bucket.url}y; make it, or correct the name"
    )
