"""What a traced function computes."""

from collections.abc import Iterator
from typing import Any

from jax.extend.core import Jaxpr, jaxprs_in_params


def outputs(jaxpr: Jaxpr) -> Iterator[Any]:
    """Variables that its equations make, and those of all that it calls."""
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for inner in jaxprs_in_params(equation.params):
            yield from outputs(inner)
