"""Where a step's time went, by part of the model and pass: of the window that train has traced.

    python -m nmm_jax.train … --config.profile.start=20 --config.profile.steps=5 --workdir=RUN
    python -m nmm_jax.profile --workdir=RUN [--format=json]

The trace itself, RUN/profile, opens in XProf (`pip install xprof; xprof --port=8791 RUN/profile`), TensorBoard and, its
trace.json.gz, in https://ui.perfetto.dev. docs/performance.md tells how to read them.
"""

import json
import pathlib

from absl import flags

from configs import command_line
from nmm_jax.compilation import trace
from nmm_jax.compilation.program import Program


def profile(folder: pathlib.Path) -> trace.Profile:
    """Of workdir/profile.

    Raises:
      FileNotFoundError: it has no trace, or no text of the program.
    """
    found = trace.newest_trace(folder)
    text = folder / "program.txt"
    if not text.exists():
        raise FileNotFoundError(f"{text} is missing: nmm_jax.train writes it when it begins to trace")
    program = Program(text.read_text())
    names = {name for inside in program.computations.values() for name in inside}
    return trace.profile_of(trace.events_of(found, names), program)


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run, on a disk, as given to train", required=True)
    FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "a table for a reader, JSON for a program")
    LONGEST = flags.DEFINE_integer("longest", 12, "instructions to list", 0)

    def main(_: list[str]) -> None:
        found = profile(pathlib.Path(WORKDIR.value) / "profile")
        print(json.dumps(found.to_json(), indent=2) if FORMAT.value == "json" else trace.table(found, LONGEST.value))

    command_line.run(main)
