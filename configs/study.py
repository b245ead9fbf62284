"""Studies: which runs a scaling law is fitted to. Early fusion, late fusion and experts, sizes by budgets.

    launch/study.sh .venv/bin/python generated           # the data, all runs, the table
    launch/study.sh .venv/bin/python real DATA           # DATA: the folder of the samples that docs/results.md names
    python -m nmm_jax.scaling.sweep --config=configs/study.py:generated --folder=runs/study/generated --jobs=2
    python -m nmm_jax.scaling.sweep --config=configs/study.py:generated --folder=runs/study/generated --status
    python -m nmm_jax.scaling.sweep --config=configs/study.py:paper --folder=gs://bucket/study --print

The argument is a study:

    generated   configs/ladder.py on rendered scenes of the level `full`, 21 k to 0.6 M parameters: for 2 CPU cores
    real        the same, early and late fusion, on pictures with captions, posts with pictures, and a textbook
    gpu         the ladder's larger sizes, 14 M to 365 M parameters, on data of your own in data/
    paper       the ladders of Shukor et al. 2025 (arXiv 2504.07951), Tables 5 and 6, for pods

A run's learning rate and warm-up are those of its config file: the paper's, and what configs/ladder.py makes of them
for small models. As runs of several budgets share a trunk, the warm-up is the one that the file has for the shortest.
scaling/study.py draws how a trunk is shared.

              runs   trunks    FLOPs   time; of the last two computed and not measured
    generated   86       22   1.7e13   52 minutes of CPU, two trunks side by side on 2 cores
    real        60       16   6.1e12   25 minutes of CPU, 15 minutes on 2 cores
    gpu         86       22   3.1e19   22 hours of an H200, at 40% of its 989 TFLOP/s
    paper      289       37   1.3e23   8,000 days of a TPU v5p chip, at 40% of its 459 TFLOP/s
"""

from typing import Any

from ml_collections import ConfigDict

from configs import late_fusion, targets


def base() -> ConfigDict:
    """Every key of a study."""
    c = ConfigDict()
    c.name = ""  # a folder holds the runs of one study
    c.architectures = ConfigDict()  # by name the config of a run, FILE:ARGUMENT with {size} and perhaps {steps} in it
    c.run = ConfigDict()  # what all runs change there: c.run.data = {"root": ...}
    c.changes = ()  # what some change besides: (pattern of names, {key: value}) each
    c.mixtures = ConfigDict()  # by name the weights of data.sources
    c.fill = 1.0  # share of positions that are real (data_pipelines.plan says it): budgets are of real positions
    c.cooldown = 0.2  # share of a run's steps
    c.cooldown_shape = "1-sqrt"  # 1-sqrt | linear
    c.grids = ConfigDict()  # by name, see below; no run in two of them
    c.launch = ()  # how pods make a trunk: (pattern of names, launch script with {name} in it) each; the first counts
    return c


def grid() -> ConfigDict:
    """Every key of a grid: all of its sizes by all of its budgets, mixtures and seeds."""
    c = ConfigDict()
    c.architecture = ""
    c.sizes = ()
    c.tokens = ()  # D of the runs of each size: positions of text and images
    c.flops = ()  # or C: IsoFLOP curves, D = C / (6 N); in late fusion with the tower's share for rows half of images
    c.mixtures = ()  # of the study's; () is all
    c.seeds = (0,)
    return c


def get_config(argument: str = "generated") -> ConfigDict:
    """argument: one of STUDIES."""
    if argument not in STUDIES:
        raise ValueError(f"configs/study.py:{argument}: expected one of {', '.join(STUDIES)}")
    c = STUDIES[argument]()
    c.name = argument
    return c.lock()


def _grid(architecture: str, sizes: tuple[str, ...], tokens: tuple[float, ...], **others: Any) -> ConfigDict:
    c = grid()
    c.update(architecture=architecture, sizes=sizes, tokens=tokens, **others)
    return c


SIZES, HELD_OUT, NOISE = ("w16", "w24", "w32", "w48", "w64"), ("w96",), ("w24", "w64")  # of configs/ladder.py


