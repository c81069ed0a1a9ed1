"""Export: a checkpoint becomes a checked, quantized entry of a model repository."""

import os

# onnxruntime's Linux wheel keeps a device id and a usage database unless this is set before its first import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
