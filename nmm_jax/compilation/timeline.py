"""What an estimated step spends its time in, part by part."""

from collections.abc import Mapping
from typing import Any


def in_turn(estimate: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by part, one after the other: they sum to the step (roofline.Estimate).

    Where something that goes on beside the compute takes longer than it, the rest of it is a part of its own.
    """
    compute = estimate["needed"] + estimate["repeated"]
    parts = {"compute": estimate["needed"], "repeated compute": estimate["repeated"]}
    side_by_side = {
        "memory": estimate["memory"],
        "links": sum(estimate["links_hidden"].values()),
        "network": sum(estimate["network_hidden"].values()),
    }
    longest = max(side_by_side, key=lambda name: side_by_side[name])
    parts[f"rest of {longest}"] = max(0.0, side_by_side[longest] - compute)
    parts["optimizer"] = estimate["optimizer"]
    return _some(parts | _over("links", estimate["links"]) | _over("network", estimate["network"]))


def beside(estimate: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of what goes on while layers compute."""
    hidden = _over("links", estimate["links_hidden"]) | _over("network", estimate["network_hidden"])
    return _some({"memory": estimate["memory"]} | hidden)


def _over(kind: str, by_axes: Mapping[str, float]) -> dict[str, float]:
    return {f"{kind} over {axes}": seconds for axes, seconds in by_axes.items()}


def _some(parts: dict[str, float]) -> dict[str, float]:
    return {name: seconds for name, seconds in parts.items() if seconds}
