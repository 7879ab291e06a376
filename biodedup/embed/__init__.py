"""Samples into templates: model cards, networks, batching."""
