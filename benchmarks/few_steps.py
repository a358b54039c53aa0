"""Distillation: quality of student and teacher by number of steps, for both methods in the same time.

Run it on working trees with data/pairs and models/ddpm, written by `dvc repro` (or `ddpm shard`, `pairs` and `train`):

    python benchmarks/few_steps.py run --tree TREE --data digits --seeds 3 --methods consistency progressive

Every seed distils the teacher anew, by the stage `distill` with the tree's section `distill`, and draws its own noise.
Each method gets `--share` of the CPU time of the training: its number of steps follows from the time of a step of
`train` and of one of its own, both measured once for each file of results. `cpu_seconds` is the time of the whole stage
`distill`, which other processes on the machine lengthen; `train_cpu_seconds` that of the training steps alone. Figures
are means over seeds with 95 % t intervals; those of the teacher vary with the noise alone.
benchmarks/results/few-steps-DATA.json holds

    {"teacher": {"ddim": {"8": {"frechet": [value, low, high], ...}}}, "student": {"2": {...}}, "progressive": {...}}

("student" is the first method), with the runs that they are made of. A run that is in the file is not repeated.
`python benchmarks/few_steps.py show` prints the tables of docs/distillation.md; `latency` times a picture.
"""

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from choices.results import facts
from choices.training import with_assignments
from scipy.stats import t as student_t

from diffusion.distillation.sampling import student_sampling
from diffusion.errors import Stopped
from diffusion.evaluation import distances, few_steps, quality
from diffusion.evaluation.features import trained_features
from diffusion.evaluation.few_steps import STEPS, STUDENT, TEACHER
from diffusion.export import golden, parity, speed
from diffusion.model import load_model
from diffusion.pairs.pairs import Pairs
from diffusion.progress import say
from diffusion.storage.files import write_json
from diffusion.training import loop
from diffusion.training.state import State
from flows import params as parameters
from flows.params import Params
from flows.paths import Paths
from flows.stages import distill, train

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
METRICS = ("frechet", "kid", "precision", "recall", "coverage", "drift")
SHORT, LONG = 10, 60
"""Numbers of steps between which the time of a step is measured."""
NEVER = 10**6
Row = dict[str, Any]


def seconds_per_step(params: Params, root: Path, stage: str) -> float:
    """CPU seconds of a step of a stage, without what it does at its beginning and end."""
    began, take_step = list[float](), loop.step

    def timed(state: State, trainer: loop.Trainer) -> None:
        began.append(time.process_time())
        if len(began) > LONG:
            raise Stopped(signal.SIGTERM)
        take_step(state, trainer)

    section = getattr(params, stage).model_copy(update={"steps": NEVER, "epochs": 0, "preview_every": NEVER})
    with patch.object(loop, "step", timed), suppress(Stopped):
        (train if stage == "train" else distill).run(params.model_copy(update={stage: section}), Paths(root))
    return (began[LONG] - began[SHORT]) / (LONG - SHORT)


def prepared(tree: Path, root: Path) -> Path:
    """A working tree that shares data and teacher with `tree`, and nothing else."""
    (root / "models").mkdir(parents=True)
    (root / "data").symlink_to((tree / "data").resolve())
    (root / "models" / "ddpm").symlink_to((tree / "models" / "ddpm").resolve())
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{root.absolute()}/mlflow.db"
    return root


