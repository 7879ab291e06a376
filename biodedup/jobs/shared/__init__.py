"""Helpers of all jobs: progress, checkpoints, result files, worker processes."""
