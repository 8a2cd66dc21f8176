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


class StreamingGaps:
    """The gap estimator in rows, one item at a time; `slots` maps an item to its place in each table."""

    def __init__(self, rate, patience=5.0, slots=lambda item: [item]):
        self.rate, self.patience, self.slots = rate, patience, slots
        self.gap, self.last, self.clock = {}, {}, 0

    def observe(self, items):
        self.clock += len(items)
        tables = len(self.slots(items[0]))
        for table in range(tables):
            seen = [(table, self.slots(item)[table]) for item in items]
            for slot in set(seen):
                times = seen.count(slot)
                between = (self.clock - self.last.get(slot, 0)) / times
                weight = 1.0 - (1.0 - self.rate) ** times
                old = self.gap.get(slot)
                self.gap[slot] = between if old is None else (1.0 - weight) * old + weight * between
                self.last[slot] = self.clock

    def probability(self, item):
        gaps = []
        for slot in enumerate(self.slots(item)):
            if slot not in self.gap:
                return 0.0
            gaps.append(max(self.gap[slot], (self.clock - self.last[slot]) / self.patience))
        return 1.0 / max(1.0, *gaps)


def step_gaps(batches, rate):
    """The published form, gaps in steps: 1/B[h] is the chance to stand in a batch."""
    gap, last = {}, {}
    for step, batch in enumerate(batches, start=1):
        for item in set(batch):
            between = step - last.get(item, 0)
            gap[item] = between if item not in gap else (1.0 - rate) * gap[item] + rate * between
            last[item] = step
    return {item: 1.0 / value for item, value in gap.items()}


def popularity_decile(counts):
    """Each item's tenth of the interactions, by walking down the popularity ranking."""
    order = sorted(range(len(counts)), key=lambda item: (-counts[item], item))
    total, before, decile = sum(counts), 0, [0] * len(counts)
    for item in order:
        decile[item] = min(10 * before // total, 9)
        before += counts[item]
    return decile
