"""Where the programs put and look for things when no path is given, from whatever folder they are started."""

from __future__ import annotations

import os
from pathlib import Path

from llava_skip_base.errors import UserError

HOME_VARIABLE = "LLAVA_SKIP_HOME"
"""Environment variable that names another folder for all of the paths below."""


def checkout() -> Path | None:
    """The checkout of the project that this package is in; None if it was installed elsewhere."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "setup.py").is_file() and (root / "playground").is_dir() else None


def home() -> Path:
    """The folder of checkpoints and results: `LLAVA_SKIP_HOME`, else the checkout, else the current folder."""
    if chosen := os.environ.get(HOME_VARIABLE):
        return Path(chosen).expanduser().resolve()
    return checkout() or Path.cwd()


def embedded_data() -> Path:
    """The folder of the embedded data set; outside of a checkout, in the user's cache folder."""
    if os.environ.get(HOME_VARIABLE) or checkout():
        return home() / "playground" / "data" / "digits"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llava-skip" / "digits"


def embedded_tokenizer() -> Path:
    """The tokenizer of the embedded data set."""
    return embedded_data() / "tokenizer"


def embedded_benchmarks() -> Path:
    """The folder of the embedded data set's benchmark files."""
    return embedded_data() / "eval"


def checkpoints() -> Path:
    """The folder of the runs, each in a folder of its own."""
    return home() / "checkpoints"


def results() -> Path:
    """The folder of evaluation results."""
    return home() / "results"


def shown(path: Path) -> str:
    """A path as it is shown to users: relative to the current folder if it is below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def newest_model() -> Path:
    """The model folder saved last among the project's checkpoints; those saved during training do not count.

    Raises:
        UserError: there is none.
    """
    folder = checkpoints()
    found = [
        path
        for path in folder.glob("**/config.json")
        if not any(part.startswith("checkpoint-") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise UserError(
            f"no model given, and {shown(folder)}/ holds none; train one with 'bash scripts/finetune_skip.sh', or "
            "give a saved model."
        )
    return Path(shown(max(found, key=lambda path: path.stat().st_mtime).parent))
