"""What a run measures, logs and leaves behind."""
