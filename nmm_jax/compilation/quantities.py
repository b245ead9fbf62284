"""Quantities for a reader: memory in GiB, traffic in GB, times, counts."""

_SECONDS = (("s", 1.0, 3), ("ms", 1e-3, 2), ("us", 1e-6, 1))  # unit, size, decimals in a column


def gibibytes(n: float, digits: int = 1) -> str:
    """12.3; what is something but rounds to nothing is <0.1. The unit is for the caller to write."""
    shown = f"{n / 2**30:,.{digits}f}"
    return shown if not n or float(shown.replace(",", "")) else f"<{10**-digits:.{digits}f}"


def traffic(n: float) -> str:
    """21.3 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= 0.9995 * size:
            return f"{_three(n / size)} {unit}"
    return f"{n:.0f} B"


def duration(seconds: float, column: float | None = None) -> str:
    """1.83 s, 12.4 ms; in a column of durations all have the unit, and the decimals, of the one that is given."""
    like = seconds if column is None else column
    unit, size, decimals = next((found for found in _SECONDS if like >= 0.9995 * found[1]), _SECONDS[-1])
    if column is None:
        return f"{_three(seconds / size)} {unit}" if seconds else "0 s"
    return f"{seconds / size:,.{decimals}f} {unit}"


def short(n: float) -> str:
    """12,345,678 -> 12.3M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.{2 if size >= 1e9 else 1}f}{unit}"
    return f"{n:g}"


def _three(n: float) -> str:
    """At least three digits: 1.20, 21.3, 117, 1,234."""
    return f"{n:,.0f}" if n >= 999.5 else f"{n:#.3g}".rstrip(".")
