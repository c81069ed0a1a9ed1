"""One model version: its config, the check of a request, a run's tensors, its counts."""
