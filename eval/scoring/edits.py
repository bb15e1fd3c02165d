"""The edit distance between two texts."""


def edit_distance(first: str, second: str) -> int:
    """The number of insertions, deletions and replacements that turn one text into another (Levenshtein)."""
    above = list(range(len(second) + 1))
    for row, letter in enumerate(first, start=1):
        left = [row]
        for column, other in enumerate(second):
            left.append(min(left[-1] + 1, above[column + 1] + 1, above[column] + (letter != other)))
        above = left
    return above[-1]
