"""How much of a run's time went into training, and where the rest went: of a run that is alive, dead or done.

    python -m nmm_jax.goodput --workdir=RUN [--format=json]

nmm_jax/training/goodput.py says what is counted as what. Nothing is restored and no device is touched.
"""

import json

from absl import flags

from configs import command_line
from nmm_jax.training import goodput

if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run, as given to train", required=True)
    FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "a table for a reader, JSON for a program")

    def main(_: list[str]) -> None:
        account = goodput.account_of(WORKDIR.value)
        if FORMAT.value == "json":
            print(json.dumps(account.to_json(), indent=2))
        else:
            print(account.table())
            if not account.attempts[-1].ended:
                print(f"  Its last sign of life is {goodput.now() - account.attempts[-1].seen:,.0f} s ago.")

    command_line.run(main)
