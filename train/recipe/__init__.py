"""What is trained: the model of a run, its trainable parts, LoRA, and the plan that a dry run shows."""
