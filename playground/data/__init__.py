"""The embedded data set: images of real handwritten digits, with questions, in the public file formats."""
