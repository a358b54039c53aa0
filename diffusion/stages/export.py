"""export: the model as two ONNX graphs, checked in ONNX Runtime against torch before they count as written."""

import json
import shutil
from typing import Any

import onnx
import torch

from diffusion import tracking
from diffusion.data.pairs import MANIFEST, Pairs
from diffusion.errors import UserError
from diffusion.export import denoiser, golden, metadata, parity, sampler_graph
from diffusion.files import new_directory, sha256, write_atomic, write_json
from diffusion.model import WEIGHTS, load_model
from diffusion.nn import build as networks
from diffusion.params import Params
from diffusion.paths import Paths
from diffusion.progress import say


def run(params: Params, paths: Paths) -> None:
    """Export, check and write; if a check fails, no file is left behind."""
    device, export = networks.device(params.device), params.export
    model, pairs = load_model(paths.model, torch.device("cpu")), Pairs(paths.pairs, "test")
    pairs.check_process(model.process.schedule.alpha_bar.numpy(), model.shape)
    if export.steps > model.process.schedule.num_timesteps:
        raise UserError(
            f"export.steps ({export.steps}) exceeds the model's num_timesteps ({model.process.schedule.num_timesteps})"
        )
    settings = {"sampler": export.sampler, "steps": export.steps, "spacing": export.spacing}
    sample = params.sample.model_copy(update=settings)
    weights = sha256(paths.model / WEIGHTS)
    measured = scores(paths, weights, pairs.digest)
    facts = metadata.of_model(model, sample.variance, weights, sha256(paths.pairs / MANIFEST), measured)
    step = denoiser.to_onnx(model, export.opset)
    loop = sampler_graph.to_onnx(step, model, sample)
    try:
        contents = {
            paths.denoiser: finished("denoiser.onnx", step, facts),
            paths.sampler: finished("sampler.onnx", loop, facts | metadata.of_sampler(sample, loop)),
        }
        one, whole = (parity.session(content, device) for content in contents.values())
        report: dict[str, Any] = {
            "denoiser": parity.check_denoiser(one, model, pairs, export.tolerance),
            "sampler": parity.check_sampler(whole, model, sample),
        }
    except UserError:
        shutil.rmtree(paths.onnx, ignore_errors=True)
        paths.export_report.unlink(missing_ok=True)
        raise
    with new_directory(paths.onnx) as temporary:
        for path, content in contents.items():
            write_atomic(temporary / path.name, content)
            report[path.stem]["bytes"] = len(content)
    write_json(paths.export_report, report)
    say(
        f"export: {paths.denoiser} and {paths.sampler} ({sum(map(len, contents.values())) / 1e6:.1f} MB), at most "
        f"{report['denoiser']['max_difference']:.1e} from torch on {report['denoiser']['pairs']} held-out pairs, by "
        f"{one.get_providers()[0]}"
    )
    tracking.record(params, paths)


def finished(name: str, graph: onnx.ModelProto, facts: dict[str, str]) -> bytes:
    """A graph with its facts and its golden test, checked; the same bytes for the same weights on the same CPU.

    The golden test is made on the CPU: kernels of a GPU may be chosen by how fast they happened to be.
    """
    try:
        onnx.checker.check_model(graph, full_check=True)
        session = parity.session(graph.SerializeToString(), torch.device("cpu"))
        metadata.describe(graph, facts | {"ddpm.golden": golden.made(session, facts)})
    except Exception as error:  # onnx and ONNX Runtime have a dozen kinds, with nothing in common
        raise UserError(f"{name}: the graph cannot be run ({golden.brief(error)}); no model was written") from None
    return graph.SerializeToString(deterministic=True)


def scores(paths: Paths, weights_sha256: str, pairs_sha256: str) -> dict[str, Any]:
    """What evaluate measured of these weights on these pairs; nothing if it did not."""
    scored = paths.evaluation / "scored.json"
    if not scored.exists() or not paths.evaluate_report.exists():
        return {}
    if json.loads(scored.read_text()) != {"weights_sha256": weights_sha256, "pairs_sha256": pairs_sha256}:
        return {}
    return json.loads(paths.evaluate_report.read_text())
