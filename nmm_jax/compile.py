"""Compiles a config's exact training step for a slice that is not there: does it fit, what is sent, how long it takes.

    python -m nmm_jax.compile --config=configs/early_fusion.py:hw-8b --topology=v5p:4x4x4
    python -m nmm_jax.compile --config=configs/moe.py:hw-1b-8e --topology=v6e:16x16 --slices=2 --output=page.html
    python -m nmm_jax.compile --config=configs/early_fusion.py:hw-8b --topology=v5p:4x4x4 --search

Topologies are v4, v5e, v5p, v6e and tpu7x with the shape of a slice in chips, and NVIDIA GPUs (h100:8x8) as nodes and
GPUs in each. Their compilers run on any machine: pip install 'jax[tpu]' or 'jax[cuda13]'. A step takes minutes.

--search compiles the meshes, remat policies and microbatches that should fit, the most promising first, and ranks them
by estimated time; with --batch_rows=1024 --batch_rows=2048 these batches too, by positions a second.
`python -m nmm_jax.compilation.targets` compiles every shipped config for its slice.
"""

import json
import pathlib
import sys
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import command_line
from configs.loading import define_config_flag
from nmm_jax.compilation import search, tables
from nmm_jax.compilation.facts import Facts, facts
from nmm_jax.compilation.step import TooLarge, compile_step
from nmm_jax.parallel.topology import Topology


def compile_one(config: ConfigDict, topology: Topology) -> Facts:
    """What is known of the step.

    Raises:
      TooLarge: it does not fit; the message says by how much, and what should.
    """
    try:
        return facts(compile_step(config, topology))
    except TooLarge as e:
        raise TooLarge(f"{e}\n{search.proposals(config, topology)}") from e


if __name__ == "__main__":
    CONFIG = define_config_flag()
    TOPOLOGY = flags.DEFINE_string("topology", None, "GENERATION:SHAPE, such as v5p:4x4x8 or h100:8x8", required=True)
    SLICES = flags.DEFINE_integer("slices", 1, "slices of that shape", 1)
    SEARCH = flags.DEFINE_bool("search", False, "try meshes, remat policies and microbatches, and rank those that fit")
    BATCH = flags.DEFINE_multi_integer("batch_rows", [], "batches for --search to try; the config's, unless given", 1)
    LIMIT = flags.DEFINE_integer("limit", 8, "how many --search compiles", 1)
    FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "a table for a reader, JSON for a program")
    OUTPUT = flags.DEFINE_string("output", "", "also write a page (.html) or the JSON (.json) here")

    def main(_: list[str]) -> None:
        jax.config.update("jax_platforms", "cpu")  # nothing is run: no accelerator of this machine is touched
        jax.config.update("jax_enable_compilation_cache", False)  # what comes from it tells nothing of its buffers
        topology = Topology.parse(TOPOLOGY.value, SLICES.value)
        name = {"config": config_flags.get_config_filename(flags.FLAGS["config"])}
        found: Any
        if SEARCH.value:
            ranked = tables.in_order(search.search(CONFIG.value, topology, LIMIT.value, BATCH.value))
            found = [{**name, **one} for one in ranked]
        else:
            found = name | compile_one(CONFIG.value, topology)
        if FORMAT.value == "json":
            print(json.dumps(found, indent=2))
        else:
            print(tables.ranking(found) if SEARCH.value else tables.table(found))
        if OUTPUT.value.endswith(".json"):
            pathlib.Path(OUTPUT.value).write_text(json.dumps(found, indent=2) + "\n")
        elif OUTPUT.value:
            from nmm_jax.compilation import page  # needs jinja2, which machines that only train do not have

            page.write_page(found, OUTPUT.value)
            print(f"wrote {OUTPUT.value}", file=sys.stderr)
        if not SEARCH.value and not found["fits"]:
            sys.exit(f"it does not fit. {search.proposals(CONFIG.value, topology)}")

    command_line.run(main)
