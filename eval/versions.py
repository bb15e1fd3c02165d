"""Versions of what made a result."""

import importlib.metadata
import sys


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each package, and Python's; a package that runs from its source folder has its own."""
    found = {"python": sys.version.split()[0]}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = getattr(sys.modules.get(name), "__version__", "not installed")
    return found
