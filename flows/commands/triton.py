"""`ddpm triton`: both graphs as a model repository of NVIDIA's Triton Inference Server, which batches requests.

Triton joins requests along the first dimension of every input. So the sampler's graph has a fixed number of steps
there, takes the guidance of each image, (B,), and if it is stochastic its noise as (B, S, C, H, W).
"""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, ValueInfoProto, helper, numpy_helper

from diffusion.errors import FileFault, UsageError, UserError
from diffusion.export import digest
from diffusion.export.ranges import rename
from diffusion.storage.files import new_directory, write_atomic
from flows.commands.types import Integer
from flows.paths import Paths

MAX_BATCH = 2**31 - 1
"""The largest number in Triton's configuration."""
DELAY = 2000
"""Microseconds that a request waits at most for others to come."""
CONFIG = """\
# weights {weights}
name: "{name}"
platform: "onnxruntime_onnx"
max_batch_size: {max_batch}
dynamic_batching {{ max_queue_delay_microseconds: {delay} }}
input [
{inputs}
]
output [
{outputs}
]
{parameters}
"""
PARAMETERS = ("ddpm.classes", "ddpm.guidance", "ddpm.ranges", "ddpm.steps")
"""Metadata that clients need, and that Triton shows only as parameters of the configuration."""
CHECKED = "guidance.checked"
"""The guidance, after the check of its range."""
BY_IMAGE = """
by_image (float[B] guidance) => (float[B,1,1,1] guidance_factors, float[1] guidance_of_all)
<int64[4] GUIDANCE_SHAPE = {-1, 1, 1, 1}, float NO_GUIDANCE = {1}> {
    guidance_factors = Reshape (guidance, GUIDANCE_SHAPE)
    guidance_is_one = Equal (guidance, NO_GUIDANCE)
    guidance_ones = Cast <to = 6> (guidance_is_one)
    guidance_all_ones = ReduceMin (guidance_ones)
    guidance_of_all = Cast <to = 1> (guidance_all_ones)
}
"""
TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
}


def run(directory: Path, /, *, max_batch: Integer = 64, student: bool = False, force: bool = False) -> None:
    """Write both ONNX graphs as a model repository of Triton Inference Server, completely or not at all.

    Args:
        directory: The model repository.
        max_batch: Maximum number of images computed at once, at least 1.
        student: Those of the distilled model.
        force: Replace an existing repository.
    Raises:
        UserError: `directory` is in use, or a graph is missing.
    """
    paths = Paths(student=student)
    files = (paths.denoiser, paths.sampler)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: is a file; choose a folder")
    found = {entry.name for entry in directory.iterdir()} if directory.exists() else set[str]()
    if found and not (force and found <= {file.stem for file in files}):
        raise UserError(f"{directory}: already there; choose another folder, or replace a former one with --force")
    if not 1 <= max_batch <= MAX_BATCH:
        raise UsageError(f"--max-batch: must be from 1 to {MAX_BATCH} (got {max_batch})")
    graphs = {file.stem: batched(_read(file)) for file in files}
    with new_directory(directory) as temporary:
        for name, graph in graphs.items():
            write_atomic(temporary / name / "1" / "model.onnx", graph.SerializeToString(deterministic=True))
            write_atomic(temporary / name / "config.pbtxt", config(name, graph, max_batch).encode())
    print(f"wrote {directory}, for `tritonserver --model-repository {directory}`")


def batched(model: ModelProto) -> ModelProto:
    """A graph whose inputs all begin with the batch."""
    facts, graph = {prop.key: prop.value for prop in model.metadata_props}, model.graph
    for value in list(graph.input):
        if value.name == "steps":
            graph.initializer.append(numpy_helper.from_array(np.array([int(facts["ddpm.steps"])]), "steps"))
            graph.input.remove(value)
        elif value.name == "guidance":
            _guide_each_image(graph)
        elif value.name == "steps_noise":
            by_step, by_image, *image = value.type.tensor_type.shape.dim
            value.type.tensor_type.shape.ClearField("dim")
            value.type.tensor_type.shape.dim.extend([by_image, by_step, *image])
            rename(graph, "steps_noise", "noise_by_step")
            graph.node.insert(
                0, helper.make_node("Transpose", ["steps_noise"], ["noise_by_step"], perm=[1, 0, 2, 3, 4])
            )
    onnx.checker.check_model(model, full_check=True)
    return model


def _guide_each_image(graph: GraphProto) -> None:
    """Make `guidance` float32 (1,) an input (B,).

    The loop's body multiplies by it, and compares it with 1 to evaluate the network only once per step. Now the factors
    are (B, 1, 1, 1), and the number that is compared is 1 only if the guidance of all images is.
    """
    (value,) = (value for value in graph.input if value.name == "guidance")
    value.type.tensor_type.shape.dim[0].dim_param = "B"
    place, loop = next((place, node) for place, node in enumerate(graph.node) if node.op_type == "Loop")
    (body,) = (attribute.g for attribute in loop.attribute if attribute.name == "body")
    for node in body.node:
        if CHECKED in node.input:
            instead = {"Mul": "guidance_factors", "Equal": "guidance_of_all"}[node.op_type]
            node.input[:] = [instead if name == CHECKED else name for name in node.input]
    added = onnx.parser.parse_graph(BY_IMAGE)
    rename(added, "guidance", CHECKED)
    graph.initializer.extend(added.initializer)
    nodes = [*graph.node[:place], *added.node, *graph.node[place:]]
    del graph.node[:]
    graph.node.extend(nodes)


def config(name: str, model: ModelProto, max_batch: int) -> str:
    """The text of config.pbtxt."""
    facts = {prop.key: prop.value for prop in model.metadata_props}
    return CONFIG.format(
        weights=facts["ddpm.weights_sha256"],
        name=name,
        max_batch=max_batch,
        delay=DELAY,
        inputs=",\n".join(map(_tensor, model.graph.input)),
        outputs=",\n".join(map(_tensor, model.graph.output)),
        parameters="\n".join(
            f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(facts[key])} }} }}'
            for key in PARAMETERS
            if key in facts
        ),
    )


def _tensor(value: ValueInfoProto) -> str:
    """An input or output of config.pbtxt, which leaves out the batch; a number for each image is a [1]."""
    kind = value.type.tensor_type
    dims = [dim.dim_value or -1 for dim in kind.shape.dim[1:]]
    shape = f"dims: {dims}" if dims else "dims: [ 1 ] reshape: { shape: [ ] }"
    return f'  {{ name: "{value.name}" data_type: {TYPES[kind.elem_type]} {shape} }}'


def _read(path: Path) -> ModelProto:
    try:
        return ModelProto.FromString(digest.check(path.read_bytes()))
    except OSError as error:
        raise FileFault(path, str(error.strerror)) from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
