"""`python -m export inspect` and `compare`: what any ONNX graph is made of, costs and answers."""
