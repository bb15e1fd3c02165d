"""Training: stage 1 and supervised fine-tuning on DeepSpeed."""
