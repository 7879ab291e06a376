"""Defines the commands on a gallery: its content, files, keys, policy, log and replicas."""
