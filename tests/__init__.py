"""The tests; a package, so that a folder of the same name elsewhere is not taken for it."""
