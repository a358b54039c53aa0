"""Stage evaluate: noise prediction on the validation and test pairs, likelihood of the test images, and samples.

Models are selected by their validation error; everything reported about the selected model is measured on test.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.errors import counted
from diffusion.evaluation import histograms, likelihood, noise_prediction, plots, quality, samplers, sets, wiener
from diffusion.evaluation.features import Features, chosen_features, trained_features
from diffusion.evaluation.filmstrip import frames, noising
from diffusion.evaluation.heldout import Prediction, predictions
from diffusion.evaluation.likelihood import Draws
from diffusion.evaluation.quality import Quality
from diffusion.model import WEIGHTS, Model, load_model
from diffusion.nn import build as networks
from diffusion.pairs.noise import BLOCK
from diffusion.pairs.pairs import Pairs
from diffusion.pairs.pixels import visible
from diffusion.progress import Progress, say, working
from diffusion.samples import draw_samples, grid_png
from diffusion.sampling.build import SampleOptions, sampling_timesteps
from diffusion.storage.files import (
    new_directory,
    parse_csv,
    read_checked,
    sha256,
    write_atomic,
    write_csv,
    write_json,
    write_sums,
)
from flows import baselines, made_with, tracking
from flows.pages import contents, report
from flows.params import Params
from flows.paths import Paths
from flows.rules import laid_over


def run(params: Params, paths: Paths) -> None:
    """Score the model and the baselines on all held-out pairs, bound its likelihood, and generate samples."""
    device = networks.device(params.device)
    model = load_model(paths.model, device)
    train, pairs, val = Pairs(paths.pairs, "train"), Pairs(paths.pairs, "test"), Pairs(paths.pairs, "val")
    pairs.check_process(model.process.schedule.alpha_bar.numpy(), model.shape)
    names = ("loss.csv", "heldout.csv") if paths.train_curves.exists() else ()  # an imported model has none
    curves = [parse_csv(read_checked(paths.train_curves / name)) for name in names]
    contents.read_inputs(paths)  # rejects damaged files before scoring
    steps = len(sampling_timesteps(params.sample, model.process.schedule))  # rejects invalid options before scoring
    for options in settings(params):
        sampling_timesteps(options, model.process.schedule)
        model.sampler(options)
    chosen, features = params.evaluate, None
    if chosen.quality_samples:  # a wrong file is refused before scoring
        features = chosen_features(paths.root, chosen.features, chosen.features_sha256, model.shape)
    with working("evaluate: fitting the linear baseline"):
        baseline = wiener.fit(train)
    overall, tables = score(params, model, device, pairs, val, train, baseline)
    with Progress("evaluate", steps, "steps") as progress:
        samples = draw_samples(
            model, params.sample, params.seed, device, lambda: progress.advance(1, "drawing samples")
        )
    measured, compared = compare(params, paths, model, device, (train, val, pairs), features)
    with working("evaluate: drawing the filmstrip and the plots"):
        pictures = {
            "mse_by_t": plots.mse_by_t(tables["mse_by_t"]),
            "vlb_by_t": plots.vlb_by_t(tables["vlb_by_t"]),
            "samples": grid_png(visible(samples, params.evaluate.shown_channels)),
            "heldout": grid_png(visible(first_images(pairs, len(samples)), params.evaluate.shown_channels)),
            "noising": plots.noising(noising(pairs, model.process.schedule, params.evaluate.shown_channels)),
            "filmstrip": plots.filmstrip(
                frames(model, params.sample, params.seed, device, params.evaluate.shown_channels)
            ),
        }
        if curves:
            pictures["training"] = plots.training(*curves)
        if measured:
            pictures["nearest"] = measured.picture
            overall |= measured.report
    write_json(paths.evaluate_report, overall)  # before scored.json, which has its digest
    with new_directory(paths.evaluation) as temporary:
        for name, rows in tables.items():
            write_csv(temporary / f"{name}.csv", rows)
        if measured:
            write_csv(temporary / "quality.csv", [figure._asdict() for figure in measured.figures])
        if compared:
            write_csv(temporary / "samplers.csv", compared)
        for name, png in pictures.items():
            write_atomic(temporary / f"{name}.png", png)
        digests = {"weights_sha256": sha256(paths.model / WEIGHTS), "pairs_sha256": pairs.digest}
        digests["val_pairs_sha256"] = val.digest
        write_json(temporary / "scored.json", digests | {"report_sha256": sha256(paths.evaluate_report)})
        write_sums(temporary)
    about = made_with.flat(params, "seed", "sample", "evaluate")
    page = report.page(contents.read(paths), about, made_with.flat(Params()))
    write_atomic(paths.report, page.encode())
    made_with.write(paths, "evaluate", params)
    for split in (val, pairs):
        if split.images == 1:
            say(
                f"evaluate: {split.split} has one image, whose figures have no interval; give it more (for example by "
                f"shard.{split.split}_fraction)"
            )
    with working("evaluate: recording the results in MLflow"):
        tracking.record(params, paths)
    say(
        f"evaluate: noise MSE {overall['mse']:.4f} ({overall['mse_low']:.4f} – {overall['mse_high']:.4f}), "
        f"R² {overall['r2']:.4f}, linear baseline {overall['wiener_mse']:.4f}, on "
        f"{counted(overall['pairs'], 'test pair')} (val {overall['val_mse']:.4f} ± {overall['val_mse_se']:.4f}); "
        f"{overall['bits_per_dim']:.4f} ± {overall['bits_per_dim_se']:.4f} bits/dim (bound, ± standard error) "
        f"on {counted(overall['bits_per_dim_images'], 'image')}, {baselines.verdict(overall)}"
    )
    if measured:
        word, reason = measured.verdict
        say(f"evaluate: samples: {word}; {reason}, at {overall['quality_images']} images each")


def compare(
    params: Params,
    paths: Paths,
    model: Model,
    device: torch.device,
    splits: tuple[Pairs, Pairs, Pairs],
    features: Features | None,
) -> tuple[Quality | None, list[dict[str, Any]]]:
    """Compare samples with real images of train, val and test; None if that is turned off, or there are too few.

    Also returns the rows of samplers.csv, if `evaluate.samplers` lists settings.
    """
    wanted, (train, *held_out) = params.evaluate.quality_samples, splits
    if not wanted:
        return None, []
    with working("evaluate: choosing real images to compare samples with"):
        real = quality.references(wanted, train, held_out)
    if real.n < quality.MIN_IMAGES:
        say(
            f"evaluate: samples are not compared with real images, which takes {quality.MIN_IMAGES} held-out images "
            "and twice as many for training"
            + ("; so evaluate.samplers cannot be compared either" if params.evaluate.samplers else "")
        )
        return None, []
    features = features or trained_features(train, paths.features)
    wanted_settings = settings(params)
    steps = [len(sampling_timesteps(options, model.process.schedule)) for options in wanted_settings]
    note = f"drawing {real.n} samples to compare with real images"
    if len(steps) > 1:
        note += f", in each of {len(steps)} settings"
    with Progress("evaluate", sets.batches(real.n) * sum(steps), "steps") as progress:
        drawn = [
            samplers.draw(model, options, params.seed, device, real.others.labels, lambda: progress.advance(1, note))
            for options in wanted_settings
        ]
    with working("evaluate: comparing samples with real images"):
        first, *others = [each.samples for each in drawn]
        options = params.evaluate
        found = quality.measure(real, first, features, options.resamples, options.shown_channels, others)
    return found, samplers.table(drawn, [found.of_samples, *found.others]) if others else []


def settings(params: Params) -> list[SampleOptions]:
    """The section `sample`, then the settings in `evaluate.samplers`."""
    return [params.sample, *(laid_over(params.sample, changes) for changes in params.evaluate.samplers)]


def score(
    params: Params, model: Model, device: torch.device, test: Pairs, val: Pairs, train: Pairs, baseline: wiener.Wiener
) -> tuple[dict[str, float], dict[str, list[dict[str, float]]]]:
    """Compute the metrics of the report from the held-out pairs and the terms of the bound, and its tables by name."""
    T, options = model.process.schedule.num_timesteps, params.evaluate
    variance = model.variance(params.sample.variance)
    cheap = Draws(min(options.likelihood_images, test.images), likelihood.strata(T), params.seed)
    whole = Draws(min(options.exact_likelihood_images, test.images), likelihood.every_timestep(T), params.seed)
    scored = (test.images + val.images) * test.manifest.heldout_draws
    with working("evaluate: counting the values of the images"):
        values = histograms.values_of((train, val, test))
        baselines = histograms.bits(train, test, cheap.images, values)
    with Progress("evaluate", scored + cheap.terms + whole.terms, "pairs") as progress:

        def counted(split: Pairs) -> Iterator[Prediction]:
            for prediction in predictions(model, split, device):
                yield prediction
                progress.advance(len(prediction.t))

        sums = noise_prediction.collect(counted(test), test.images, model.process.schedule, baseline)
        val_errors = noise_prediction.by_image(counted(val), val.images)
        estimate, exact = (
            likelihood.measure(model, variance, test, draws, device, progress.advance, values)
            for draws in (cheap, whole)
        )
    with working("evaluate: bootstrapping the confidence intervals"):
        overall, bands = noise_prediction.summarize(sums, params.seed, options.resamples, T)
    overall |= likelihood.mean("val_mse", val_errors) | likelihood.summarize(estimate, exact)
    overall |= histograms.compare(estimate.total, baselines) | {"bits_per_dim_values": len(values)}
    return overall, {
        "bands": bands,
        "mse_by_t": noise_prediction.curve(sums, T),
        "vlb_by_t": likelihood.curve(exact),
        "val_errors": [{"image": image, "mse": mse} for image, mse in enumerate(val_errors.tolist())],
        "bits_per_dim": [{"image": i, "bits_per_dim": bits} for i, bits in enumerate(estimate.total.tolist())],
    }


def first_images(pairs: Pairs, count: int) -> NDArray[np.uint8]:
    """The first images of a split, (n, C, H, W), at most `count`."""
    blocks = range(min(pairs.blocks, -(-count // BLOCK)))
    return np.concatenate([pairs.x_0(block) for block in blocks])[:count]
