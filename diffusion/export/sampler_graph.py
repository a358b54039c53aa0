"""The complete sampling loop, from noise to images, as one ONNX graph.

The weights are initializers of the loop's body: ONNX Runtime does not pre-pack initializers of an outer graph, and each
network evaluation would take nearly twice as long.
"""

from math import ceil
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper, parser
from onnx.utils import Extractor

from diffusion.export import ranges
from diffusion.export.recurrence import Recurrence, recurrence
from diffusion.export.runtime import MAX_FREE_STEPS
from diffusion.model import Model
from diffusion.sampling import build as sampling
from diffusion.sampling.build import SampleOptions

OUTER = """
sampler ({inputs}) => (uint8[B,{H},{W},{C}] images, float[B,{C},{H},{W}] x_0)
{{
    {steps}
    asked = Clip (steps, LOWEST, HIGHEST)
    begin = Gather <axis = 0> (BEGINS, asked)
    looks = Gather <axis = 0> (LENGTHS, asked)
    one_noise = Unsqueeze (noise, ZERO)
    state = Concat <axis = 0> (one_noise, one_noise, one_noise)
    most = Squeeze (looks)
    states = Loop (most, GOES_ON, state)
    x_0 = Gather <axis = 0> (states, FIRST)
    in_range = Clip (x_0, MINUS_ONE, PLUS_ONE)
    from_zero = Add (in_range, PLUS_ONE)
    of_255 = Mul (from_zero, HALF_OF_255)
    rounded = Round (of_255)
    bytes = Cast <to = 2> (rounded)
    images = Transpose <perm = [0, 2, 3, 1]> (bytes)
}}
"""
BODY = """
body (int64 look, bool goes_on, float[3,B,{C},{H},{W}] now) => (bool goes_on_still, float[3,B,{C},{H},{W}] next)
{{
    goes_on_still = Identity (goes_on)
    row = Add (begin, look)
    x = Gather <axis = 0> (now, FIRST)
    t_row = Gather <axis = 0> (TIMESTEPS, row)
    count = Shape <start = 0, end = 1> (x)
    {before}
    said = Network ()
    {after}
    {threshold}
    kept = Slice (now, ONE, END)
    x_0_hat_row = Unsqueeze (x_0_hat, ZERO)
    {noise}
    rows = Reshape (sources, AS_ROWS)
    mixture = Gather <axis = 0> (MIXTURES, row)
    mixed = MatMul (mixture, rows)
    shape = Shape (now)
    next = Reshape (mixed, shape)
}}
"""
UNCONDITIONAL = ("x_shown = Identity (x) t = Expand (t_row, count)", "free = Identity (said)")
CONDITIONAL = (f"{UNCONDITIONAL[0]} y_shown = Identity (y)", UNCONDITIONAL[1])
GUIDED = (
    # With guidance 1 the network only runs on the conditional inputs: then the last `count` outputs are the first.
    """
    unguided = Equal (guidance, PLUS_ONE)
    again = Where (unguided, ZERO, count)
    twice = Add (count, again)
    t = Expand (t_row, twice)
    x_again = Slice (x, ZERO, again)
    x_shown = Concat <axis = 0> (x, x_again)
    none = Expand (MINUS, again)
    y_shown = Concat <axis = 0> (y, none)
    """,
    """
    of_class = Slice (said, ZERO, count)
    minus_count = Neg (count)
    of_none = Slice (said, minus_count, END)
    difference = Sub (of_class, of_none)
    guided = Mul (guidance, difference)
    free = Add (of_none, guided)
    """,
)
THRESHOLDS = {
    "none": "x_0_hat = Identity (free)",
    "clip": "x_0_hat = Clip (free, MINUS_ONE, PLUS_ONE)",
    "dynamic": """
    size = Abs (free)
    sizes = Reshape (size, AS_ROWS)
    largest, places = TopK (sizes, TOP)
    quantile = Slice (largest, MINUS, END, ONE)
    at_least_one = Max (quantile, PLUS_ONE)
    edge = Reshape (at_least_one, AS_IMAGES)
    minus_edge = Neg (edge)
    not_below = Max (free, minus_edge)
    inside = Min (not_below, edge)
    x_0_hat = Div (inside, edge)
    """,
}
DETERMINISTIC = "sources = Concat <axis = 0> (kept, x_0_hat_row)"
STOCHASTIC = """
    z = Gather <axis = 0> (steps_noise, look)
    z_row = Unsqueeze (z, ZERO)
    sources = Concat <axis = 0> (kept, x_0_hat_row, z_row)
"""


