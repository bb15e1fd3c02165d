"""How fast models are and how much memory they take: models and inputs, measuring, and the pages of `bench`."""
