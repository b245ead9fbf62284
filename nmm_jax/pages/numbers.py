"""Large numbers for a reader: of parameters, tokens and FLOPs."""

import math


def count(value: float) -> str:
    """275M, 1.63B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if 0.9995 * size <= value < math.inf:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def power(value: float) -> str:
    """3×10¹⁹."""
    exponent = math.floor(math.log10(value * 1.0001))
    raised = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    mantissa = f"{value / 10.0**exponent:.2g}"
    return f"10{raised}" if mantissa == "1" else f"{mantissa}×10{raised}"
