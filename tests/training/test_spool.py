"""Uploads that fail, without a bucket: tests/test_object_storage.py has those that do not."""

import pytest
from etils import epath

from data_pipelines import paths
from nmm_jax.training import spool


@pytest.fixture
def seconds(monkeypatch):
    """Those that were slept so far; nobody waits for them."""
    slept = []
    monkeypatch.setattr(spool.time, "sleep", slept.append)
    monkeypatch.setattr(spool.time, "monotonic", lambda: sum(slept))
    return slept


@pytest.fixture
def grows(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "is_remote", lambda _: True)
    made = spool.Spool(epath.Path(tmp_path))
    made.file("log.txt").write_text("a line")
    return made


def fail(monkeypatch, times):
    whole = spool.Spool._upload
    left = iter(range(times))

    def upload(self):
        if next(left, None) is not None:
            raise paths.BucketError("503")
        whole(self)

    monkeypatch.setattr(spool.Spool, "_upload", upload)


def test_the_last_upload_is_tried_for_a_minute(grows, tmp_path, monkeypatch, seconds, capsys):
    fail(monkeypatch, 5)
    grows.close()
    assert (tmp_path / "log.txt").read_text() == "a line"
    assert seconds == [1, 2, 4, 8, 16] and capsys.readouterr().err.count("503; trying again") == 5


def test_and_fails_then(grows, monkeypatch, seconds):
    fail(monkeypatch, 1000)
    with pytest.raises(paths.BucketError, match="503"):
        grows.upload()
    assert not seconds
    with pytest.raises(paths.BucketError, match="503"), spool.closing(grows):
        pass
    assert 45 < sum(seconds) <= spool.PATIENCE


def test_what_went_wrong_first_is_told(grows, monkeypatch, seconds, capsys):
    fail(monkeypatch, 1000)
    with pytest.raises(ArithmeticError, match="diverged"), spool.closing(grows):
        raise ArithmeticError("diverged")
    assert capsys.readouterr().err.endswith("503\n")
