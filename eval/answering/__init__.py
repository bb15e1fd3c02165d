"""Answering of questions with saved models: the plan, the workers, the answer log."""
