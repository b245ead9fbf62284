"""Freezing: parameters whose names match the patterns of `optimizer.freeze` are not trained.

    ("vision/*",)                     the vision tower
    ("embed/*", "layers/attention*")  token embeddings; attention and the norms before it, in all layers

A pattern is the shell's (fnmatch): * is any text, slashes too, [!i]* what does not begin with i. Gradients are taken of
the other parameters alone, and the optimizer's state, its norm and its decay know no others.
"""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

Tree = dict[str, Any]  # nested dicts; a leaf's name is its keys with slashes between


def split(tree: Tree, patterns: Sequence[str]) -> tuple[Tree, Tree]:
    """The trainable and the frozen part of a tree of parameters, or of anything for each parameter.

    Raises:
      ValueError: a pattern matches nothing, or together they leave nothing to train.
    """
    flat = flatten_dict(tree, sep="/")
    names = frozen_names(flat, patterns)
    trainable = {name: x for name, x in flat.items() if name not in names}
    frozen = {name: x for name, x in flat.items() if name in names}
    return unflatten_dict(trainable, sep="/"), unflatten_dict(frozen, sep="/")


def merge(first: Tree, second: Tree) -> Tree:
    """The tree that was split; where both have a name, the second's."""
    return unflatten_dict(flatten_dict(first, sep="/") | flatten_dict(second, sep="/"), sep="/")


def frozen_names(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """Those that the patterns match; the same errors as `split`."""
    names = list(names)
    frozen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            raise ValueError(_nothing_matches(pattern, names))
        frozen |= matched
    if frozen and len(frozen) == len(names):
        raise ValueError(f"optimizer.freeze = {tuple(patterns)!r} freezes every parameter; leave some to train")
    return frozen


def _nothing_matches(pattern: str, names: list[str]) -> str:
    groups = {name.rsplit("/", depth)[0] + "/*" for name in names for depth in range(1, name.count("/") + 1)}
    near = difflib.get_close_matches(pattern, [*sorted(groups), *names], n=3, cutoff=0.5)
    hint = f" (did you mean {', '.join(near)}?)" if near else ""
    return f"optimizer.freeze: {pattern!r} matches no parameter{hint}; there are {', '.join(sorted(names))}"
