"""The model server: heatmaps in, answers out, while models change underneath. It never imports torch."""

import services.core.telemetry  # noqa: F401 - before onnxruntime is loaded
