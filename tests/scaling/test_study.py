"""Which runs a study is made of: by hand, and what it refuses."""

import json
import shlex

import pytest
from etils import epath

from configs import loading
from configs import study as studies
from configs.validation import ConfigError
from nmm_jax.scaling import study
from nmm_jax.scaling.counting import count
from nmm_jax.scaling.sweep import Sweep
from tests import tiny_study


def changed(**keys):
    c = tiny_study.get_config().unlock()
    for key, value in keys.items():
        c.grids.early[key] = value
    return c


def test_steps_branch_points_and_rates_by_hand():
    """8 rows of 48 positions: 3,840 tokens are 10 steps, of which the last two, 20%, cool down."""
    trunks = study.expand(tiny_study.get_config())
    assert list(trunks) == ["early-w16-45-45-10-s0", "early-w32-45-45-10-s0"]
    narrow = trunks["early-w16-45-45-10-s0"]
    assert [(b.name, b.at, b.steps, b.cooldown) for b in narrow.branches] == [
        ("early-w16-45-45-10-s0-10", 8, 10, 2),
        ("early-w16-45-45-10-s0-20", 16, 20, 4),
    ]
    assert narrow.steps == 16 + 2 + 4
    leg, cooled = narrow.leg(narrow.branches[1]), narrow.cooled(narrow.branches[1], "runs/here")
    assert (leg.steps, leg.schedule.warmup, leg.schedule.cooldown, leg.model.width) == (16, 4, 0, 16)
    assert (cooled.steps, cooled.schedule.cooldown, cooled.schedule.cooldown_shape) == (20, 4, "1-sqrt")
    assert (cooled.trunk.workdir, cooled.trunk.step) == ("runs/here", 16)
    assert leg.optimizer.learning_rate == cooled.optimizer.learning_rate == 1e-2
    assert leg.checkpoint.keep >= len(narrow.branches)


def test_padding_takes_more_steps():
    c = tiny_study.get_config().unlock()
    c.fill = 0.8
    assert [b.steps for b in study.expand(c)["early-w16-45-45-10-s0"].branches] == [12, 25]  # 12.5 to the even, and 25


def test_equal_flops():
    """Budgets of C: D = C / (6 N), so that twice the parameters have half the steps."""
    trunks = study.expand(changed(tokens=(), flops=(4e8,)))
    for trunk in trunks.values():
        [branch] = trunk.branches
        n = count(trunk.leg(branch)).paper_parameters
        assert 6 * n * branch.tokens == pytest.approx(4e8)
        assert branch.steps == round(4e8 / (6 * n) / (8 * 48))
    narrow, wide = (trunk.branches[0].steps for trunk in trunks.values())
    assert narrow > 1.8 * wide


def test_equal_flops_count_the_tower():
    c = studies.get_config("generated").unlock()
    c.grids = {"late": studies.grid()}
    c.grids.late.update(architecture="late", sizes=("w64",), flops=(1e12,))
    [trunk] = study.expand(c).values()
    counts = count(trunk.leg(trunk.branches[0]))
    patches_of_a_token = 0.5  # rows half of images, 16 patches for 16 positions
    per_token = 6 * (counts.paper_text + counts.paper_vision * patches_of_a_token)
    assert trunk.branches[0].tokens == pytest.approx(1e12 / per_token)


def test_one_trunk_for_all_grids():
    c = tiny_study.get_config().unlock()
    c.grids.longer = studies.grid()
    c.grids.longer.update(architecture="early", sizes=("w32",), tokens=(15_360.0,), seeds=(0, 1))
    trunks = study.expand(c)
    assert [(b.grid, b.steps) for b in trunks["early-w32-45-45-10-s0"].branches] == [
        ("early", 10),
        ("early", 20),
        ("longer", 40),
    ]
    assert [b.steps for b in trunks["early-w32-45-45-10-s1"].branches] == [40]


def test_the_papers_rates_and_warm_up():
    trunks = study.expand(studies.get_config("paper"))
    rates = {
        size: trunks[f"early-{size}-45-45-10-s0"].leg(trunks[f"early-{size}-45-45-10-s0"].branches[0]).optimizer
        for size in ("275m", "464m", "932m", "1.6b", "2.3b", "3.4b", "8b")
    }
    assert [rate.learning_rate for rate in rates.values()] == [1.5e-3, 1.5e-3, 5e-4, 4.2e-4, 4e-4, 3.5e-4, 2.4e-4]
    first, *_, last = trunks["late-1b-45-45-10-s0"].branches
    # 2.5 and 320 B tokens in batches of 2,048 x 1,024, and four fifths of them
    assert (first.steps, first.at, last.steps, last.at) == (1_192, 954, 152_588, 122_070)
    only = trunks["early-8b-45-45-10-s0"]
    assert only.branches[0].steps == 76_294 and only.leg(only.branches[0]).schedule.warmup == 5_000
    assert sum(len(t.branches) for t in trunks.values() if t.architecture == "early" and t.mixture == "20-40-40") == 48