def _on_cpu(name: str, architectures: tuple[str, ...], tokens: tuple[float, ...]) -> ConfigDict:
    """5 sizes by 5 budgets of each architecture, a run of 2.1 times the largest N, two more seeds of some."""
    c = base()
    c.run.data = {"root": f"runs/study/{name}"}
    c.run.evaluation = {"rows": 128, "batch_rows": 32}
    c.mixtures["45-45-10"] = (0.45, 0.45, 0.10)
    for architecture in architectures:
        c.architectures[architecture] = f"configs/ladder.py:{architecture}-{{size}},{{steps}}"
        c.grids[architecture] = _grid(architecture, SIZES, tokens)
        c.grids[f"{architecture}_held_out"] = _grid(architecture, HELD_OUT, tokens[3:4])
    c.grids.early_noise = _grid("early", NOISE, tokens[1:4:2], seeds=(1, 2))
    return c


def generated() -> ConfigDict:
    c = _on_cpu("scenes", ("early", "late", "moe"), (80e3, 140e3, 250e3, 450e3, 800e3))
    c.fill = 0.895
    return c


def real() -> ConfigDict:
    c = _on_cpu("samples", ("early", "late"), (40e3, 70e3, 125e3, 225e3, 400e3))  # no caption twice
    c.run.model = {"vocab_size": 512}
    return c


def gpu() -> ConfigDict:
    c = base()
    c.architectures = {name: f"configs/ladder.py:{name}-{{size}},{{steps}}" for name in ("early", "late", "moe")}
    c.run.data = {"root": "data"}
    c.mixtures["45-45-10"] = (0.45, 0.45, 0.10)
    tokens = tuple(0.125e9 * 2**n for n in range(5))
    for name in c.architectures:
        c.grids[name] = _grid(name, ("w256", "w384", "w512", "w768", "w1024"), tokens)
        c.grids[f"{name}_held_out"] = _grid(name, ("w1536",), tokens[-1:])
    c.grids.early_noise = _grid("early", ("w256", "w512"), tokens[1::2], seeds=(1, 2))
    c.launch = (("*", "launch/slurm.sh --job-name={name} --nodes=1 --gpus-per-node=8 --time=24:00:00"),)
    return c


def paper() -> ConfigDict:
    c = base()
    files = {"early": "early_fusion.py:{size}", "late": "late_fusion.py:{size}", "moe": "moe.py:{size}-8e"}
    c.architectures = {name: f"configs/{file},{{steps}}" for name, file in files.items()}
    c.run.data = {"root": "/data"}
    c.run.checkpoint = {"every": 5_000}  # all of a trunk's are kept: 33 of them, 1.3 TB at 3.4b
    for captions, interleaved, text in ((45, 45, 10), (40, 20, 40), (30, 30, 40), (20, 40, 40)):
        c.mixtures[f"{captions}-{interleaved}-{text}"] = (captions / 100, interleaved / 100, text / 100)
    tokens = tuple(2.5e9 * 2**n for n in range(8))  # to 320 B
    sizes = ("275m", "464m", "932m", "1.6b", "2.3b", "3.4b")
    c.grids.early = _grid("early", sizes, tokens)
    c.grids.late = _grid("late", tuple(late_fusion.SIZES), tokens, mixtures=("45-45-10",))
    c.grids.moe = _grid("moe", sizes, tokens, mixtures=("45-45-10",))
    c.grids.held_out = _grid("early", ("8b",), tokens[-2:-1], mixtures=("45-45-10",))
    files_of = {file.split(":")[0].removesuffix(".py"): name for name, file in files.items()}
    for target in targets.TARGETS:
        file, _, size = target.config.partition(":")
        size, _, variant = size.partition("-8e") if file == "moe" else (size, "", "")
        if target.slices == 1 and not variant and file in files_of:
            pattern = f"{files_of[file]}-{size}-*"
            c.launch += ((pattern, f"launch/tpu_vm.sh watch --name={{name}} --topology={target.topology}"),)
            c.changes += ((pattern, dict(target.overrides)),)
    return c


STUDIES = {study.__name__: study for study in (generated, real, gpu, paper)}
