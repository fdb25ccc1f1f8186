"""What runs, kills and shows the demo; the training script itself is ``fsdp_trainer.py``."""
