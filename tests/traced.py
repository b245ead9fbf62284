"""What a traced function computes."""

from collections.abc import Iterator
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Its own, and those of all that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def outputs(jaxpr: Jaxpr) -> Iterator[Any]:
    """Variables that these make."""
    for equation in equations(jaxpr):
        yield from equation.outvars
