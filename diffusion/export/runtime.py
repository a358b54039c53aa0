"""ONNX Runtime sessions for exported files; needs neither torch nor onnx, for use in the service."""

import io
import os
from contextlib import redirect_stdout
from functools import cache

import onnxruntime as ort

CUDA = "CUDAExecutionProvider"
MAX_FREE_STEPS = 50
"""A deterministic sampler accepts any number of steps up to this, and the one it was exported with."""


def session(content: bytes, gpu: int | None, threads: int = 0) -> ort.InferenceSession:
    """Create a session for a model's bytes, on the GPU with that index if ONNX Runtime can use it, else on the CPU.

    threads: number of threads, 0 for one per core.
    """
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads  # errors are raised in any case
    # By default weights are also read from files in the current folder, which the digest does not cover.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    # Full precision, and deterministic selection of kernels.
    exact = {"device_id": gpu, "use_tf32": 0, "cudnn_conv_algo_search": "DEFAULT"}
    providers = []
    if gpu is not None and CUDA in ort.get_available_providers():
        _load_cuda()
        providers.append((CUDA, exact))
    return ort.InferenceSession(content, options, providers=[*providers, "CPUExecutionProvider"])


@cache
def _load_cuda() -> None:
    """Load the CUDA libraries, including those installed by pip; sessions only search the system's paths."""
    with redirect_stdout(io.StringIO()):  # it prints the libraries that it cannot find
        ort.preload_dlls()
