"""Turns samples into templates: model cards, neural networks, batching, worker processes."""