def to_onnx(denoiser: ModelProto, model: Model, options: SampleOptions) -> ModelProto:
    """Build the graph from `noise` float32 (B, C, H, W) to `images` uint8 (B, H, W, C) and `x_0` float32 (B, C, H, W).

    denoiser: the model's graph from denoiser.py.

    Deterministic samplers have an input `steps` int64 (1,): a number up to MAX_FREE_STEPS or the one of `options`,
    where 0 means the latter. Stochastic ones take their number of steps from `steps_noise` float32 (S, B, C, H, W).
    Class-conditional networks have the inputs `y` int64 (B,), -1 for none, and `guidance` float32 (1,), which distilled
    ones lack.
    """
    table, begins, lengths = tables(model, options)
    conditional, (C, H, W) = model.num_classes > 0, model.shape
    guided = conditional and options.guidable
    sides = {"C": C, "H": H, "W": W}
    image = f"B,{C},{H},{W}"
    inputs = [f"float[{image}] noise", f"float[S,{image}] steps_noise" if table.stochastic else "int64[1] steps"]
    inputs += ["int64[B] y"] if conditional else []
    inputs += ["float[1] guidance"] if guided else []
    before, after = GUIDED if guided else CONDITIONAL if conditional else UNCONDITIONAL
    parts = {"before": before, "after": after, "threshold": THRESHOLDS[options.threshold]} | sides
    body = parser.parse_graph(BODY.format(noise=STOCHASTIC if table.stochastic else DETERMINISTIC, **parts))
    inline_network(body, denoiser, conditional)
    count = "steps = Shape <start = 0, end = 1> (steps_noise)" if table.stochastic else ""
    outer = parser.parse_graph(OUTER.format(inputs=", ".join(inputs), steps=count, **sides))
    loop = next(node for node in outer.node if node.op_type == "Loop")
    loop.attribute.append(helper.make_attribute("body", body))
    constants = _constants(table, begins, lengths, C * H * W)
    used = {name for graph in (outer, body) for node in graph.node for name in node.input}
    outer.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in used
    )
    most, allowed = len(lengths) - 2, f"1 to {min(MAX_FREE_STEPS, model.process.schedule.num_timesteps)}"
    allowed += f", or {most}" if most > MAX_FREE_STEPS else ""
    refusal = f"steps_noise must be for {allowed} steps" if table.stochastic else f"steps must be {allowed}, or 0"
    ranges.require(outer, "looks", np.int64(1), lengths.max(), refusal)
    return helper.make_model(outer, opset_imports=denoiser.opset_import, ir_version=denoiser.ir_version)


def _constants(table: Recurrence, begins: np.ndarray, lengths: np.ndarray, values: int) -> dict[str, Any]:
    """Constants of the graphs, by name; `values` is the number of values per image."""
    sources = 4 if table.stochastic else 3
    return {
        "BEGINS": begins,
        "LENGTHS": lengths,
        "TIMESTEPS": table.t,
        "MIXTURES": table.mixture[:, :, :sources].astype(np.float32),
        "LOWEST": np.int64(-1),
        "HIGHEST": np.int64(len(lengths) - 1),
        "FIRST": np.int64(0),
        "ZERO": np.array([0]),
        "ONE": np.array([1]),
        "MINUS": np.array([-1]),
        "END": np.array([np.iinfo(np.int64).max]),
        "AS_ROWS": np.array([0, -1]),
        "AS_IMAGES": np.array([-1, 1, 1, 1]),
        "TOP": np.array([values - ceil(0.995 * values) + 1]),  # see dynamic_threshold
        "PLUS_ONE": np.float32(1),
        "MINUS_ONE": np.float32(-1),
        "HALF_OF_255": np.float32(127.5),
        "GOES_ON": np.True_,
    }


def tables(model: Model, options: SampleOptions) -> tuple[Recurrence, np.ndarray, np.ndarray]:
    """The rows for all allowed numbers of steps, and by number of steps the index of its first row and their number.

    Entry 0 stands for the number of steps in `options`. Disallowed numbers and the last entry have no rows.
    """
    schedule = model.process.schedule
    numbers = sorted({*range(1, min(MAX_FREE_STEPS, schedule.num_timesteps) + 1), options.steps})
    parts = []
    for number in numbers:
        timesteps = sampling.sampling_timesteps(options.model_copy(update={"steps": number}), schedule)
        parts.append(recurrence(options, model.process, model.variance, timesteps))
    joined = Recurrence.joined(parts)
    size = numbers[-1] + 2  # the graph uses the last entry for all numbers out of range
    begins, lengths = np.zeros(size, np.int64), np.zeros(size, np.int64)
    lengths[numbers] = [len(part.t) for part in parts]
    begins[numbers] = np.cumsum([0, *lengths[numbers[:-1]]])
    lengths[0], begins[0] = lengths[options.steps], begins[options.steps]
    return joined, begins, lengths


def inline_network(body: GraphProto, denoiser: ModelProto, conditional: bool) -> None:
    """Replace the body's node Network by the denoiser's nodes that compute `x_0_hat`, with their weights."""
    wires = {"x_t": "x_shown", "t": "t", "y": "y_shown", "x_0_hat": "said", "": ""}
    given = ["x_t", "t", *(["y"] if conditional else [])]
    network = Extractor(denoiser).extract_model(given, ["x_0_hat"]).graph

    def inside(name: str) -> str:
        return wires.get(name, f"network.{name}")

    nodes = list[NodeProto]()
    for node in network.node:
        node.input[:] = [inside(name) for name in node.input]
        node.output[:] = [inside(name) for name in node.output]
        nodes.append(node)
    for weight in network.initializer:
        weight.name = inside(weight.name)
    body.initializer.extend(network.initializer)
    place = next(index for index, node in enumerate(body.node) if node.op_type == "Network")
    around = list(body.node)
    del body.node[:]
    body.node.extend([*around[:place], *nodes, *around[place + 1 :]])
