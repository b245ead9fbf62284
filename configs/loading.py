"""From a config's file, flags or JSON to a locked, checked ConfigDict.

    python -m nmm_jax.train --config=configs/early_fusion.py:275m --config.steps=100 --config.mesh.tensor=2

Keys are the ones of configs/base.py and no others, wherever they come from: a misspelt key is refused with the
nearest real name. Sequences are tuples everywhere, also after a round trip through JSON.
"""

import difflib
import importlib.util
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs.base import base
from configs.validation import ConfigError, flatten, validate


def define_config_flag() -> flags.FlagHolder:
    """Defines --config=FILE[:arg] with its overrides --config.key=value; `.value` is the locked, validated config."""
    holder = config_flags.DEFINE_config_file("config", help_string="config file, and its argument after a colon")
    flags.FLAGS["config"].parser = _ConfigFileParser()
    flags.mark_flag_as_required("config")
    flags.register_validator("config", _is_valid)
    return holder


def load(path_and_arg: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """The config of FILE[:arg], with overrides such as {"optimizer.learning_rate": 1e-3}, locked and validated.

    Raises:
      ConfigError: there is no such file, an unknown key, a value of another type, or keys that contradict each other.
    """
    config = _read_file(path_and_arg)
    _assign(config, overrides or {}, path_and_arg)
    validate(config)
    return config


def to_json(config: ConfigDict) -> str:
    """The whole config, keys sorted; `from_json` gives it back."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """The locked config that `to_json` wrote. Keys that are newer than the text have their defaults."""
    config = base()
    _assign(config, flatten(json.loads(text)), "config.json")
    return config.lock()


def _read_file(path_and_arg: str) -> ConfigDict:
    path, _, arg = path_and_arg.partition(":")
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"there is no config file {path!r}; give --config=configs/NAME.py[:ARGUMENT]")
    spec = importlib.util.spec_from_file_location(f"config_file_{pathlib.Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no function get_config")
    config = module.get_config(arg) if arg else module.get_config()
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config returned {type(config).__name__}; expected a ConfigDict from base()")
    known = flatten(base())
    for key in flatten(config):
        _require_known(key, known, path)
    missing = known.keys() - flatten(config).keys()
    if missing:
        raise ConfigError(f"{path} lacks the keys {sorted(missing)}; get_config should start from configs.base.base()")
    return config.lock()


def _require_known(key: str, known: Iterable[str], where: str) -> None:
    known = set(known)
    if key in known:
        return
    groups = {name.rsplit(".", 1)[0] for name in known if "." in name}
    if key in groups:
        raise ConfigError(f"{where}: {key!r} is a group of keys; set its keys one by one, as in {key}.KEY")
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:  # perhaps the right name in the wrong group
        near = [name for name in sorted(known) if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
    hint = f"; did you mean {near[0]!r}?" if near else "; configs/base.py lists them all"
    raise ConfigError(f"{where}: config has no key {key!r}{hint}")


def _assign(config: ConfigDict, values: Mapping[str, Any], where: str) -> None:
    known = flatten(config)
    for key, value in values.items():
        _require_known(key, known, where)
        *groups, name = key.split(".")
        group = config
        for g in groups:
            group = group[g]
        try:
            group[name] = tuple(value) if isinstance(value, list) else value
        except (TypeError, ValueError) as e:
            kind = type(known[key]).__name__
            raise ConfigError(f"{where}: {key} = {value!r} is a {type(value).__name__}; expected {kind}") from e


class _ConfigFileParser(flags.ArgumentParser):
    """Reads the file as `load` does, and looks at the overrides' names before ml_collections does."""

    def parse(self, path: Any) -> ConfigDict:
        config = path if isinstance(path, ConfigDict) else _read_file(path)
        known = flatten(config)
        for argument in sys.argv[1:]:
            flag = argument.split("=", 1)[0].lstrip("-")
            if argument.startswith("-") and flag.startswith(("config.", "noconfig.")):
                _require_known(flag.split(".", 1)[1], known, f"--{flag}")
        return config


def _is_valid(config: ConfigDict | None) -> bool:
    if config is not None:  # a missing --config has its own message
        try:
            validate(config)
        except ConfigError as e:  # not a ValidationError: that one prints the whole config before the message
            raise flags.IllegalFlagValueError(str(e)) from e
    return True
