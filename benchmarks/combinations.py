"""Train every combination of parameterization, weighting and variance briefly on the digits.

    python benchmarks/combinations.py --out reports/combinations.csv

prints a table and a JSON line. The fixed and analytic variances share one training run; the learned variance has its
own, with the hybrid loss.
"""

import argparse
import csv
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffusion.evaluation import likelihood
from diffusion.evaluation.heldout import quick_mse, x_0_mse
from diffusion.evaluation.histograms import values_of
from diffusion.model import Config, Model, new_network
from diffusion.pairs.pairs import Batches, Pairs
from diffusion.process import build
from diffusion.process.weighting import WEIGHTINGS as NAMES
from diffusion.storage.tar import SPLITS
from diffusion.training import loop
from diffusion.training.state import new_state
from flows import params as parameters
from flows.changes import lay_over
from flows.params import Params
from flows.paths import Paths
from flows.stages import pairs as pairs_stage
from flows.stages import shard as shard_stage
from flows.yaml_files import read_yaml

PARAMETERIZATIONS = ["eps", "x_0", "v", "mu"]
WEIGHTINGS = list(NAMES)
CPU = torch.device("cpu")
Row = dict[str, Any]


def nothing() -> None:
    """No stop signal is ever received."""


def train(params: Params, paths: Paths) -> Model:
    """Train a model; returns it with the EMA weights after `params.train.steps` steps."""
    torch.manual_seed(params.seed)
    pairs, process = Pairs(paths.pairs, "train"), build.process(params.process)
    net = new_network(pairs.shape, len(pairs.manifest.classes), params.network, params.process)
    state = new_state(net, params.train, process.schedule)
    fetch = Batches(pairs, params.seed, params.train.batch_size)
    trainer = loop.Trainer(params.train, params.seed, process.loss, fetch, state.net)
    for _ in range(params.train.steps):
        loop.step(state, trainer)
    config = Config(shape=pairs.shape, classes=(), network=params.network, process=params.process, x_0_mse=None)
    model = Model(state.average, process, config)
    square = x_0_mse(model, Pairs(paths.pairs, "val"), CPU, params.seed, nothing)
    return Model(state.average, process, config.model_copy(update={"x_0_mse": square}))


def measure(root: Path, images: int, changes: dict[str, Any]) -> list[Row]:
    """Train one combination; returns a row for each variance it supports."""
    torch.set_num_threads(1)
    paths = Paths(root)
    params = parameters.validate(lay_over(read_yaml(paths.params), {"process": changes}), str(paths.params))
    began = time.perf_counter()
    model = train(params, paths)
    seconds, test = time.perf_counter() - began, Pairs(paths.pairs, "test")
    mse = quick_mse(model, test, CPU, nothing).mse
    draws = likelihood.Draws(images, likelihood.strata(params.process.num_timesteps), params.seed)
    values = values_of(Pairs(paths.pairs, split) for split in SPLITS)
    rows = []
    for variance in ["learned"] if params.process.learned_variance else ["fixed-small", "fixed-large", "analytic"]:
        total = likelihood.measure(model, model.variance(variance), test, draws, CPU, values=values).total
        rows.append(
            {
                "parameterization": params.process.parameterization,
                "weighting": params.process.weighting.kind,
                "variance": variance,
                "mse": mse,
                "bits_per_dim": float(total.mean()),
                "bits_per_dim_se": float(total.std(ddof=1) / len(total) ** 0.5),
                "finite": all(parameter.isfinite().all().item() for parameter in model.net.parameters()),
                "seconds": seconds,
            }
        )
    return rows


def table(rows: list[Row]) -> str:
    """Markdown table of held-out noise MSE, and of bits per dimension with each variance."""
    variances = ["fixed-small", "fixed-large", "analytic", "learned"]
    lines = [
        "| network predicts | weighting | MSE | MSE, learned | " + " | ".join(variances) + " |",
        "|---|---|---|---|" + "---|" * len(variances),
    ]
    for parameterization, weighting in dict.fromkeys((row["parameterization"], row["weighting"]) for row in rows):
        found = {
            row["variance"]: row
            for row in rows
            if (row["parameterization"], row["weighting"]) == (parameterization, weighting)
        }
        cells = [f"{found[name]['mse']:.3f}" for name in ("fixed-small", "learned")]
        cells += [f"{found[name]['bits_per_dim']:.2f}" for name in variances]
        lines.append(f"| {parameterization} | {weighting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--predict", nargs="+", choices=PARAMETERIZATIONS, default=PARAMETERIZATIONS)
    parser.add_argument("--weightings", nargs="+", choices=WEIGHTINGS, default=WEIGHTINGS)
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps per training run")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step")
    parser.add_argument("--images", type=int, default=128, help="test images for bits/dim")
    parser.add_argument("--jobs", type=int, default=2, help="concurrent training runs, with one thread each")
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    arguments = parser.parse_args()

    repository = Path(__file__).parents[1]
    preset = parameters.load(repository / "params.yaml").model_dump(mode="json")
    preset["shard"]["source"] = str(repository / "data" / "raw" / "digits.npz")
    preset["network"]["base_channels"] = 16
    preset["train"] |= {
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "warmup_steps": arguments.steps // 10,
        "ema": {"kind": "power", "width": 0.05},
        "optimizer": "adamw",
        "decay": "cosine",
        "timesteps": "stored",
    }
    with tempfile.TemporaryDirectory() as directory, ProcessPoolExecutor(arguments.jobs) as pool:
        root = Path(directory)
        params = parameters.validate(preset, "params.yaml")
        (root / "params.yaml").write_text(json.dumps(preset))  # JSON is YAML
        shard_stage.run(params, Paths(root))
        pairs_stage.run(params, Paths(root))
        combinations = [
            {"parameterization": parameterization, "weighting": weighting, "learned_variance": learned}
            for parameterization, weighting, learned in product(arguments.predict, arguments.weightings, [False, True])
        ]
        found = pool.map(partial(measure, root, arguments.images), combinations)
        rows = [row for part in tqdm(found, total=len(combinations), disable=None) for row in part]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(table(rows))
    print(json.dumps({"benchmark": "combinations", "steps": arguments.steps, "rows": rows}))


if __name__ == "__main__":
    main()
