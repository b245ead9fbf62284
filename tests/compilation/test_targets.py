"""The slices that shipped configs are meant for, and the table of them."""

import dataclasses
import json
import subprocess

import pytest

from configs import loading
from configs.targets import TARGETS, Target
from nmm_jax.compilation import targets
from nmm_jax.parallel.topology import Topology
from tests.compilation.sample_facts import sample


def test_names_are_files_of_their_own():
    names = [target.name for target in TARGETS]
    assert len(set(names)) == len(names) and not any(set(name) & set(":,/ ") for name in names)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_target_is_a_config_and_a_slice(target):
    file, _, argument = target.config.partition(":")
    config = loading.load(f"configs/{file}.py:{argument}", target.overrides)
    topology = Topology.parse(target.topology, target.slices)
    assert config.batch_rows % (topology.device_count * config.gradient_accumulation) == 0


def compiles(monkeypatch, folder, *edited):
    """The commands that are run for the targets; each prints facts."""
    ran = []

    def run(words, **_):
        ran.append(words[1:])
        return subprocess.CompletedProcess(words, 0, stdout=json.dumps(sample()), stderr="")

    monkeypatch.setattr(targets.subprocess, "run", run)
    assert all(targets.make(target, folder) for target in edited)
    return ran


def test_what_is_there_is_made_again_only_if_its_command_is_another(tmp_path, monkeypatch):
    target = Target("early_fusion:hw-8b", "v5p:4x4x4")
    edited = dataclasses.replace(target, overrides={"gradient_accumulation": 2})
    assert edited.name == target.name
    assert compiles(monkeypatch, tmp_path, target, target) == [targets.command(target)]
    assert targets.made(target, tmp_path) == sample() | {"command": targets.command(target)}
    assert targets.made(edited, tmp_path) is None  # and the table goes without
    assert compiles(monkeypatch, tmp_path, edited, edited) == [targets.command(edited)]


@pytest.mark.parametrize(
    "changes, same",
    [
        ({}, True),
        ({"gradient_accumulation": 2}, False),
        ({"slices": 2}, False),
        ({"topology": "v5p:4x4x8"}, False),
        ({"config": "configs/early_fusion.py:8b"}, False),
    ],
)
def test_what_does_not_say_its_command_is_known_by_what_it_is_of(changes, same, tmp_path):
    target = Target("early_fusion:hw-8b", "v5p:4x4x4")
    (tmp_path / f"{target.name}.json").write_text(json.dumps(sample(**changes)))
    assert (targets.made(target, tmp_path) is not None) == same


def test_what_fails_leaves_no_facts(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "command", lambda _: ["-c", "import sys; sys.exit('no such slice')"])
    assert not targets.make(TARGETS[0], tmp_path)
    assert targets.made(TARGETS[0], tmp_path) is None
    assert (tmp_path / f"{TARGETS[0].name}.log").read_text() == "no such slice\n"


def test_rows_take_the_places_of_those_before_and_the_others_stay(tmp_path):
    head = "| config | slice | step |\n| --- | --- | ---: |"
    on_one, on_two, other, gone = (
        "| early_fusion:hw-8b | v5p:4x4x4 | {} |", "| early_fusion:hw-8b | 2 x v6e:16x16 | {} |",
        "| mm1:30b | v5p:8x8x8 | {} |", "| no_more:1b | v5p:4x4x4 | {} |",
    )  # fmt: skip

    def page_of(*rows):
        return "\n".join(["before", targets.BEGIN, *rows, targets.END, "after\n"])

    page = tmp_path / "page.md"
    page.write_text(page_of())
    for table, expected in (
        ([other.format(1)], [other.format(1)]),
        ([on_two.format("2 \\1")], [on_two.format("2 \\1"), other.format(1)]),
        ([on_one.format(3), other.format(3)], [on_one.format(3), on_two.format("2 \\1"), other.format(3)]),
        ([], [on_one.format(3), on_two.format("2 \\1"), other.format(3)]),
    ):
        targets.write(page, "\n".join([head, *table]))
        assert page.read_text() == page_of(head, *expected)
    page.write_text(page_of(head, gone.format(1)))
    targets.write(page, head)
    assert page.read_text() == page_of(head)
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no place for the table"):
        targets.write(page, head)
