"""`onnxedge generate`: a client of generation models, ours and other Triton servers'."""
