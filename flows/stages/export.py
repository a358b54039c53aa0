"""Stage export: the model as ONNX graphs, verified in ONNX Runtime against PyTorch before they are written."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime import InferenceSession

from diffusion.errors import UserError, counted
from diffusion.export import denoiser, digest, golden, metadata, parity, ranges, sampler_graph, speed, variants
from diffusion.model import WEIGHTS, load_model
from diffusion.nn import build as networks
from diffusion.pairs.pairs import MANIFEST, Pairs
from diffusion.progress import say, working
from diffusion.sampling.build import SampleOptions, sampling_timesteps
from diffusion.storage.files import new_directory, sha256, write_atomic, write_json
from flows import made_with, tracking
from flows.cards import card
from flows.pages.contents import read_scores
from flows.params import Params
from flows.paths import Paths
from flows.rules import exported

USAGE = """
import numpy as np
import onnxruntime as ort

sampler = ort.InferenceSession("sampler.onnx", providers=["CPUExecutionProvider"])
print([(each.name, each.type, each.shape) for each in sampler.get_inputs()])  # models with classes have more
shape = sampler.get_inputs()[0].shape[1:]  # (C, H, W)
noise = np.random.default_rng(7).standard_normal((16, *shape), np.float32)
images = sampler.run(["images"], {"noise": noise, "steps": np.array([0])})[0]  # uint8 (16, H, W, C)
"""
"""For the model card."""


def run(params: Params, paths: Paths) -> None:
    """Export, verify and write the graphs of the trained model."""
    write(params, paths, exported(params))


def write(params: Params, paths: Paths, sample: SampleOptions) -> None:
    """Export, verify and write the graphs of a model, `sample` being the options of sampler.onnx.

    If a check fails, no file is left behind.
    """
    device, export = networks.device(params.device), params.export
    required = params.device != "auto"
    model, pairs = load_model(paths.model, torch.device("cpu")), Pairs(paths.pairs, "test")
    pairs.check_process(model.process.schedule.alpha_bar.numpy(), model.shape)
    sampling_timesteps(sample, model.process.schedule)  # reject invalid options early
    val = Pairs(paths.pairs, "val")
    variants.require_calibration(export.variants, val)
    card.render(paths, paths.model, card.Form("onnx", {}, USAGE))  # and what the team has written
    weights = sha256(paths.model / WEIGHTS)
    measured = scores(paths, weights, pairs.digest)
    facts = metadata.of_model(model, sample.variance, weights, sha256(paths.pairs / MANIFEST), measured)
    stage = paths.stage("export")
    with working(f"{stage}: tracing the network"):
        step = denoiser.to_onnx(model, export.opset)
    graphs = {"fp32": step}
    for variant in export.variants:
        with working(f"{stage}: building the variant {variant}"):
            graphs[variant] = variants.build(variant, model, step, export.opset, val)
    contents, report, sessions = dict[Path, bytes](), dict[str, Any](), dict[str, InferenceSession]()
    try:
        for name, graph in graphs.items():
            facts["ddpm.precision"] = name
            one, whole = paths.denoiser_in(name), paths.sampler_in(name)
            with working(f"{stage}: building {one.name} and {whole.name}"):
                loop = sampler_graph.to_onnx(graph, model, sample)
                contents[one] = finished(one.name, graph, facts)
                contents[whole] = finished(whole.name, loop, facts | metadata.of_sampler(sample, loop))
                sessions[name] = parity.session(contents[one], device, required)
            if name == "fp32":
                report["denoiser"] = parity.check_denoiser(sessions[name], model, pairs, export.tolerance, stage)
                with working(f"{stage}: comparing the pictures of {whole.name} with torch's"):
                    sampler = parity.session(contents[whole], device, required)
                    report["sampler"] = parity.check_sampler(sampler, model, sample)
            else:
                mse = report["denoiser"]["mse"]
                with working(f"{stage}: scoring {one.name} on the held-out pairs"):
                    report[name] = variants.check(name, sessions[name], pairs, mse, export.max_loss)._asdict()
    except UserError:
        shutil.rmtree(paths.onnx, ignore_errors=True)
        paths.export_report.unlink(missing_ok=True)
        raise
    report["bytes"] = {path.stem: len(content) for path, content in contents.items()}
    files = {path.name: hashlib.sha256(content).hexdigest() for path, content in contents.items()}
    text = card.render(paths, paths.model, card.Form("onnx", files, USAGE))
    with new_directory(paths.onnx) as temporary:
        for path, content in contents.items():
            write_atomic(temporary / path.name, content)
        write_atomic(temporary / paths.card.name, text.encode())
    write_json(paths.export_report, report)
    made_with.write(paths, "export", params)
    with working(f"{stage}: measuring the speed, recording the model in MLflow"):
        times = speed.measure(sessions)
        tracking.record(params, paths, speed=times)
    log_summary(paths, report, sessions["fp32"].get_providers()[0], times)


def log_summary(paths: Paths, report: dict[str, Any], provider: str, times: dict[str, dict[str, float]]) -> None:
    """Log what was written, its accuracy, and the speed of the variants in `times`."""
    stage = paths.stage("export")
    size = {name: report["bytes"][paths.sampler_in(name).stem] / 1e6 for name in times}
    largest, pairs = report["denoiser"]["max_difference"], report["denoiser"]["pairs"]
    say(
        f"{stage}: {paths.denoiser} and {paths.sampler} ({size['fp32']:.1f} MB each); maximum difference from PyTorch "
        f"{largest:.1e} on {counted(pairs, 'held-out pair')} ({provider})"
    )
    for name in list(times)[1:]:
        alone, joined = (times["fp32"][key] / times[name][key] for key in times[name])
        say(
            f"{stage}: {paths.denoiser_in(name)} and {paths.sampler_in(name)} "
            f"({size[name]:.1f} MB each); MSE {report[name]['loss']:+.2%} compared with float32; a network "
            f"evaluation is {alone:.1f} times as fast as in float32 for a single image, {joined:.1f} times in batches "
            f"of {speed.BATCHES[-1]}"
        )


def finished(name: str, graph: onnx.ModelProto, facts: dict[str, str]) -> bytes:
    """Add input checks, metadata, a golden test and a digest; deterministic for the same weights and CPU.

    The golden test is recorded on the CPU, since a GPU may select kernels by their measured speed.
    """
    whole = onnx.ModelProto()
    whole.CopyFrom(graph)
    try:
        names, classes = [value.name for value in graph.graph.input], json.loads(facts["ddpm.classes"])
        allowed = ranges.of_inputs(names, int(facts["ddpm.num_timesteps"]), len(classes))
        ranges.require_inputs(whole.graph, allowed)
        onnx.checker.check_model(whole, full_check=True)
        session = parity.session(whole.SerializeToString(), torch.device("cpu"))
        checks = {"ddpm.ranges": json.dumps(allowed), "ddpm.golden": golden.record(session, facts)}
        metadata.describe(whole, facts | checks)
    except Exception as error:  # onnx and ONNX Runtime have a dozen exceptions without a common base
        raise UserError(f"{name}: the graph cannot be run ({golden.brief(error)}); no model was written") from None
    return digest.seal(whole.SerializeToString(deterministic=True))


def scores(paths: Paths, weights_sha256: str, pairs_sha256: str) -> dict[str, Any]:
    """What evaluate measured for these weights on these pairs; empty if it did not.

    Raises:
        UserError: the report does not match its digest.
    """
    found = read_scores(paths, weights_sha256)
    return found["figures"] if found["scored"].get("pairs_sha256") == pairs_sha256 else {}
