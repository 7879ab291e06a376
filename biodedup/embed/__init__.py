"""Turns samples into templates: model cards, networks, batching."""
