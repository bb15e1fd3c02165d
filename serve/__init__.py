"""Ways to use a saved model: a chat in the terminal, a page."""
