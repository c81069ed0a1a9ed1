"""onnxruntime: sessions, execution providers, threads."""
