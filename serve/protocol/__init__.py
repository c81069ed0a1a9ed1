"""Bytes on the wire to tensors in memory and back: no models, no transport."""
