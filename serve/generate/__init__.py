"""Token generation: continuous batching of a decoder that keeps its keys and values in a cache."""
