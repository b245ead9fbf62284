"""The argument after a config file's colon: a name, then steps and options, NAME[,STEPS][,KEY=VALUE ...]."""

from collections.abc import Collection, Mapping


def parse(
    argument: str, file: str, names: Collection[str], options: Mapping[str, Collection[str] | type[int]]
) -> tuple[str, int | None, dict[str, str]]:
    """Name, steps (None: the file's own) and options of an argument.

    Args:
      file: for messages.
      options: by name the values it may have, or `int`.

    Raises:
      ValueError: another name, option or value; the message lists those there are.
    """
    name, *rest = argument.split(",")
    if name not in names:
        raise ValueError(f"{file}:{argument}: expected one of {', '.join(names)}, and perhaps ,STEPS or ,KEY=VALUE")
    steps, chosen = None, {}
    for part in rest:
        key, is_option, value = part.partition("=")
        if not is_option and part.isdecimal():
            steps = int(part)
            continue
        if key not in options or not is_option:
            raise ValueError(
                f"{file}:{argument}: {part!r} is neither a number of steps nor one of its options: "
                f"{', '.join(f'{k}=…' for k in options) or 'it has none'}"
            )
        allowed = options[key]
        if not (value.isdecimal() if isinstance(allowed, type) else value in allowed):
            expected = "a number" if isinstance(allowed, type) else f"one of {', '.join(allowed)}"
            raise ValueError(f"{file}:{argument}: {key} = {value!r}; expected {expected}")
        chosen[key] = value
    return name, steps, chosen
