"""Which parameters the runs determine, and which only trade off against each other.

Two looks at a fit. The Jacobian of log L at the minimum gives correlations, and standard errors as if the law were
linear there and all residuals alike; those of resampled runs, where there are any, assume neither and take their place.
And the starts that came to the same objective should have come to the same parameters.

A parameter is named where its standard error is more than a factor of e (those fitted as logs) or half its value
(exponents), or where starts differ in it by more than that or than the error; its partners are those that the Jacobian
ties to it. That an A goes with its alpha is so in every table (log N is near 20, far from 0) and is no defect:
A/N^alpha is known where the runs are. So nothing is said of correlations or condition numbers alone.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from nmm_jax.scaling.fitting import Fit
from nmm_jax.scaling.laws import Law
from nmm_jax.scaling.minimization import jacobian

# Median absolute deviation to standard deviation of a normal; and of a minimum of absolute values, whose standard error
# is larger than least squares' by sqrt(pi/2) on normal residuals.
_OF_MEDIAN, _OF_ABSOLUTE = 1.4826, 1.2533
_OF_PERCENTILES = 3.2897  # standard deviations between the 5th and the 95th of a normal
_LOG, _RELATIVE = 1.0, 0.5  # standard errors beyond which a parameter is not determined
_TIED = 0.9  # correlation
_SINGULAR = 1e10  # condition number beyond which nothing that is said of errors means anything
_DIVERGED = 12.0  # robust standard deviations; and
_FAR = 0.05  # of log loss: residuals larger than both are told


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """How well a fit's parameters are determined.

    Attributes:
      condition_number: of the Jacobian of log L, its columns scaled to length one.
      standard_errors: of the fitted parameters (of logs where they are positive); inf of one that changes no run's
        loss, and of all where the Jacobian of the others is singular.
      correlations: [p, p].
      undetermined: names.
      warnings: in words.
    """

    condition_number: float
    standard_errors: dict[str, float]
    correlations: Float[np.ndarray, "p p"]
    undetermined: tuple[str, ...]
    warnings: tuple[str, ...]


def condition(fit: Fit, draws: Float[np.ndarray, "count p"] | None = None) -> Conditioning:
    """draws: fitted parameters of resampled runs."""
    law, p = fit.law, len(fit.fitted)
    residuals = fit.residuals
    scale = _OF_MEDIAN * np.median(np.abs(residuals)) * np.sqrt(len(residuals) / (len(residuals) - p))
    slopes = jacobian(law, fit.fitted, law.logs(fit.columns))
    number, errors, correlations = spread(slopes, scale * (_OF_ABSOLUTE if fit.how == "huber" else 1.0))
    if draws is not None:
        errors = np.diff(np.quantile(draws, (0.05, 0.95), axis=0), axis=0)[0] / _OF_PERCENTILES
    bounds = limits(law, fit.fitted)
    loose = ~(errors <= bounds)
    far = np.ptp(fit.ends[fit.agreed], axis=0) > np.minimum(errors, bounds)
    warnings = [
        f"{name} is {fit.values[name]:.3g}: by this law more of {of} makes the loss no less"
        for name, of in (("alpha", "N"), ("beta", "D"))
        if fit.values.get(name, 1.0) <= 0
    ]
    warnings += _of_jacobian(fit, number, errors, correlations, loose)
    if far.any():
        count, names = fit.agreed.sum(), _names(law, far)
        warnings.append(f"{count} starts came to the same objective with different {names}: any of them fits as well")
    return Conditioning(
        number,
        dict(zip(law.parameters, map(float, errors), strict=True)),
        correlations,
        tuple(name for name, is_named in zip(law.parameters, loose | far, strict=True) if is_named),
        tuple(warnings),
    )


def limits(law: Law, fitted: Float[np.ndarray, "p"]) -> Float[np.ndarray, "p"]:
    """Standard errors beyond which a fitted parameter is not determined."""
    return np.array(
        [_RELATIVE * abs(v) if n in law.free else _LOG for n, v in zip(law.parameters, fitted, strict=True)]
    )


def spread(
    slopes: Float[np.ndarray, "n p"], scale: float
) -> tuple[float, Float[np.ndarray, "p"], Float[np.ndarray, "p p"]]:
    """Condition number, standard errors and correlations of a linear regression with residuals of that scale."""
    lengths = np.linalg.norm(slopes, axis=0)
    p = slopes.shape[1]
    if not np.all(np.isfinite(slopes)) or not lengths.any():
        return np.inf, np.full(p, np.inf), np.eye(p)
    if not lengths.all():  # some change nothing: the others are as well known as without them
        there = lengths > 0
        errors, correlations = np.full(p, np.inf), np.eye(p)
        _, errors[there], correlations[np.ix_(there, there)] = spread(slopes[:, there], scale)
        return np.inf, errors, correlations
    u, singular, v = np.linalg.svd(slopes / lengths, full_matrices=False)
    number = singular[0] / singular[-1] if singular[-1] > 0 else np.inf
    if number > _SINGULAR:
        return float(number), np.full(p, np.inf), np.eye(p)
    covariance = (v.T / singular**2) @ v
    deviations = np.sqrt(np.diag(covariance))
    return float(number), scale * deviations / lengths, covariance / np.outer(deviations, deviations)


def _of_jacobian(fit: Fit, number: float, errors: np.ndarray, correlations: np.ndarray, loose: np.ndarray) -> list[str]:
    law = fit.law
    unknown = ~np.isfinite(errors)
    if unknown.all():
        return [
            f"the runs do not determine all of {', '.join(law.parameters)}: the Jacobian is singular (condition number "
            f"{number:.1e})"
        ]
    told: list[str] = []
    named = set(map(int, np.flatnonzero(unknown)))
    if unknown.any():
        told.append(f"the runs do not determine {_names(law, unknown)}: no run's loss depends on it")
    for i in np.argsort(-errors * loose):
        if not loose[i] or i in named:
            continue
        group = [j for j in range(len(errors)) if j == i or abs(correlations[i, j]) > _TIED]
        named |= set(group)
        name = law.parameters[i]
        range_ = (
            f"± {errors[i]:.2g}" if name in law.free else f"to a factor of {np.exp(min(errors[i], 700)):.2g} either way"
        )
        others = [law.parameters[j] for j in group if j != i]
        trade = f", and trades off against {', '.join(others)}" if others else ""
        told.append(f"{name} is hardly determined ({range_}){trade}: predictions far from the runs lean on it")
    return told


def _names(law: Law, chosen: np.ndarray) -> str:
    return ", ".join(name for name, is_chosen in zip(law.parameters, chosen, strict=True) if is_chosen)


def diverged(fit: Fit) -> dict[int, str]:
    """Runs that lie so far above the law that they are likely broken: {index: what is wrong}."""
    residuals = fit.residuals
    scale = max(_OF_MEDIAN * float(np.median(np.abs(residuals))), 1e-12)
    far = np.flatnonzero(residuals > max(_DIVERGED * scale, _FAR))
    expected = fit.predict(fit.columns)
    return {int(i): f"loss {fit.loss[i]:.3f}, where the law says {expected[i]:.3f}" for i in far}
