"""Reading of benchmark files: tables, images, logs of other programs."""
