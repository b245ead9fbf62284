"""From a study, which lists architectures, sizes, budgets, mixtures and seeds, to the runs that it takes.

All runs of one (architecture, size, mixture, seed) share a trunk, trained at a constant rate, and branch off it where
their cooldown begins (Hägele et al. 2024, arXiv 2405.18392): five budgets D, 2D ... 16D of 20% cooldown cost 1.2 times
the largest instead of 1.9 times.

    rate   ____________________________
          /            \\      \\        \\          steps of a run      T = D / (positions of a step x fill)
         /              \\      \\        \\         its cooldown        K = cooldown x T, to the nearest
        / warm-up        T1     T2       T3       its branch point    T - K

configs/study.py lists the keys and has examples.
"""

import dataclasses
import fnmatch
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from configs import loading
from configs.study import base, grid
from configs.validation import ConfigError, flatten
from nmm_jax.scaling.counting import count, tower_tokens

ALL = 1_000_000  # checkpoints: branch points are kept whatever else is saved
ANY = 1_000  # steps of a config that is looked at for what does not depend on them


@dataclasses.dataclass(frozen=True)
class Branch:
    """A run: the trunk's steps up to `at`, then its cooldown.

    Attributes:
      tokens: D as it was asked for; what the run was really trained on its checkpoint says.
      grid: of the study, that asks for it.
    """

    name: str
    grid: str
    tokens: float
    at: int
    steps: int

    @property
    def cooldown(self) -> int:
        return self.steps - self.at


@dataclasses.dataclass(frozen=True)
class Trunk:
    """What runs share until they cool down.

    Attributes:
      file: FILE:ARGUMENT of its config.
      keys: what is set there besides, its cooldowns' shape too.
      branches: ascending by where they begin.
    """

    name: str
    architecture: str
    size: str
    mixture: str
    seed: int
    file: str
    keys: Mapping[str, Any]
    branches: tuple[Branch, ...]

    def leg(self, branch: Branch) -> ConfigDict:
        """The trunk's config up to where a branch begins; all legs are one run that is prolonged."""
        return loading.load(self.file, {**self.keys, "steps": branch.at, "checkpoint.keep": ALL})

    def cooled(self, branch: Branch, workdir: str) -> ConfigDict:
        """The config of a branch off the trunk in `workdir`."""
        ends = {"steps": branch.steps, "schedule.cooldown": branch.cooldown}
        begins = {"trunk.workdir": workdir, "trunk.step": branch.at}
        return loading.load(self.file, {**self.keys, **ends, **begins})

    @property
    def steps(self) -> int:
        """That are trained, the trunk's and all cooldowns'."""
        return self.branches[-1].at + sum(branch.cooldown for branch in self.branches)


def expand(study: ConfigDict) -> dict[str, Trunk]:
    """The trunks by name, in the order of the study's grids.

    Raises:
      ConfigError: a key that studies do not have, an unknown architecture, size or mixture, a budget that has no room
        for warm-up and cooldown, or a run that is asked for twice.
    """
    _check_keys(study)
    asked: dict[_Key, list[_Asked]] = {}
    for name, one in study.grids.items():
        for size, mixture, seed in itertools.product(one.sizes, one.mixtures or study.mixtures, one.seeds):
            key = _Key(one.architecture, size, mixture, seed)
            asked.setdefault(key, []).extend(_runs(study, name, one, key))
    trunks = (_trunk(study, key, sorted(runs, key=lambda run: run.steps)) for key, runs in asked.items())
    return {trunk.name: trunk for trunk in trunks}


NAME = "study.json"
_PLACES = (
    "data.root",
    "data.plans",
    "data.workers",
    "data.worker_kind",
    "compiler.cache",
)  # of no account for what comes out


def claim(folder: epath.Path, name: str, trunks: Mapping[str, Trunk]) -> None:
    """Says in the folder whose runs it has. A study may grow, by other trunks and by longer runs of those there are.

    Raises:
      ConfigError: the folder is another study's, or has another trunk or run under a name of this one's.
    """
    path = folder / NAME
    now: dict[str, Any] = {"name": name, "trunks": {}, "runs": {}}
    for trunk in trunks.values():
        keys = {key: value for key, value in trunk.keys.items() if key not in _PLACES}
        now["trunks"][trunk.name] = {"file": trunk.file, **keys}
        now["runs"] |= {branch.name: {"its branch point": branch.at} for branch in trunk.branches}
    now = json.loads(json.dumps(now))  # tuples are lists there
    before = json.loads(path.read_text()) if path.exists() else {**now, "trunks": {}, "runs": {}}
    if before["name"] != name:
        raise ConfigError(
            f"{folder} has the runs of the study {before['name']!r}, not of {name!r}: give another --folder"
        )
    for kind in ("trunks", "runs"):
        for of, was in before[kind].items():
            keys = now[kind].get(of, was)
            for key in sorted({*was, *keys}):
                if was.get(key) != keys.get(key):
                    raise ConfigError(
                        f"{folder} has {of} of a study where {key} was {was.get(key)!r}, and now it is "
                        f"{keys.get(key)!r}: give another --folder, or the study as it was"
                    )
        now[kind] = before[kind] | now[kind]
    if now != before or not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=2) + "\n")


