"""What to choose: models trained with one change at a time, and samples of a model with one change at a time.

    python benchmarks/choosing.py train --seeds 0 1 2
    python benchmarks/choosing.py sample --tree TREE --data digits --seeds 0 1 2

Each run is a line of benchmarks/results/choosing-digits.jsonl or samplers-DATA.jsonl; those that are there already are
not repeated. TREE is a working tree in which a preset was trained (`ddpm preset NAME`, `dvc repro`).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # in case the project is not installed

from choices import results, sampling, training
from choices.results import ROOT

from diffusion.errors import UserError

RESULTS = ROOT / "benchmarks" / "results"


def train(arguments: argparse.Namespace) -> None:
    """Train the variants that have no row yet."""
    rows = results.read(arguments.out)
    finished = {(row["variant"], row["seed"], row["steps"]) for row in rows}
    with tempfile.TemporaryDirectory() as directory:
        runs = [
            training.Run(group, variant, seed, arguments.steps, arguments.images, arguments.samples, Path(directory))
            for seed in arguments.seeds
            for group in arguments.only
            for variant in training.GROUPS[group]
        ]
        runs = [run for run in runs if run.key not in finished]
        if arguments.list:
            for run in runs:
                print(f"{run.group}: {run.variant or 'the default parameters'}, seed {run.seed}, {run.steps} steps")
            return
        training.prepare(runs)
        results.run_all(runs, training.measure, arguments.jobs, arguments.out)


def sample(arguments: argparse.Namespace) -> None:
    """Draw the sets of samples that have no row yet, and the pictures that are missing."""
    out = arguments.out or RESULTS / f"samplers-{arguments.data}.jsonl"
    rows, tree, base = results.read(out), arguments.tree.resolve(), " ".join(arguments.set)
    finished = {(row["set"], json.dumps(row["change"], sort_keys=True), row["seed"], row["samples"]) for row in rows}
    model = sampling.opened(tree, arguments.samples).model
    changes = sampling.settings(
        sampling.sample_section(tree, base),
        arguments.only,
        arguments.steps,
        bool(model.num_classes),
        model.config.process.learned_variance,
    )
    draws = [
        sampling.Draw(tree, arguments.data, base, change, seed, arguments.samples)
        for seed in arguments.seeds
        for change in changes
    ]
    runs = [draw for draw in draws if draw.key not in finished]
    if arguments.list:
        for draw in runs:
            print(f"{draw.change}, seed {draw.seed}, {draw.samples} samples")
        return
    results.run_all(runs, sampling.measure, arguments.jobs, out)
    for draw in draws[: len(changes)]:
        if json.loads(draw.change).keys() <= {"sampler", "steps"}:
            sampling.save_picture(draw, out.with_suffix(""))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = found.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default 0 1 2)")
    common.add_argument("--samples", type=int, default=256, help="samples per run (default %(default)s)")
    common.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each (default %(default)s)")
    common.add_argument("--list", action="store_true", help="print the runs that would be done, and do nothing")
    of_train = commands.add_parser("train", parents=[common], help="train variants of the default parameters")
    of_train.add_argument("--only", nargs="+", choices=training.GROUPS, default=list(training.GROUPS), help="groups")
    of_train.add_argument("--steps", type=int, default=500, help="optimizer steps (default %(default)s)")
    of_train.add_argument("--images", type=int, default=256, help="test images for bits/dim, at most (default 256)")
    of_train.add_argument("--out", type=Path, default=RESULTS / "choosing-digits.jsonl", help="(default %(default)s)")
    of_train.set_defaults(run=train)
    of_sample = commands.add_parser("sample", parents=[common], help="sample with variants of the sampling options")
    of_sample.add_argument("--tree", type=Path, required=True, help="working tree with data/pairs and models/ddpm")
    of_sample.add_argument("--data", required=True, help="name of the data, for the results")
    of_sample.add_argument("--only", nargs="+", choices=sampling.GROUPS, default=sampling.GROUPS, help="groups")
    of_sample.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=sampling.STEPS,
        help="steps of each sampler (default %(default)s; above 100 for ddpm alone)",
    )
    of_sample.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change the tree's parameters")
    of_sample.add_argument("--out", type=Path, help="(default benchmarks/results/samplers-DATA.jsonl)")
    of_sample.set_defaults(run=sample)
    return found


def main() -> int:
    arguments = parser().parse_args()
    torch.set_num_threads(1)  # as in each run, for the same features
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"choosing.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
