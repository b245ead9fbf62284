"""Time by kind, on a clock that is moved by hand: each expected number is worked out beside it."""

import json
import time

import jax
import pytest

from nmm_jax.training import goodput
from nmm_jax.training.goodput import FINISHED, STOPPED, Attempt, Goodput, account

START = 1_000_000.0  # of the first attempt, Unix time


class Clock:
    """What the module takes for the time, and for the start of the process."""

    def __init__(self, monkeypatch):
        self.time = self.process = START
        monkeypatch.setattr(goodput, "now", lambda: self.time)
        monkeypatch.setattr(goodput, "start_of_attempt", lambda: self.process)

    def start(self, folder, imports):
        """A process that starts now and measures after so many seconds of imports."""
        self.process = self.time
        self.time += imports
        return Goodput(folder)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def begin(clock, run, restored):
    """10 s of start-up before this, 1 s of plans, 2 s of restoring, 30 s of compiling."""
    run.enter("plans")
    clock.time += 1
    run.enter("restore")
    clock.time += 2
    run.restored(restored)
    run.enter("compile")
    clock.time += 30
    run.enter("steps")


def steps(clock, run, after, to, seconds):
    for step in range(after + 1, to + 1):
        clock.time += seconds
        run.finished(step)


def die(run):
    """As kill -9 does: the record is what was last written."""
    run._stop()
    run.write()


def expect(found, **seconds):
    assert {kind: s for kind, s in found.seconds.items() if s} == seconds
    assert found.wall == sum(seconds.values())


def test_an_attempt_in_one_go(clock, tmp_path):
    run = clock.start(tmp_path, imports=10)
    begin(clock, run, restored=0)
    clock.time += 4
    run.waited(4)  # the first batch
    steps(clock, run, 0, 10, seconds=2)
    with run.within("checkpoint"):
        clock.time += 3
    with run.within("profiler"):
        clock.time += 5
    steps(clock, run, 10, 15, seconds=2)
    run.enter("checkpoint")
    clock.time += 1
    run.enter("shutdown")
    clock.time += 0.5
    found = run.close(FINISHED)
    expect(
        found,
        start_up=10,
        plans=1,
        restore=2,
        compile=30,
        data_wait=4,
        steps=30,
        checkpoint=4,
        profiler=5,
        shutdown=0.5,
    )
    assert found.wall == clock.time - START == 86.5
    assert found.goodput == 30 / 86.5
    assert found.attempts[0].to_first_step == 10 + 1 + 2 + 30 + 4 + 2
    assert goodput.account_of(tmp_path) == found


def test_killed_after_step_37_with_checkpoint_30(clock, tmp_path):
    """37 steps of 2 s; 7 of them are lost, and the second that step 38 had been under way. 600 s later it goes on."""
    run = clock.start(tmp_path, imports=10)
    begin(clock, run, restored=0)
    steps(clock, run, 0, 37, seconds=2)
    clock.time += 1
    die(run)
    before_restart = goodput.account_of(tmp_path)
    assert before_restart.lost_steps == 0  # who knows what the next attempt finds?
    expect(before_restart, start_up=10, plans=1, restore=2, compile=30, steps=75)

    clock.time += 600
    run = clock.start(tmp_path, imports=20)
    begin(clock, run, restored=30)
    steps(clock, run, 30, 40, seconds=3)
    found = run.close(FINISHED)
    expect(
        found,
        steps=30 * 2 + 10 * 3,
        lost_steps=7 * 2 + 1,
        start_up=10 + 20,
        plans=2,
        restore=4,
        compile=60,
        between_attempts=600,
    )
    assert found.lost_steps == 7
    assert found.wall == clock.time - START
    assert "7 steps" in found.table() and "in 2 attempts" in found.table()


def test_what_a_record_does_not_tell_is_between_attempts(clock, tmp_path):
    """The last write was at step 35, and 4 s later came the kill: of 37 steps 5 are lost for steps, 4 s for the gap."""
    run = clock.start(tmp_path, imports=10)
    begin(clock, run, restored=0)
    steps(clock, run, 0, 35, seconds=2)
    die(run)
    clock.time += 4
    run = clock.start(tmp_path, imports=10)
    begin(clock, run, restored=30)
    found = run.close(STOPPED)
    assert found.lost_steps == 5
    expect(found, steps=60, lost_steps=10, start_up=20, plans=2, restore=4, compile=60, between_attempts=4)


def test_a_stop_by_sigterm_loses_no_step(clock, tmp_path):
    run = clock.start(tmp_path, imports=10)
    begin(clock, run, restored=0)
    steps(clock, run, 0, 13, seconds=2)
    with run.within("checkpoint"):
        clock.time += 6
    clock.time += 0.25  # of the host, after its last step
    run.close(STOPPED)
    clock.time += 60
    run = clock.start(tmp_path, imports=10)
    begin(clock, run, restored=13)
    found = run.close(STOPPED)
    assert found.lost_steps == 0
    expect(found, steps=26.25, checkpoint=6, start_up=20, plans=2, restore=4, compile=60, between_attempts=60)


def test_killed_before_its_first_step(clock, tmp_path):
    """While it compiled; then in its first step, which is lost as far as it had come."""
    run = clock.start(tmp_path, imports=10)
    run.enter("compile")
    clock.time += 50
    die(run)
    clock.time += 5
    run = clock.start(tmp_path, imports=10)
    begin(clock, run, restored=0)
    clock.time += 1.5
    die(run)
    clock.time += 5
    run = clock.start(tmp_path, imports=10)
    begin(clock, run, restored=0)
    found = run.close(STOPPED)
    assert [a.to_first_step for a in found.attempts] == [None, None, None] and found.lost_steps == 0
    expect(found, lost_steps=1.5, start_up=30, plans=2, restore=4, compile=50 + 60, between_attempts=10)


