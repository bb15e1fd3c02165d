"""Data that comes with the project."""
