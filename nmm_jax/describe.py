"""What a config amounts to: parameters, FLOPs and memory, before anything is made.

    python -m nmm_jax.describe --config=configs/early_fusion.py:275m [--format=json]

Arithmetic only, so a model of any size is described in the time Python needs to start.
"""

import dataclasses
import json
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from configs.loading import define_config_flag
from nmm_jax.models.spec import Spec
from nmm_jax.scaling.counting import causal_keys, count, memory

IMAGE_SHARE = 0.5  # of positions, in FLOPs a position: the patch embedding is so small that it hardly matters


def describe(config: ConfigDict) -> dict[str, Any]:
    """The description, ready for JSON.

    FLOPs are of a mean position, taking rows for one causal document each (an upper bound for packed rows: training
    counts the pairs of its real batches) and half of the positions for patches.
    """
    spec, counts = Spec.from_config(config), count(config)
    keys = causal_keys(config.row_length)
    step_positions = config.batch_rows * config.row_length
    training = counts.training_flops(1, keys, IMAGE_SHARE)
    return {
        "family": config.model.family,
        "dimensions": {
            "width": spec.width,
            "depth": spec.depth,
            "heads": spec.heads,
            "kv_heads": spec.kv_heads,
            "head_dim": spec.head_dim,
            "ffn_width": spec.ffn_width,
            "vocab_size": spec.vocab_size,
        },
        "experts": dataclasses.asdict(spec.moe) if spec.moe else None,
        "parameters": counts.parameters,
        "active_parameters": counts.active_parameters,
        "paper_parameters": counts.paper_parameters,
        "paper_total_parameters": counts.paper_total,
        "parts": counts.parts,
        "flops_per_token": training,
        "forward_flops_per_token": counts.forward_flops(1, keys, IMAGE_SHARE),
        "attention_flops_per_token": 3 * counts.flops_per_pair * keys,
        "attended_keys_per_token": keys,
        "positions_per_step": step_positions,
        "positions": config.steps * step_positions,
        "flops": training * config.steps * step_positions,
        "memory": memory(config),
    }


def table(description: dict[str, Any]) -> str:
    """The description for a reader."""
    d = description
    total = d["parameters"]
    lines = [f"{d['family']}: " + ", ".join(f"{k} {v:,}" for k, v in d["dimensions"].items())]
    if d["experts"]:
        e = d["experts"]
        where = "every layer" if e["every"] == 1 else f"every layer of {e['every']}"
        lines.append(
            f"experts: {e['experts']} of width {e['width']:,}, {e['top_k']} a token, {e['shared']} shared; in {where}; "
            f"routing {e['modality']}" + (f", {e['image_experts']} of them for images" if e["image_experts"] else "")
        )
    lines += _section(
        "Parameters",
        [
            *((name, f"{n:,}", f"{n / total:6.1%}") for name, n in d["parts"].items()),
            ("all", f"{total:,}", _short(total)),
            ("active", f"{d['active_parameters']:,}", _short(d["active_parameters"])),
            ("N of the paper", f"{d['paper_parameters']:,}", _short(d["paper_parameters"])),
            ("its total", f"{d['paper_total_parameters']:,}", _short(d["paper_total_parameters"])),
        ],
    )
    per_token = d["flops_per_token"]
    lines += _section(
        f"FLOPs of a position (that sees {d['attended_keys_per_token']:g} keys)",
        [
            ("forward", f"{d['forward_flops_per_token']:.4g}", ""),
            ("training", f"{per_token:.4g}", ""),
            (
                "of it attention",
                f"{d['attention_flops_per_token']:.4g}",
                f"{d['attention_flops_per_token'] / per_token:6.1%}",
            ),
        ],
    )
    lines += _section(
        "Run",
        [
            ("positions a step", f"{d['positions_per_step']:,}", ""),
            ("positions", f"{d['positions']:,}", _short(d["positions"])),
            ("training FLOPs", f"{d['flops']:.4g}", ""),
        ],
    )
    lines += _section(
        "Memory, all devices together",
        [(name, f"{n / 2**30:,.3f} GiB", "") for name, n in d["memory"].items()],
    )
    return "\n".join(lines)


def _section(title: str, rows: list[tuple[str, str, str]]) -> list[str]:
    return ["", title, *(f"  {name:<22}{value:>24}  {note}".rstrip() for name, value, note in rows)]


def _short(n: float) -> str:
    """12,345,678 -> 12.3M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.{2 if size >= 1e9 else 1}f}{unit}"
    return f"{n:g}"


def main(config: ConfigDict, output: str) -> None:
    description = describe(config)
    print(json.dumps(description, indent=2) if output == "json" else table(description))


if __name__ == "__main__":
    CONFIG = define_config_flag()
    FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "a table for a reader, JSON for a program")
    app.run(lambda _: main(CONFIG.value, FORMAT.value))
