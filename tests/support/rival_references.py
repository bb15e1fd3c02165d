"""The rules of the selecting rivals a second time, one image at a time, with loops over numpy arrays.

Written from the descriptions of the methods, not from `llava_skip.reduction`. Each takes arrays of one image:
`attention` [H, 1 + P, 1 + P] of a tower layer, `features` [1 + P, C] (class token first), `keys` [1 + P, C].
"""

import numpy as np


def cosines(rows: np.ndarray) -> np.ndarray:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit @ unit.T


def largest(scores, count: int) -> list[int]:
    """Indices of the largest scores, the largest first."""
    return sorted(range(len(scores)), key=lambda index: -scores[index])[:count]


def fastervlm(attention: np.ndarray, count: int) -> list[int]:
    return sorted(largest(attention[:, 0, 1:].mean(axis=0), count))


def visionzip(attention: np.ndarray, features: np.ndarray, keys: np.ndarray, heads: int, shares: tuple[int, int]):
    dominant, contextual = shares
    similar = cosines(keys.reshape(len(keys), heads, -1).mean(axis=1))
    score = attention[:, 0, 1:].sum(axis=0)
    chosen = [0, *sorted(1 + index for index in largest(score, dominant - 1))]
    rest = [index for index in range(len(features)) if index not in chosen]
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    members = {target: [] for target in targets}
    for index in rest:
        if index not in targets:
            likeness = [similar[index, target] for target in targets]
            members[targets[int(np.argmax(likeness))]].append(features[index])
    rows = [features[index] for index in chosen]
    for target in targets:
        rows.append(features[target] + (np.mean(members[target], axis=0) if members[target] else 0))
    return np.array(rows)


def vispruner(attention: np.ndarray, features: np.ndarray, count: int, ratio: float) -> list[int]:
    patches = features[1:]
    order = largest(attention[:, 0, 1:].mean(axis=0), len(patches))
    important = int(count * ratio)
    kept, rest = order[:important], order[important:]
    a_round = max(1, round(8 / 576 * len(patches)))
    similar = cosines(patches)
    if important == count:
        return sorted(kept)
    while len(rest) > count - important:
        leave = min(a_round, len(rest) - (count - important))
        first, second = rest[::2], rest[1::2]
        likeness = [similar[a, second].max() for a in first]
        by_likeness = [first[index] for index in largest(likeness, len(first))]
        rest = by_likeness[leave:] + second
    return sorted(kept + rest)


def hiprune(middle: np.ndarray, last: np.ndarray, count: int, alpha: float) -> list[int]:
    in_middle, in_last = (attention.mean(axis=(0, 1))[1:] for attention in (middle, last))
    patches = len(in_last)
    side = int(patches**0.5)
    chosen = set()
    for anchor in largest(in_middle, round(count * alpha / 5)):
        for index in (anchor, anchor - 1, anchor + 1, anchor - side, anchor + side):
            chosen.add(min(max(index, 0), patches - 1))
    for index in largest(in_last, patches):
        if len(chosen) < count:
            chosen.add(index)
    return sorted(chosen)


def divprune(tokens: np.ndarray, count: int) -> list[int]:
    size = len(tokens)
    distance = 1 - cosines(tokens)
    second_smallest = [sorted(distance[:, index])[1] for index in range(size)]
    chosen = [int(np.argmax(second_smallest))]
    while len(chosen) < count:
        left = [index for index in range(size) if index not in chosen]
        nearest = [distance[index, chosen].min() for index in left]
        chosen.append(left[int(np.argmax(nearest))])
    return sorted(chosen)


def prumerge_plus(class_query: np.ndarray, keys: np.ndarray, features: np.ndarray, count: int):
    patches = features[1:]
    logits = keys @ class_query / np.sqrt(len(class_query))
    weights = np.exp(logits - logits.max())
    weights = (weights / weights.sum())[1:]
    keys, kept = keys[1:], count - 1
    by_score = largest(weights, max(min(1, kept), round(kept / 4)))
    left = [index for index in range(len(patches)) if index not in by_score]
    spatial = kept - len(by_score)
    chosen = by_score + [left[(2 * i + 1) * len(left) // (2 * spatial)] for i in range(spatial)]
    added = max(1, round(32 / 576 * len(patches)))
    rows, similar = [], cosines(keys)
    for index in chosen:
        likeness = [-2 if other == index else similar[index, other] for other in range(len(patches))]
        rows.append(patches[index] + sum(weights[other] * patches[other] for other in largest(likeness, added)))
    dropped = [index for index in range(len(patches)) if index not in chosen]
    rows.append(sum((weights[index] * patches[index] for index in dropped), np.zeros(patches.shape[1])))
    return np.array(rows)
