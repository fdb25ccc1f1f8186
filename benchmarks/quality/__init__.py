"""What resuming from each policy's checkpoints loses: the parts of ``benchmarks/resume_quality.py``."""
