"""What all jobs share: progress, checkpoints, result files, worker processes."""
