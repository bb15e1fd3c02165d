"""Seeded damage to JSON objects, for the fuzz tests."""

import copy
import json

VALUES = [None, -1, 0, 1, 7, 1.5, "x", "", [], {}, True, False, 10**30, -(10**30), 1e308, float("nan")]
VALUES += [[1, 2], [[]], [None], {"a": 1}, {"model_type": 3}, "llama", "../x", [10**9, "\ud83d"], ["x"] * 3]


def places(part, path=()):
    for name, value in part.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


def damaged(raw, rng):
    """The text of a JSON object with one to three values changed, removed or added, or a text that is cut."""
    new = copy.deepcopy(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        *path, last = rng.choice(list(places(new)))
        part = new
        for step in path:
            part = part[step]
        if rng.random() < 0.15:
            del part[last]
        else:
            part[last if rng.random() < 0.95 else rng.choice(["text_config", "to_dict", "rope_scaling", "dtype"])] = (
                copy.deepcopy(rng.choice(VALUES))
            )
        if not new:
            break
    text = json.dumps(new)
    return text if rng.random() < 0.95 else rng.choice([text[: rng.randrange(len(text))], "[]", "", "3", "[" * 10**5])
