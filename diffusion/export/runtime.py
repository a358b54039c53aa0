"""ONNX Runtime with an exported file, also for those who have neither torch nor onnx, such as the service."""

import io
from contextlib import redirect_stdout
from functools import cache

import onnxruntime as ort

CUDA = "CUDAExecutionProvider"
MAX_FREE_STEPS = 50
"""Any number of steps up to this can be asked of a sampler, besides the one that it was exported with."""


def session(content: bytes, gpu: int | None, threads: int = 0) -> ort.InferenceSession:
    """A session for a model's bytes, on the GPU of that number if ONNX Runtime can use it, else on the CPU.

    threads: 0 for as many as there are cores.
    """
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads  # errors are raised as well
    # Neither rounded products, nor kernels chosen by how fast they happened to be.
    exact = {"device_id": gpu, "use_tf32": 0, "cudnn_conv_algo_search": "DEFAULT"}
    providers = []
    if gpu is not None and CUDA in ort.get_available_providers():
        _load_cuda()
        providers.append((CUDA, exact))
    return ort.InferenceSession(content, options, providers=[*providers, "CPUExecutionProvider"])


@cache
def _load_cuda() -> None:
    """Load CUDA's libraries, also from the packages that pip installs: a session looks in the system's paths alone."""
    with redirect_stdout(io.StringIO()):  # it prints what it does not find
        ort.preload_dlls()
