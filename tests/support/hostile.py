"""Texts that rich, matplotlib, HTML, Markdown or a terminal would take for more than text."""

WORDS = ("[/b]", "[/INST]", "[red]", "[bold red]x", ":warning:", r"$\frac{$", "$x$", "_hidden", "<b>bold</b>", "100%")
"""Shown exactly as they are written."""
ESCAPES = {"\x1b[31m": r"\u001b[31m", "\x9b2J": r"\u009b2J", "\u202eabc": r"\u202eabc", "\r_": r"\u000d_"}
"""Text -> how a terminal shows it."""
ALL = (*WORDS, *ESCAPES)


def lacking(shown: str, words: tuple[str, ...] = ALL) -> list[str]:
    """Those of `words` that a program's output does not show as it should; also what it obeys."""
    found = [word for word in words if ESCAPES.get(word, word) not in shown]
    return found + [word for word in ESCAPES if word in shown]
