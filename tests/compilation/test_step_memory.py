"""The memory of a tiny step on eight simulated devices, fsdp 4 x tensor 2, against sums by hand."""

import json
import pathlib
import subprocess
import sys

import pytest

FLOAT32 = 4
ROWS, LENGTH, DEPTH, WIDTH, FFN, VOCABULARY = 8 // 4, 48, 3, 32, 64, 264  # rows of a device
TENSOR = 2
KINDS = ("parameters", "optimizer", "gradients", "activations", "batch", "workspace")


@pytest.fixture(scope="module")
def found():
    script = pathlib.Path(__file__).with_name("memory_eight_devices.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_by_the_compilers_buffers(found):
    memory = found["memory"]
    assert memory["by_buffers"] and memory["capacity"] == 1 << 30
    assert sum(memory[kind] for kind in KINDS) == memory["peak"]
    # Of eight devices each has an eighth, and norms whole.
    eighth = FLOAT32 * found["parameters"] / 8
    assert eighth < memory["parameters"] < 1.1 * eighth
    assert 2 * memory["parameters"] <= memory["optimizer"] <= 2 * memory["parameters"] + 16  # and its count of steps
    images = ROWS * 3 * (4 * 4 * 3 + 1)  # of 4 x 4 pixels, and whether they are there
    assert memory["batch"] == ROWS * LENGTH * (7 * 4 + 1) + images
    # The inputs of three layers.
    assert memory["activations"] == FLOAT32 * DEPTH * ROWS * LENGTH * WIDTH
    layers = DEPTH * (4 * WIDTH * WIDTH + 3 * WIDTH * FFN) / 8
    assert FLOAT32 * layers <= memory["gradients"] <= memory["parameters"]
    sizes = [size for _, _, size in memory["largest"]]
    assert sizes == sorted(sizes, reverse=True)
    assert ["f32[3,2,48,32]", "jit(step)/jvp()/while", memory["activations"]] in memory["largest"]


def test_by_count(found):
    needed = found["needed"]
    positions = ROWS * LENGTH
    assert needed["parameters"] == needed["gradients"] == found["memory"]["parameters"]
    assert needed["optimizer"] == found["memory"]["optimizer"]
    assert needed["saved activations"] == FLOAT32 * DEPTH * positions * WIDTH
    norms = 2 * WIDTH + 2 * WIDTH // TENSOR  # of the sublayers; of queries and keys
    layer = (4 * WIDTH * WIDTH + 3 * WIDTH * FFN) // TENSOR + norms
    assert needed["two gathered layers"] == 2 * FLOAT32 * layer
    # Two norms' outputs; queries and keys as they come, normalised and rotated; values; what attention gives; gate, up
    # and their product. Then the gradients of the layer's output and of that product.
    half, ffn = WIDTH // TENSOR, FFN // TENSOR
    assert needed["one layer recomputed"] == FLOAT32 * positions * ((2 * WIDTH + 6 * half + 3 * ffn) + WIDTH + ffn)
    assert needed["one chunk of logits"] == FLOAT32 * positions * VOCABULARY // TENSOR
