"""What a run would cost, before it: FLOPs, hours and memory by formula, and the paper's tables as commands."""
