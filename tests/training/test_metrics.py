"""metrics.jsonl: exact floats, each step once, torn and lost lines dropped."""

import json

import numpy as np
import pytest

from nmm_jax.training import metrics
from tests import tiny


def fetched(**changes):
    values = {
        "loss": np.float32(0.1),
        "terms": {"text": np.float32(0.1)},
        "loss_sum_by_source": np.array([3.0, 0.0], np.float32),
        "mask_sum_by_source": np.array([10.0, 0.0], np.float32),
        "learning_rate": np.float32(1e-3),
        "grad_norm": np.float32(1.0),
        "param_norm": np.float32(2.0),
        "tokens_by_source": np.array([40, 60], np.int32),
        "images": np.int32(3),
        "attended_pairs": np.float32(500.0),
        "vision_slots": np.int32(0),
        "router": {},
        "logged": {},
    }
    return values | changes


def test_a_line_has_exact_numbers_and_no_loss_for_a_source_without_targets():
    seen = metrics.Seen({"captions": 2**40, "text": 0}, images=7)
    seen.add(fetched())
    line = json.loads(json.dumps(metrics.line(5, fetched(), seen, {})))
    assert line["loss"] == float(np.float32(0.1)) != 0.1
    assert line["loss/captions"] == float(np.float32(3) / np.float32(10)) and "loss/text" not in line
    assert (line["tokens"], line["tokens/captions"], line["tokens/text"], line["images"]) == (
        2**40 + 100,
        2**40 + 40,
        60,
        10,
    )


def test_a_line_of_a_model_with_experts():
    """Two layers of two experts, 100 tokens: the first layer even, the second with all on one expert and 5 dropped."""
    router = {
        "balance_loss": np.float32(1.5),
        "router_z_loss": np.float32(4.0),
        "expert_tokens": np.array([[[30, 30], [20, 20]], [[60, 0], [40, 0]]], np.int32),
        "dropped_tokens": np.array([0, 5], np.int32),
        "load_imbalance": np.array([1.0, 2.0], np.float32),
        "router_entropy": np.array([[40.0, 20.0], [30.0, 10.0]], np.float32),
    }
    seen = metrics.Seen({"captions": 0, "text": 0}, dropped=2)
    seen.add(fetched(router=router))
    line = json.loads(json.dumps(metrics.line(5, fetched(router=router), seen, {})))
    assert {k.removeprefix("moe/"): v for k, v in line.items() if k.startswith("moe/")} == {
        "balance_loss": 1.5,
        "router_z_loss": 4.0,
        "router_entropy": 0.5,
        "load_imbalance": 1.5,
        "dropped_tokens": 7,
        "tokens_per_expert": [[50, 50], [100, 0]],
    }


def test_a_line_of_late_fusion_of_two_terms_and_of_what_an_objective_tells():
    changes = {
        "vision_slots": np.int32(4),
        "terms": {"text": np.float32(2.0), "pixels": np.float32(0.5)},
        "logged": {"contrastive/scale": np.float32(14.0)},
    }
    seen = metrics.Seen({"captions": 0, "text": 0}, images=7, vision_slots=8)
    seen.add(fetched(**changes))
    line = metrics.line(5, fetched(**changes), seen, {})
    assert line["vision/empty"] == 1 - 10 / 12
    assert (line["loss_text"], line["loss_pixels"], line["contrastive/scale"]) == (2.0, 0.5, 14.0)
    plain = metrics.line(5, fetched(), metrics.Seen({"captions": 0, "text": 0}), {})
    assert not {"vision/empty", "loss_text"} & plain.keys()


def test_seen_survives_a_checkpoint():
    seen = metrics.Seen({"captions": 2**40, "text": 3}, images=7, dropped=1, vision_slots=9)
    meta = json.loads(json.dumps(seen.to_meta()))
    assert metrics.Seen.from_meta(meta, ("captions", "text")) == seen


def test_trim_drops_later_lines_and_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "loss": 1 / s}) + "\n" for s in (1, 2, 3, 4)]
    path.write_text("".join(lines) + '{"step": 5, "lo')
    metrics.trim(path, 3)
    assert path.read_text() == "".join(lines[:3])
    metrics.trim(path, 3)
    assert path.read_text() == "".join(lines[:3])
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_that_ends_in_a_number_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')  # whole but for its newline: the next append would spoil it
    metrics.trim(path, 2)
    assert path.read_text() == '{"step": 1}\n'


def test_writer_goes_on_after_the_restored_step(tmp_path):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = metrics.Writer(tmp_path, start, tiny.get_config())
        for s in steps:
            writer.write({"step": s, "run": start})
        writer.close()
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": s, "run": r} for s, r in ((1, 0), (2, 0), (3, 2), (4, 2))]


def test_foreign_file_is_not_eaten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("something else\n")
    with pytest.raises(ValueError, match="metrics.jsonl: 'something else' is no line of metrics"):
        metrics.trim(path, 3)
    assert path.read_text() == "something else\n"


@pytest.mark.parametrize("name, value", [("loss", np.nan), ("grad_norm", np.inf), ("param_norm", np.nan)])
def test_numbers_that_are_not_finite_stop_the_run(name, value):
    metrics.check_finite(7, fetched())
    with pytest.raises(metrics.Diverged, match=f"{name} is {value} at step 7.*learning_rate"):
        metrics.check_finite(7, fetched(**{name: np.float32(value)}))


def test_speed_counts_flops_of_tokens_and_pairs(monkeypatch):
    speed = metrics.Speed(
        lambda tokens, pairs, images: 6e9 * tokens + 1e6 * pairs + 1e9 * images, peak_flops=1e12, since=0.0
    )
    speed.add(fetched(), data_wait=0.5)
    speed.add(fetched(), data_wait=0.1)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: 4.0)
    rates = speed.take()
    assert rates["time/step"] == 2.0 and rates["time/data_wait"] == pytest.approx(0.3)
    assert rates["speed/tokens_per_second"] == 50.0 and rates["speed/images_per_second"] == 1.5
    # 200 tokens * 6e9 + 1000 pairs * 1e6 + 6 images * 1e9 = 1.207e12 FLOPs in 4 s
    assert rates["speed/tflops_per_second"] == pytest.approx(0.30175)
    assert rates["speed/mfu"] == pytest.approx(0.30175)
