"""evaluate: the model's noise prediction on the test pairs, and samples."""

import hashlib
from collections.abc import Iterator

from diffusion import tracking
from diffusion.data.pairs import Pairs
from diffusion.evaluation import noise_prediction, plots, report, wiener
from diffusion.evaluation.heldout import Prediction, predictions
from diffusion.evaluation.samples import draw_samples, grid_png
from diffusion.files import new_directory, read_csv, sha256, write_atomic, write_csv, write_json
from diffusion.model import WEIGHTS, load_model
from diffusion.nn import build as networks
from diffusion.params import Params, Sample
from diffusion.paths import Paths
from diffusion.progress import Progress, say


def run(params: Params, paths: Paths) -> None:
    """Score the model on all test pairs, beside the baselines, and draw samples from it."""
    device = networks.device(params.device)
    model = load_model(paths.model, device)
    pairs = Pairs(paths.pairs, "test")
    pairs.check_process(model.config.process.schedule, model.config.process.num_timesteps, model.shape)
    T = model.process.schedule.num_timesteps

    with Progress("evaluate", pairs.images * pairs.manifest.heldout_draws, "pairs") as progress:

        def counted() -> Iterator[Prediction]:
            for prediction in predictions(model.net, model.process, pairs, device):
                yield prediction
                progress.advance(len(prediction.t))

        baseline = wiener.fit(Pairs(paths.pairs, "train"))
        sums = noise_prediction.collect(counted(), pairs.images, model.process.schedule, baseline)
    overall, bands = noise_prediction.summarize(sums, params.seed, params.evaluate.resamples, T)
    curve = noise_prediction.curve(sums, T)

    samples = draw_samples(model.net, model.process, model.shape, params.sample, params.seed, device)
    pictures = {"mse_by_t": plots.mse_by_t(curve), "samples": grid_png(samples)}
    pictures["training"] = plots.training(
        read_csv(paths.train_curves / "loss.csv"), read_csv(paths.train_curves / "heldout.csv")
    )
    page = report.page(
        overall,
        bands,
        by_t=pictures["mse_by_t"],
        training=pictures["training"],
        samples=pictures["samples"],
        how=describe(params.sample, params.seed),
    )
    with new_directory(paths.evaluation) as temporary:
        write_csv(temporary / "bands.csv", bands)
        write_csv(temporary / "mse_by_t.csv", curve)
        for name, png in pictures.items():
            write_atomic(temporary / f"{name}.png", png)
        scored_on = hashlib.sha256(pairs.manifest.splits["test"].model_dump_json().encode()).hexdigest()
        digests = {"weights_sha256": sha256(paths.model / WEIGHTS), "pairs_sha256": scored_on}
        write_json(temporary / "scored.json", digests)
    write_atomic(paths.report, page.encode())
    write_json(paths.evaluate_report, overall)
    say(
        f"evaluate: noise MSE {overall['mse']:.4f} ({overall['mse_low']:.4f} – {overall['mse_high']:.4f}), "
        f"R² {overall['r2']:.4f}, linear baseline {overall['wiener_mse']:.4f}, on {overall['pairs']} test pairs"
    )
    tracking.record(params, paths)


def describe(options: Sample, seed: int) -> str:
    """How the samples were made, in a sentence."""
    name = f"DDIM with eta = {options.eta:g}" if options.sampler == "ddim" else "Ancestral sampling"
    return f"{name}, {options.steps} steps, EMA weights, seed {seed}; none was left out."
