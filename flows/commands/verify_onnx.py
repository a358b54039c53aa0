"""`ddpm verify-onnx`: whether an exported file is as it was written, and ONNX Runtime computes it correctly here."""

import json
from pathlib import Path

import onnx
from pydantic import TypeAdapter, ValidationError

from diffusion.errors import FileFault, UsageError, UserError, describe
from diffusion.export import digest, golden, parity
from diffusion.nn import build as networks
from diffusion.nn.build import Device


def run(path: Path, /, *, device: str = "auto") -> None:
    """Check an ONNX file's digest and graph and run its golden test; raises UserError for what does not hold.

    Args:
        path: An exported file, such as models/onnx/sampler.onnx.
        device: auto, cpu, cuda or cuda:N; on other devices the check runs on the CPU.
    """
    try:
        TypeAdapter(Device).validate_python(device)
    except ValidationError as error:
        raise UsageError(f"--device: {describe(error)}") from None
    chosen = networks.device(device)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FileFault(path, str(error.strerror)) from None
    try:
        digest.check(content)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    try:
        onnx.checker.check_model(content, full_check=True)
        session = parity.session(content, chosen, required=device != "auto")
    except Exception as error:  # onnx and ONNX Runtime have a dozen kinds, with nothing in common
        raise UserError(
            f"{path}: no ONNX model that can be run ({golden.brief(error)}); `ddpm export` makes one"
        ) from None
    facts = session.get_modelmeta().custom_metadata_map
    try:
        outcome = golden.check(session, facts)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    bits = "the same bits" if outcome.exact else f"within {outcome.largest:.2g}"
    print(f"{path}: passes its golden test ({bits}) on {session.get_providers()[0]}")
    print(f"digest       {facts[digest.KEY]} (graph, weights and metadata are as they were written)")
    print(f"made from    a model.safetensors with the SHA-256 {facts.get('ddpm.weights_sha256')}")
    for name, value in json.loads(facts.get("ddpm.heldout", "{}")).items():
        if name in ("mse", "r2", "bits_per_dim"):
            print(f"{name:<12} {value:.4f}")
