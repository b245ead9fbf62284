"""The one error of this package."""


class InteropError(ValueError):
    """A folder of weights cannot be read or written; the message names file, tensor or key, and what was expected."""
