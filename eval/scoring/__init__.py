"""From answers to scores: extraction, matching, grading by a judge."""
