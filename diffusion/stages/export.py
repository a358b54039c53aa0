"""export: the model as ONNX, checked in ONNX Runtime against torch before it counts as written."""

import shutil

import onnx
import torch

from diffusion import tracking
from diffusion.data.pairs import Pairs
from diffusion.errors import UserError
from diffusion.export import metadata, parity
from diffusion.export.denoiser import to_onnx
from diffusion.files import new_directory, sha256, write_atomic, write_json
from diffusion.model import WEIGHTS, load_model
from diffusion.nn import build as networks
from diffusion.params import Params
from diffusion.paths import Paths
from diffusion.progress import say


def run(params: Params, paths: Paths) -> None:
    """Export, check and write; a model that does not meet `export.tolerance` leaves no file behind."""
    device = networks.device(params.device)
    model, pairs = load_model(paths.model, torch.device("cpu")), Pairs(paths.pairs, "test")
    pairs.check_process(model.process.schedule.alpha_bar.numpy(), model.shape)
    graph = to_onnx(model, params.export.opset)
    metadata.describe(graph, model, sha256(paths.model / WEIGHTS))
    onnx.checker.check_model(graph, full_check=True)
    content = graph.SerializeToString(deterministic=True)
    found = parity.compare(content, model, pairs, device)
    if not found.max_difference <= params.export.tolerance:
        shutil.rmtree(paths.onnx, ignore_errors=True)
        paths.export_report.unlink(missing_ok=True)
        raise UserError(
            f"ONNX Runtime differs from torch by up to {found.max_difference:.2e}, more than export.tolerance "
            f"({params.export.tolerance:g}) in params.yaml; no model was written"
        )
    with new_directory(paths.onnx) as temporary:
        write_atomic(temporary / paths.denoiser.name, content)
    write_json(paths.export_report, {**found._asdict(), "bytes": len(content), "opset": params.export.opset})
    say(
        f"export: {paths.denoiser} ({len(content) / 1e6:.1f} MB), at most {found.max_difference:.1e} from torch "
        f"on {found.pairs} held-out pairs"
    )
    tracking.record(params, paths)
