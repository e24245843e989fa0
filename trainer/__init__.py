"""The learning: vision and radar encoders, contrast, the endless worker, export. Alone in knowing torch."""

import services.core.telemetry  # noqa: F401 - before onnxruntime is loaded
