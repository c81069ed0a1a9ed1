"""The gRPC inference server: Open Inference Protocol with Triton's names, on onnxruntime."""

import os

__version__ = "0.1.0"

# onnxruntime's Linux wheel writes a device id and a usage database under the user's cache folder unless this
# is set before its first import. This server reports to nobody.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