def _check_keys(study: ConfigDict) -> None:
    grids: list[tuple[str, ConfigDict]] = list(study.grids.items())
    looked_at = [("the study", study, base()), *((f"grids.{name}", one, grid()) for name, one in grids)]
    for where, given, known in looked_at:
        if unknown := set(given) ^ set(known):
            raise ConfigError(f"{where} has, or lacks, {', '.join(sorted(unknown))}; its keys are {', '.join(known)}")
    if not study.name or not study.grids or not study.mixtures:
        raise ConfigError("a study has a `name`, and at least one of `mixtures` and of `grids`")
    if not 0 < study.cooldown < 1:
        raise ConfigError(f"cooldown = {study.cooldown}; it is a share of a run's steps, between 0 and 1")
    if not 0 < study.fill <= 1:
        raise ConfigError(
            f"fill = {study.fill}; it is the share of positions that are real, as data_pipelines.plan says"
        )
    for name, one in grids:
        where = f"grids.{name}"
        if one.architecture not in study.architectures:
            known = ", ".join(study.architectures)
            raise ConfigError(f"{where}.architecture = {one.architecture!r} is none of the study's: {known}")
        if unknown := set(one.mixtures) - set(study.mixtures):
            raise ConfigError(
                f"{where}.mixtures: {sorted(unknown)} are none of the study's: {', '.join(study.mixtures)}"
            )
        if bool(one.tokens) == bool(one.flops):
            raise ConfigError(f"{where}: give `tokens`, or budgets of `flops` of which each size's tokens follow")
        if not one.sizes or not one.seeds:
            raise ConfigError(f"{where} has no sizes, or no seeds")
        if wrong := [b for b in (*one.tokens, *one.flops) if not (b > 0 and math.isfinite(b))]:
            raise ConfigError(f"{where}: budgets are positive numbers, not {wrong[0]!r}")


class _Key(NamedTuple):
    """What the runs of a trunk have in common."""

    architecture: str
    size: str
    mixture: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.architecture}-{self.size}-{self.mixture}-s{self.seed}"


class _Asked(NamedTuple):
    """A run, as a grid asks for it."""

    grid: str
    tokens: float
    steps: int


def _runs(study: ConfigDict, name: str, one: ConfigDict, key: _Key) -> Iterator[_Asked]:
    _, config = _load(study, key, ANY, name)
    tokens: Sequence[float] = one.tokens
    if one.flops:
        per_token = count(config).paper_flops(1, tower_tokens(config))
        tokens = [flops / per_token for flops in one.flops]
    for d in tokens:
        yield _Asked(name, float(d), round(d / (config.batch_rows * config.row_length * study.fill)))


def _trunk(study: ConfigDict, key: _Key, runs: Sequence[_Asked]) -> Trunk:
    for one, other in itertools.pairwise(runs):
        if one.steps == other.steps:
            raise ConfigError(
                f"{key.name}-{one.steps} is asked for twice: by grids.{one.grid} for {one.tokens:g} tokens and by "
                f"grids.{other.grid} for {other.tokens:g}; leave one out"
            )
    shortest = max(runs[0].steps, 1)
    keys, config = _load(study, key, shortest, runs[0].grid)
    warmup, branches = config.schedule.warmup, []
    for run in runs:
        at = run.steps - max(round(study.cooldown * run.steps), 1)
        if at < max(warmup, 1):
            raise ConfigError(
                f"grids.{run.grid}: {run.tokens:g} tokens are {run.steps} steps of {key.architecture}-{key.size} "
                f"({config.batch_rows * config.row_length:,} positions each): no room for {warmup} of warm-up and "
                f"{run.steps - at} of cooldown; ask for more tokens"
            )
        branches.append(Branch(f"{key.name}-{run.steps}", run.grid, run.tokens, at, run.steps))
    constant = {"schedule.kind": "wsd", "schedule.warmup": warmup, "schedule.cooldown": 0}
    return Trunk(key.name, *key, _file(study, key, shortest), keys | constant, tuple(branches))


def _load(study: ConfigDict, key: _Key, steps: int, grid: str) -> tuple[dict[str, Any], ConfigDict]:
    """What is set in the config file of a run, and the config."""
    keys = flatten(study.run) | {"seed": key.seed, "data.weights": tuple(study.mixtures[key.mixture])}
    keys["schedule.cooldown_shape"] = study.cooldown_shape
    for pattern, changes in study.changes:
        keys |= changes if fnmatch.fnmatchcase(key.name, pattern) else {}
    try:
        return keys, loading.load(_file(study, key, steps), keys)
    except ValueError as e:  # the file's own, of a size that it does not have, or of a key
        raise ConfigError(f"grids.{grid}, size {key.size!r}: {e}") from e


def _file(study: ConfigDict, key: _Key, steps: int) -> str:
    return study.architectures[key.architecture].format(size=key.size, steps=steps)


def define_flag() -> flags.FlagHolder:
    """Defines --config=FILE[:ARGUMENT] of a study, with its overrides --config.key=value."""
    holder = config_flags.DEFINE_config_file("config", help_string="study, and its argument after a colon")
    theirs = flags.FLAGS["config"].parser

    class Parser(type(theirs)):  # type: ignore[misc]
        def parse(self, path: Any) -> ConfigDict:
            file = str(path).partition(":")[0]
            if isinstance(path, str) and not epath.Path(file).exists():
                raise ConfigError(f"there is no file {file!r}; give --config=configs/study.py[:ARGUMENT]")
            return super().parse(path)

    theirs.__class__ = Parser
    flags.mark_flag_as_required("config")
    return holder


def typed() -> list[str]:
    """The flag and its overrides, for the command of another process."""
    flag = flags.FLAGS["config"]
    keys = config_flags.get_override_values(flag)
    overrides = [f"--config.{key}={value}" for key, value in keys.items()]
    return [f"--config={config_flags.get_config_filename(flag)}", *overrides]
