"""Statistics of results: intervals, paired tests, agreement, what a comparison can detect, and spread over seeds."""
