"""Metrics, traces, logs: what is told of requests, off their path."""
