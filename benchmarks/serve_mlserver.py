"""MLServer for benchmarks/serve.py, in a Python of its own: its requirements and ours do not go together.

    python serve_mlserver.py PORT       with mlserver and onnxruntime; BENCHMARK_MODEL: the .onnx file

Nothing of Echosight is imported here.
"""

import asyncio
import os
import sys

import numpy as np
import onnxruntime as ort
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import Base64Codec, NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

SHAPE = (2, 128, 64)


class Radar(MLModel):
    """One heatmap in JSON, a list or base64, to its probabilities, as MLServer's documentation shows a runtime."""

    async def load(self) -> bool:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(os.environ["BENCHMARK_MODEL"], options)
        self._site = np.zeros(1, dtype=np.int64)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        [given] = payload.inputs
        if given.datatype == "BYTES":
            [data] = Base64Codec.decode_input(given)
            heatmap = np.frombuffer(data, np.float32).reshape(1, *SHAPE)
        else:
            heatmap = NumpyCodec.decode_input(given)
        [probabilities] = self._session.run(["probabilities"], {"heatmap": heatmap, "site": self._site})
        return InferenceResponse(
            id=payload.id,
            model_name=self.name,
            outputs=[NumpyCodec.encode_output("probabilities", probabilities)],
        )


async def serve(port: int) -> None:
    """Without its worker processes, which would cost each request a pickle and a queue."""
    settings = Settings(
        host="127.0.0.1",
        http_port=port,
        grpc_port=port + 1,
        metrics_port=port + 2,
        parallel_workers=0,
        debug=False,
    )
    model = ModelSettings(name="radar", implementation=Radar)
    await MLServer(settings).start([model])


asyncio.run(serve(int(sys.argv[1])))  # a script and nothing else: `make bench` looks for the usual guard