def train_seconds(params: Params, tree: Path) -> float:
    """CPU seconds of all training steps of the teacher, extrapolated; no previews."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "data").symlink_to((tree / "data").resolve())
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{directory}/mlflow.db"
        steps = params.train.for_images(Pairs(Paths(root).pairs, "train").images).steps
        return seconds_per_step(params, root, "train") * steps


def affordable_steps(params: Params, tree: Path, method: str, budget: float) -> int:
    """How many steps of a method take `budget` CPU seconds."""
    params = with_assignments(params.model_dump(mode="json"), f"distill.method={method}")
    with tempfile.TemporaryDirectory() as directory:
        root = prepared(tree, Path(directory) / "tree")
        return max(1, math.floor(budget / seconds_per_step(params, root, "distill")))


def measure(params: Params, tree: Path, method: str, seed: int, steps: int, samples: int) -> Row:
    """Distil with a method in `steps` steps, and measure samples of student and teacher."""
    params = with_assignments(params.model_dump(mode="json"), f"seed={seed} distill.method={method}")
    with tempfile.TemporaryDirectory() as directory:
        root = prepared(tree, Path(directory) / "tree")
        section = params.distill.model_copy(update={"steps": steps, "preview_every": NEVER})
        params = params.model_copy(update={"distill": section})
        began = time.process_time()
        distill.run(params, Paths(root))
        seconds = time.process_time() - began
        student = load_model(Paths(root, student=True).model, CPU)
    teacher, pairs = load_model(Paths(tree).model, CPU), Paths(tree).pairs
    splits = [Pairs(pairs, split) for split in ("train", "val", "test")]
    real = quality.references(samples, splits[0], splits[1:])
    guided = params.sample.model_copy(update={"guidance": params.distill.guidance})
    models = (
        (TEACHER, teacher, lambda count: few_steps.teacher_sampling(guided, count)),
        (STUDENT, student, lambda count: student_sampling(params.sample, count)),
    )
    drawings = few_steps.draw(models, STEPS, seed, CPU, real.others.labels, lambda: None)
    features = trained_features(splits[0], Paths(tree).features)
    reference = features(real.pool.pixels)[real.n :]
    drifts = few_steps.drift(drawings, np.ones((1, real.n), np.int64))
    found: Row = {TEACHER: {}, STUDENT: {}}
    for each, (drift, _, _) in zip(drawings, drifts, strict=True):
        x = features(each.drawn.samples.pixels)
        near = distances.neighbours(x, reference)
        figures = {"frechet": distances.frechet(x, reference), "kid": distances.kid(x, reference)}
        figures |= {name: getattr(near, name) for name in ("precision", "recall", "coverage")}
        found[each.model][str(each.drawn.options.steps)] = {
            **{name: float(np.mean(values)) for name, values in figures.items()},
            "drift": drift,
        }
    return {"method": method, "seed": seed, "steps": steps, "cpu_seconds": round(seconds, 1), "samples": real.n} | found


def interval(values: Sequence[float]) -> list[float | None]:
    """Mean, and the ends of its 95 % t interval, which a single value does not have."""
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return [round(mean, 4), None, None]
    half = float(student_t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return [round(value, 4) for value in (mean, mean - half, mean + half)]


def shown(found: Sequence[float | None], digits: int, sign: str = "") -> str:
    """An interval as mean ± half its width."""
    mean, _, high = found
    assert mean is not None
    return f"{mean:{sign}.{digits}f}" + ("" if high is None else f" ± {high - mean:.{digits}f}")


def summarized(runs: Sequence[Row]) -> Row:
    """The figures of teacher and students, by number of steps, over the seeds."""

    def of(chosen: Sequence[Row], model: str) -> Row:
        return {
            steps: {name: interval([run[model][steps][name] for run in chosen]) for name in METRICS}
            for steps in chosen[0][model]
        }

    methods = list(dict.fromkeys(run["method"] for run in runs))
    by_method = {method: [run for run in runs if run["method"] == method] for method in methods}
    named = {
        STUDENT if number == 0 else method: of(by_method[method], STUDENT) for number, method in enumerate(methods)
    }
    return {"teacher": {"ddim": of(by_method[methods[0]], TEACHER)}} | named


def run(arguments: argparse.Namespace) -> None:
    """Measure what is missing in the file of results."""
    out = RESULTS / f"few-steps-{arguments.data}.json"
    params = parameters.load(Paths(arguments.tree).params)
    params = with_assignments(params.model_dump(mode="json"), " ".join(arguments.set))
    torch.set_num_threads(1)
    document: Row = json.loads(out.read_text()) if out.exists() else {}
    document.setdefault("runs", [])
    steps = document.setdefault("steps", {})
    if "train_cpu_seconds" not in document:
        document["train_cpu_seconds"] = round(train_seconds(params, arguments.tree), 1)
    budget = arguments.share * document["train_cpu_seconds"]
    about = {"data": arguments.data, "share": arguments.share} | facts()
    about["distill"] = params.distill.model_dump(mode="json", exclude={"steps"})
    if changed := [name for name in ("share", "distill") if name in document and document[name] != about[name]]:
        sys.exit(f"{out}: its runs were made with another {' and '.join(changed)}; delete it to measure anew")
    for seed in range(arguments.seeds):
        for method in arguments.methods:
            if any((each["method"], each["seed"]) == (method, seed) for each in document["runs"]):
                continue
            if method not in steps:
                steps[method] = affordable_steps(params, arguments.tree, method, budget)
            row = measure(params, arguments.tree, method, seed, steps[method], arguments.samples)
            document["runs"].append(row | {"commit": about["commit"]})
            write_json(out, about | document | summarized(document["runs"]))
            own = {count: round(figures["frechet"], 3) for count, figures in row[STUDENT].items()}
            say(f"{arguments.data}, {method}, seed {seed}: {row['steps']} steps, {row['cpu_seconds']} s, Fréchet {own}")


def show(arguments: argparse.Namespace) -> None:  # noqa: ARG001 (as the other commands)
    """Print the tables, one for each file of results."""
    for file in sorted(RESULTS.glob("few-steps-*.json")):
        document = json.loads(file.read_text())
        runs = document["runs"]
        seeds, samples = len({each["seed"] for each in runs}), runs[0]["samples"]
        share = np.median([each["cpu_seconds"] for each in runs]) / document["train_cpu_seconds"]
        methods = {name: document[name] for name in document if name in (STUDENT, "progressive")}
        heads = ["teacher, DDIM", *(name if name != STUDENT else "consistency" for name in methods)]
        print(f"\n{document['data']}, {seeds} seeds, {samples} samples each, {share:.0%} of the training's time\n")
        print("| steps | " + " | ".join(f"{head}: Fréchet | recall | drift" for head in heads) + " |")
        print("|---" * (1 + 3 * len(heads)) + "|")
        for steps in document["teacher"]["ddim"]:
            cells = []
            for figures in (document["teacher"]["ddim"], *methods.values()):
                for name, digits in (("frechet", 2), ("recall", 2), ("drift", 1)):
                    cells.append(shown(figures[steps][name], digits))
            print(f"| {steps} | " + " | ".join(cells) + " |")
        for own, others in ((2, 8), (1, 4)):
            pairs = [run for run in runs if run["method"] == runs[0]["method"]]
            differences = [run[STUDENT][str(own)]["frechet"] - run[TEACHER][str(others)]["frechet"] for run in pairs]
            difference = shown(interval(differences), 2, "+")
            print(f"\nstudent in {own} - teacher in {others}, from the same noise: {difference}")


def latency(arguments: argparse.Namespace) -> None:
    """Time a single picture from the sampler.onnx of student and teacher, taking turns."""
    makers = dict[str, Callable[[], object]]()
    for name, paths, counts in (
        (STUDENT, Paths(arguments.tree, student=True), (1, 2, 4)),
        (TEACHER, Paths(arguments.tree), (10,)),
    ):
        session = parity.session(paths.sampler.read_bytes(), CPU)
        facts = session.get_modelmeta().custom_metadata_map
        for steps in counts:
            own = {"ddpm.steps": str(steps)}
            feed = golden.inputs(golden.names(session), facts | own, golden.SEED, 1)
            makers[f"{name}, {facts['ddpm.sampler']}, {steps}"] = partial(session.run, ["images"], feed)
    taken: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(arguments.turns + 1):
        for name, make in makers.items():
            time.sleep(speed.PAUSE_SECONDS)
            make()
            began = time.perf_counter()
            make()
            taken[name].append(1000 * (time.perf_counter() - began))
    print("| sampler.onnx, steps | ms, single picture | 10 to 90 % |\n|---|---|---|")
    for name, values in taken.items():
        low, middle, high = np.quantile(values[1:], [0.1, 0.5, 0.9])
        print(f"| {name} | {middle:.1f} | {low:.1f} to {high:.1f} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="distil and measure", description=run.__doc__)
    running.add_argument("--tree", type=Path, default=Path(), help="working tree with params.yaml, data and models")
    running.add_argument("--data", required=True, help="name of the data set, for the file of results")
    running.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    running.add_argument("--methods", nargs="+", default=["consistency"], choices=["consistency", "progressive"])
    running.add_argument("--samples", type=int, default=512, help="samples of each, at most (default: %(default)s)")
    running.add_argument("--share", type=float, default=0.2, help="of the training's time (default: %(default)s)")
    running.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other parameters than the tree's")
    running.set_defaults(call=run)
    showing = commands.add_parser("show", help="print the tables", description=show.__doc__)
    showing.set_defaults(call=show)
    timing = commands.add_parser("latency", help="time single pictures", description=latency.__doc__)
    timing.add_argument("--tree", type=Path, default=Path(), help="working tree with models/onnx and student-onnx")
    timing.add_argument("--turns", type=int, default=50, help="pictures of each (default: %(default)s)")
    timing.set_defaults(call=latency)
    arguments = parser.parse_args()
    arguments.call(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
