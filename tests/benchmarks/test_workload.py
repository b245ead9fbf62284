"""What the benchmarks measure on: configs as the command line says, and what their batches need."""

import numpy as np
import pytest

from benchmarks import corpus, fusion, workload
from configs import loading
from configs.validation import validate
from nmm_jax.scaling.counting import count
from tests.fake_batches import fake_batch, tiny_config


def test_settings():
    config = workload.configured(
        "configs/small.py", {"batch_rows": 4, "row_length": 64}, ["batch_rows=2", "data.root=x"]
    )
    assert (config.batch_rows, config.row_length, config.data.root) == (2, 64, "x")
    with pytest.raises(ValueError, match="--set=batch_rows: expected KEY=VALUE"):
        workload.configured("configs/small.py", {}, ["batch_rows"])
    with pytest.raises(loading.ConfigError, match="did you mean 'batch_rows'"):
        workload.configured("configs/small.py", {}, ["batch_row=2"])


def test_needs_are_those_of_the_mask():
    config = tiny_config()
    batches = [fake_batch(config, seed) for seed in range(2)]
    dense = []
    for batch in batches:
        ids, until = batch["segment_ids"], batch["attend_until"]
        sees = (ids[:, :, None] == ids[:, None]) & (np.arange(ids.shape[1]) < until[:, :, None])
        dense.append((sees & (ids[:, :, None] > 0)).sum())
    found = workload.needs(batches)
    assert found.pairs == np.mean(dense)
    assert found.tokens == np.mean([(batch["segment_ids"] > 0).sum() for batch in batches])
    assert found.images == config.batch_rows


def test_a_config_without_data_reads_the_generated_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "DOCUMENTS", {"captions": 12, "interleaved": 6, "text": 3})
    monkeypatch.setattr(corpus, "PICTURES", 3)
    config = tiny_config(**{"data.root": str(tmp_path / "none"), "row_length": 256, "image.per_row": 8})
    batches = workload.read(config, tmp_path / "made", 2)
    assert workload.has_data(config) and config.data.root == str(tmp_path / "made")
    assert config.data.tokenizer == "bytes" and config.model.vocab_size >= 262  # it had room for 64
    assert [batch["tokens"].shape for batch in batches] == [(8, 256)] * 2
    assert batches[0]["image_mask"].any() and batches[0]["images"].std() > 20
    again = workload.read(config, tmp_path / "other", 2)
    assert all((a[name] == b[name]).all() for a, b in zip(batches, again, strict=True) for name in a)


@pytest.mark.parametrize("patches", [8, 16])
def test_early_fusion_that_costs_as_much_as_late(patches):
    late = workload.configured("configs/late_fusion.py:small", {"image.patch": patches})
    needed = workload.Needs(tokens=2000, pairs=2e5, images=40)
    parameters, flops = fusion.counterparts(late, needed).values()
    assert count(parameters).paper_parameters == pytest.approx(count(late).paper_parameters, rel=0.01)
    assert count(flops).training_flops(*needed) == pytest.approx(count(late).training_flops(*needed), rel=0.01)
    for early in (parameters, flops):
        assert early.model.family == "early_fusion" and (early.image.patch, early.image.positions) == (16, 16)
        validate(early)
    with pytest.raises(ValueError, match="late_fusion has"):
        fusion.counterparts(parameters, needed)