@pytest.mark.parametrize("name", studies.STUDIES)
def test_shipped_studies_are_valid(name):
    trunks = study.expand(studies.get_config(name))
    asked = {trunk.architecture for trunk in trunks.values()}
    assert asked == ({"early", "late"} if name == "real" else {"early", "late", "moe"})
    for architecture in asked:
        ladder = [t for t in trunks.values() if t.architecture == architecture and t.seed == 0 and t.mixture[-1] == "0"]
        assert sum(len(t.branches) >= 5 for t in ladder) >= 5
    for trunk in trunks.values():
        trunk.leg(trunk.branches[0]), trunk.cooled(trunk.branches[-1], "trunk")


def test_commands_for_pods():
    sweep = Sweep(studies.get_config("paper"), epath.Path("gs://bucket/study"))
    printed = sweep.on_pods("early-1.6b-45-45-10-s0", ["--config=configs/study.py:paper"])
    script, _, command = printed.partition(" -- ")
    assert script == "launch/tpu_vm.sh watch --name=early-1-6b-45-45-10-s0 --topology=v5e:16x16"
    assert shlex.split(command)[1:] == [
        *("-m", "nmm_jax.trunk", "--config=configs/study.py:paper"),
        *("--folder=gs://bucket/study", "--trunk=early-1.6b-45-45-10-s0"),
    ]
    alone = Sweep(tiny_study.get_config(), epath.Path("runs/here")).on_pods("early-w16-45-45-10-s0", [])
    assert alone == "python -m nmm_jax.trunk --folder=runs/here --trunk=early-w16-45-45-10-s0"


@pytest.mark.parametrize(
    "keys, said",
    [
        (
            {"tokens": (384.0 * 4,)},
            r"grids.early: 1536 tokens are 4 steps of early-w16 \(384 positions each\): no room fo",
        ),
        ({"tokens": (100.0,)}, "100 tokens are 0 steps"),
        (
            {"tokens": (3840.0, 3850.0)},
            "early-w16-45-45-10-s0-10 is asked for twice: by grids.early for 3840 tokens and",
        ),
        ({"sizes": ("w16", "w16")}, "is asked for twice"),
        ({"tokens": (-1.0,)}, "budgets are positive numbers, not -1.0"),
        ({"flops": (1e9,)}, "give `tokens`, or budgets of `flops`"),
        ({"mixtures": ("50-50",)}, r"grids.early.mixtures: \['50-50'\] are none of the study's: 45-45-10"),
        ({"architecture": "latte"}, "grids.early.architecture = 'latte' is none of the study's: early"),
        ({"seeds": ()}, "grids.early has no sizes, or no seeds"),
        ({"size": ("w16",)}, "grids.early has, or lacks, size; its keys are"),
    ],
)
def test_what_a_study_refuses(keys, said):
    with pytest.raises(ConfigError, match=said):
        study.expand(changed(**keys))


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("cooldown", 1.0, "cooldown = 1.0"),
        ("fill", 0.0, "fill = 0.0"),
        ("name", "", "a study has a `name`"),
        ("cooldown_shape", "cosine", "schedule.cooldown_shape = 'cosine' is none of"),
        ("changes", (("early-*", {"model.widht": 8}),), "did you mean 'model.width'"),
        (
            "architectures",
            {"early": "configs/ladder.py:early-{size}0"},  # w160
            "grids.early, size 'w16': .*SIZE one of w16, w24",
        ),
        ("mixtures", {"half": (0.5, 0.5)}, "data.weights"),
    ],
)
def test_what_else_a_study_refuses(key, value, said):
    c = tiny_study.get_config().unlock()
    c[key] = value
    with pytest.raises(ConfigError, match=said):
        study.expand(c)


def test_a_folder_is_one_studys(tmp_path):
    folder, c = epath.Path(tmp_path / "runs"), tiny_study.get_config().unlock()
    study.claim(folder, c.name, study.expand(c))
    written = (folder / study.NAME).read_text()
    study.claim(folder, c.name, study.expand(c))
    assert (folder / study.NAME).read_text() == written
    c.run.data.root = "elsewhere"
    c.grids.early.tokens += (15_360.0,)  # it may move, and grow
    study.claim(folder, c.name, study.expand(c))
    assert len(json.loads((folder / study.NAME).read_text())["runs"]) == 6
    with pytest.raises(ConfigError, match="has the runs of the study 'tiny', not of 'large': give another --folder"):
        study.claim(folder, "large", study.expand(c))
    c.run.schedule.warmup = 5
    with pytest.raises(
        ConfigError, match="early-w16-45-45-10-s0 of a study where schedule.warmup was 4, and now it is 5"
    ):
        study.claim(folder, c.name, study.expand(c))
    c.run.schedule.warmup, c.cooldown = 4, 0.4
    with pytest.raises(ConfigError, match="-s0-10 of a study where its branch point was 8, and now it is 6"):
        study.claim(folder, c.name, study.expand(c))


def test_the_ladder_refuses_what_it_has_not():
    for argument in ("early", "early-w25", "earl-w24", "early-w24,many"):
        with pytest.raises(ValueError, match="expected ARCHITECTURE-SIZE"):
            loading.load(f"configs/ladder.py:{argument}")
