"""Load tests over gRPC, against any server that speaks the Open Inference Protocol."""
