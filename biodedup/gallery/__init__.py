"""The durable store of enrolled subjects."""
