"""Slow float64 loops that share nothing with `src`: what the fast code is compared with."""

import math


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def sampled_softmax(query, positive, candidates, log_kappa, hits, temperature=1.0):
    """docs/theory.md, section 2, one row and one candidate at a time."""
    losses = []
    for row, user in enumerate(query):
        score = dot(user, positive[row]) / temperature
        terms = [score]
        for place, item in enumerate(candidates):
            if not hits[row][place]:
                terms.append(dot(user, item) / temperature - float(log_kappa[place]))
        largest = max(terms)
        losses.append(-score + largest + math.log(sum(math.exp(term - largest) for term in terms)))
    return losses


def finite_difference(function, values, step=1e-6):
    """Central differences of a scalar function of a flat list of floats."""
    gradient = []
    for place in range(len(values)):
        up, down = list(values), list(values)
        up[place] += step
        down[place] -= step
        gradient.append((function(up) - function(down)) / (2 * step))
    return gradient


def pooled_kappa(item, *, counts, rows, uniform_size, num_items, unique):
    """Expected count of one item in a pool of in-batch and uniform candidates, by the table of docs/theory.md, section 2."""
    p = counts[item] / sum(counts)
    q = 1.0 / num_items
    if not unique:
        return (rows - 1) * p + uniform_size * q
    return 1.0 - (1.0 - p) ** (rows - 1) * (1.0 - q) ** uniform_size


def expected_counts(parts, *, unique, num_items, always=()):
    """Expected count of every item by the table of docs/theory.md, section 2.

    parts: (draws, probability of each item, own duplicates removed) of every random source.
    """
    counts = []
    for item in range(num_items):
        absent, total = 1.0, 0.0
        for draws, q, own_unique in parts:
            absent *= (1.0 - q[item]) ** draws
            total += 1.0 - (1.0 - q[item]) ** draws if own_unique else draws * q[item]
        counts.append(1.0 if item in always else (1.0 - absent if unique else total))
    return counts
