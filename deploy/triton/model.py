"""A model of Triton's Python backend that runs the graph beside it, as Triton's ONNX Runtime backend would."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as triton


class TritonPythonModel:
    """Runs the requests that Triton's dynamic batcher has chosen together as one batch."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the graph."""
        path = Path(args["model_repository"], args["model_version"], "model.onnx")
        self.session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Join the inputs along their first dimension, and split the outputs again."""
        given = {
            name: [triton.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            for name in self.inputs
        }
        ends = np.cumsum([len(part) for part in given[self.inputs[0]]])
        try:
            found = self.session.run(None, {name: np.concatenate(parts) for name, parts in given.items()})
        except Exception as error:  # ONNX Runtime's errors have no common base class
            return [triton.InferenceResponse(error=triton.TritonError(str(error))) for _ in requests]
        names = [value.name for value in self.session.get_outputs()]
        return [
            triton.InferenceResponse([triton.Tensor(name, part) for name, part in zip(names, parts, strict=True)])
            for parts in zip(*(np.split(array, ends[:-1]) for array in found), strict=True)
        ]
