"""What a config amounts to: parameters, FLOPs and memory, before anything is made.

    python -m nmm_jax.describe --config=configs/early_fusion.py:275m [--format=json]

Shapes only, no arrays, so a model of any size is described in the time Python needs to start.
"""

import dataclasses
import json
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from configs import command_line
from configs.loading import define_config_flag
from nmm_jax.models.spec import Spec, StackSpec, VisionSpec
from nmm_jax.scaling.counting import IMAGE_SHARE, causal_keys, count, memory


def describe(config: ConfigDict) -> dict[str, Any]:
    """The description, ready for JSON.

    FLOPs are of a mean position, taking rows for one causal document each (an upper bound for packed rows: training
    counts the pairs of its real batches) and half of the positions for images. Of an encoder they are of a mean
    position of full rows, each of which has one image and one text.
    """
    spec, counts = Spec.from_config(config), count(config)
    keys = causal_keys(config.row_length)
    step_positions = config.batch_rows * config.row_length
    pairs = config.data.rows == "pairs"
    images = 1 / config.row_length if pairs else IMAGE_SHARE / spec.image_positions
    patches = spec.vision.patches if spec.vision else 0
    training = counts.training_flops(1, keys, images)
    return {
        "family": config.model.family,
        "row_length": config.row_length,
        "pairs": pairs,
        "dimensions": _dimensions(spec) | {"vocab_size": spec.vocab_size},
        "vision": _tower(spec.vision) if spec.vision else None,
        "connector": dataclasses.asdict(spec.connector) if spec.connector else None,
        "deep": dataclasses.asdict(spec.deep) if spec.deep else None,
        "experts": dataclasses.asdict(spec.moe) if spec.moe else None,
        "parameters": counts.parameters,
        "trainable_parameters": counts.trainable_parameters,
        "active_parameters": counts.active_parameters,
        "paper_parameters": counts.paper_parameters,
        "paper_text_parameters": counts.paper_text,
        "paper_vision_parameters": counts.paper_vision,
        "paper_total_parameters": counts.paper_total,
        "parts": counts.parts,
        "trainable_parts": counts.trainable_parts,
        "flops_per_token": training,
        "forward_flops_per_token": counts.forward_flops(1, keys, images),
        "attention_flops_per_token": counts.training.pair * keys,
        "attended_keys_per_token": keys,
        "flops_per_image": counts.image_flops,
        "images_per_token": images,
        "positions_per_step": step_positions,
        "positions": config.steps * step_positions,
        "flops": training * config.steps * step_positions,
        "paper_flops": 6 * (counts.paper_text + counts.paper_vision * images * patches) * config.steps * step_positions,
        "memory": memory(config),
    }


def _dimensions(spec: StackSpec) -> dict[str, int]:
    names = ("width", "depth", "heads", "kv_heads", "head_dim", "ffn_width")
    return {name: getattr(spec, name) for name in names}


def _tower(spec: VisionSpec) -> dict[str, int]:
    names = ("width", "depth", "heads", "head_dim", "ffn_width", "size", "patch", "tokens")
    return {name: getattr(spec, name) for name in names}


def table(description: dict[str, Any]) -> str:
    """The description for a reader."""
    d = description
    total = d["parameters"]
    lines = [f"{d['family']}: " + _listed(d["dimensions"])]
    if d["vision"]:
        lines.append("vision tower: " + _listed(d["vision"]))
    if d["connector"]:
        c = d["connector"]
        lines.append(f"connector: {c['kind']}, from {c['side']} x {c['side']} patches to {c['positions']:,} positions")
    if d["deep"]:
        where = _where(d["deep"]["every"])
        lines.append(f"deep fusion: images have their own {', '.join(d['deep']['modules'])} in {where}")
    if d["experts"]:
        e = d["experts"]
        lines.append(
            f"experts: {e['experts']} of width {e['width']:,}, {e['top_k']} a token, {e['shared']} shared; in "
            f"{_where(e['every'])}; "
            f"routing {e['modality']}" + (f", {e['image_experts']} of them for images" if e["image_experts"] else "")
        )
    lines += _section(
        "Parameters",
        [
            *((name, f"{n:,}", f"{n / total:6.1%}") for name, n in d["parts"].items() if n),
            ("all", f"{total:,}", _short(total)),
            ("trainable", f"{d['trainable_parameters']:,}", _short(d["trainable_parameters"])),
            ("active", f"{d['active_parameters']:,}", _short(d["active_parameters"])),
            *_counted_by_paper(d),
        ],
    )
    of, unit = 1, f"position (that sees {d['attended_keys_per_token']:g} keys; {d['images_per_token']:.4g} images)"
    if d["pairs"]:
        of, unit = d["row_length"], f"pair (an image, and a text of {d['row_length']} positions)"
    per_token, attention = d["flops_per_token"], d["attention_flops_per_token"]
    lines += _section(
        f"FLOPs of a {unit}",
        [
            ("forward", f"{of * d['forward_flops_per_token']:.4g}", ""),
            ("training", f"{of * per_token:.4g}", ""),
            (
                "of it text attention" if d["vision"] else "of it attention",
                f"{of * attention:.4g}",
                f"{attention / per_token:6.1%}",
            ),
        ],
    )
    lines += _section(
        "FLOPs of an image, forward, outside of the decoder",
        [(name, f"{n:.4g}", "") for name, n in d["flops_per_image"].items() if n],
    )
    lines += _section(
        "Run",
        [
            (f"{unit.split()[0]}s a step", f"{d['positions_per_step'] // of:,}", ""),
            (f"{unit.split()[0]}s", f"{d['positions'] // of:,}", _short(d["positions"] // of)),
            ("training FLOPs", f"{d['flops']:.4g}", ""),
            *([] if d["pairs"] else [("C of the paper", f"{d['paper_flops']:.4g}", "6 (N D + N_v D_v)")]),
        ],
    )
    lines += _section(
        "Memory, all devices together",
        [(name, f"{n / 2**30:,.3f} GiB", "") for name, n in d["memory"].items()],
    )
    return "\n".join(lines)


def _counted_by_paper(d: dict[str, Any]) -> list[tuple[str, str, str]]:
    """N, which the paper has of language models; its parts and its total where they are others."""
    if d["pairs"]:
        return []
    parts = {"N of the paper": d["paper_parameters"]}
    if d["vision"]:
        parts |= {"  of it text": d["paper_text_parameters"], "  of it vision": d["paper_vision_parameters"]}
    if d["paper_total_parameters"] != d["paper_parameters"]:
        parts |= {"its total": d["paper_total_parameters"]}
    return [(name, f"{n:,}", _short(n)) for name, n in parts.items()]


def _listed(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in values.items())


def _where(every: int) -> str:
    return "every layer" if every == 1 else f"every layer of {every}"


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
    command_line.run(lambda _: main(CONFIG.value, FORMAT.value))
