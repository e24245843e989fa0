"""Ingest: read frames from the streams, pair them, store the pairs, acknowledge."""

import services.core.telemetry  # noqa: F401 - before onnxruntime is loaded
