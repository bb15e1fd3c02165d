"""The embedded data set: pictures of real handwritten digits, with questions, in the public file formats."""
