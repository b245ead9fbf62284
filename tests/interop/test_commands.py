"""Both commands, and what an imported run is for: to generate with, and to begin other runs."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from fake_folders import CLIP, LLAMA, make_folder
from tokenizers import Tokenizer, models, pre_tokenizers

from configs import loading
from nmm_jax import models as our_models
from nmm_jax.interop.import_weights import import_weights
from nmm_jax.parallel.mesh import mesh_of
from nmm_jax.training import start
from nmm_jax.training.checkpoints import open_run


def words(path):
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *"abcdefghij"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(path))


def run(module, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", f"nmm_jax.{module}", *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [40, 13])  # 13 is the tokenizer's own: no room for those that are added
def test_import_generate_export(tmp_path, vocabulary):
    make_folder(tmp_path / "theirs", LLAMA | dict(vocab_size=vocabulary))
    words(tmp_path / "theirs" / "tokenizer.json")
    said = run("interop.import_weights", f"--input={tmp_path / 'theirs'}", f"--workdir={tmp_path / 'run'}").stderr
    assert "17 tokens, of which added: <|pad|> <|image|> <|boi|> <|eoi|>" in said
    assert (f"the model knows {vocabulary} of them" in said) == (vocabulary < 17)
    assert run("generate", f"--workdir={tmp_path / 'run'}", "--prompt=a b c", "--max_tokens=5").stdout.strip()
    out = tmp_path / "out"
    arguments = [f"--workdir={tmp_path / 'run'}", f"--output={out}", "--dtype=bfloat16", "--max_shard=5KB"]
    run("interop.export_weights", *arguments)
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["dtype"]) == (1, 2, "bfloat16")
    assert (out / "tokenizer.json").is_file() and (out / "model.safetensors.index.json").is_file()


def test_an_imported_tower_and_decoder_begin_a_late_fusion_model(tmp_path):
    """The tower at another resolution, the decoder with more tokens."""
    make_folder(tmp_path / "clip", CLIP)
    make_folder(tmp_path / "llama", LLAMA)
    for name in ("clip", "llama"):
        import_weights(tmp_path / name, tmp_path / f"{name}-run")
    decoder = open_run(tmp_path / "llama-run")
    tower = loading.from_json((tmp_path / "clip-run" / "config.json").read_text())
    config = loading.from_json((tmp_path / "llama-run" / "config.json").read_text()).unlock()
    config.model.family = "late_fusion"
    config.model.vision, config.model.vocab_size = tower.model.vision, 48
    config.image.size, config.image.patch, config.image.positions, config.image.per_row = 12, 4, 9, 2
    config.image.mean, config.image.std = tower.image.mean, tower.image.std
    config.start.vision, config.start.decoder = str(tmp_path / "clip-run"), str(tmp_path / "llama-run")
    loaded = start.load(config, our_models.build(config), mesh_of({}))
    assert loaded.keys() == {"vision", "embed", "layers", "final_norm", "head"}
    assert loaded["vision"]["positions"].shape == (10, 16)
    np.testing.assert_array_equal(loaded["embed"]["tokens"], decoder.params["embed"]["tokens"])