def attempt(started, restored, step, steps, ended=""):
    """One that did nothing but steps."""
    return Attempt(started, dict.fromkeys(goodput.MEASURED, 0.0) | {"steps": steps}, restored, step, steps, ended=ended)


def test_going_back_before_an_earlier_attempt():
    """Checkpoints 60 and 90 were damaged and removed, so the third attempt went on from 30: all 30 steps of the second
    are lost, and 30 of the first's 60."""
    attempts = [attempt(0, 0, 60, 60.0), attempt(60, 60, 90, 60.0), attempt(120, 30, 100, 70.0, FINISHED)]
    found = account(attempts)
    assert found.lost_steps == 30 + 30
    expect(found, steps=30 + 70, lost_steps=30 + 60)


def test_a_step_is_lost_once():
    """Two attempts in a row come from 0 to 7 and leave no checkpoint: 14 steps were lost by then, not 21."""
    attempts = [attempt(0, 0, 7, 7.0), attempt(7, 0, 7, 7.0), attempt(14, 0, 10, 10.0, FINISHED)]
    found = account(attempts)
    assert found.lost_steps == 14
    expect(found, steps=10, lost_steps=14)


def test_a_trunks_steps_are_not_this_runs():
    """A cooldown that begins at the trunk's step 1000, and is killed before its first checkpoint."""
    found = account([attempt(0, 1000, 1004, 8.0), attempt(8, 1000, 1010, 20.0, FINISHED)])
    assert found.lost_steps == 4
    expect(found, steps=20, lost_steps=8)


def test_time_after_the_end_is_no_loss():
    """Finished at step 10, prolonged a week later."""
    found = account([attempt(0, 0, 10, 10.0, FINISHED), attempt(600_000, 10, 20, 10.0, FINISHED)])
    assert found.goodput == 1 and found.wall == 20


def test_a_clock_that_is_slow_on_the_next_machine():
    found = account([attempt(0, 0, 10, 10.0, STOPPED), attempt(8, 10, 20, 10.0, FINISHED)])
    assert found.wall == 20 and found.seconds["between_attempts"] == 0


def test_starting_again_in_the_same_process(clock, tmp_path):
    """The process is older than the first attempt's end: what came before is not counted twice."""
    first = clock.start(tmp_path, imports=10)
    begin(clock, first, restored=0)
    first.close(STOPPED)
    clock.time += 7
    again = Goodput(tmp_path)
    assert again.attempt.started == clock.time - 7 and again.attempt.seconds["start_up"] == 7
    assert again.close(STOPPED).wall == clock.time - START


def test_a_finished_run_that_is_started_again_had_no_attempt(clock, tmp_path):
    run = clock.start(tmp_path, imports=10)
    begin(clock, run, restored=0)
    run.close(FINISHED)
    before = json.loads((tmp_path / goodput.NAME).read_text())
    clock.time += 1000
    run = clock.start(tmp_path, imports=10)
    run.write()
    run.discard()
    assert json.loads((tmp_path / goodput.NAME).read_text()) == before


def test_only_the_first_process_writes(clock, tmp_path):
    run = Goodput(None)
    run.enter("plans")
    run.write()
    assert run.close(STOPPED).attempts and not list(tmp_path.iterdir())


def test_it_is_written_while_the_loop_is_busy(tmp_path, monkeypatch):
    monkeypatch.setattr(goodput, "EVERY", 0.01)
    run = Goodput(tmp_path)
    run.enter("compile")
    deadline = time.monotonic() + 10
    while not goodput.read(tmp_path) or goodput.read(tmp_path)[0].seconds["compile"] < 0.05:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.close(STOPPED)
    assert [p.name for p in tmp_path.iterdir()] == [goodput.NAME]


def test_a_store_that_fails_stops_no_run(tmp_path, caplog):
    run = Goodput(tmp_path / "nowhere")
    assert run.close(STOPPED).attempts
    assert "goodput.json was not written" in caplog.text


def test_the_compilation_cache(clock):
    run = Goodput(None)
    jax.monitoring.record_event("/jax/compilation_cache/cache_hits")
    assert not run.attempt.compile_cached  # that was another program
    run.enter("compile")
    jax.monitoring.record_event("/jax/compilation_cache/cache_hits")
    assert run.close(STOPPED).attempts[0].compile_cached


def test_the_process_began_before_this():
    assert 0 < goodput.now() - goodput.process_started() < 3600
    assert abs(goodput.now() - time.time()) < 5


def test_a_second_run_of_a_process_begins_where_the_first_ended():
    Goodput(None).close(FINISHED)
    ended = goodput.now()
    assert goodput.process_started() < goodput.start_of_attempt() <= ended
    assert Goodput(None).close(FINISHED).attempts[0].started >= goodput.process_started()


def test_what_is_no_record(tmp_path):
    with pytest.raises(ValueError, match="holds no goodput.json"):
        goodput.account_of(tmp_path)
    for text in ('{"attempts": [{"started"', '{"runs": []}', '{"attempts": [{"began": 1}]}'):
        (tmp_path / goodput.NAME).write_text(text)
        with pytest.raises(ValueError, match="is no record of attempts .* move the file away"):
            goodput.read(tmp_path)
