"""Slow reference implementation of ranking and metrics: plain float64 loops that share no code with `src`."""

import math


def splitmix(code):
    z = ((code + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def top_items(scores, k, excluded=()):
    """Return the k best items of one row of scores: by score, then hash, then code; -1 if none is left."""
    excluded = set(excluded)
    left = [item for item in range(len(scores)) if item not in excluded and scores[item] != -math.inf]
    left.sort(key=lambda item: (-scores[item], splitmix(item), item))
    return (left + [-1] * k)[:k]


def inner_products(queries, items, bias=None):
    return [
        [
            math.fsum(q * x for q, x in zip(query, item, strict=True)) + (bias[j] if bias else 0.0)
            for j, item in enumerate(items)
        ]
        for query in queries
    ]


def metrics(ranked, targets, k):
    """Return (recall, ndcg, reciprocal rank, hit) of one query; targets is a non-empty set."""
    found = [rank for rank, item in enumerate(ranked[:k], start=1) if item in targets]
    gained = math.fsum(1 / math.log2(rank + 1) for rank in found)
    ideal = math.fsum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(targets)) + 1))
    return len(found) / len(targets), gained / ideal, 1 / found[0] if found else 0.0, 1.0 if found else 0.0


def thirds(counts):
    """Assign 0 head, 1 mid, 2 tail by the cumulative interactions before the item."""
    total, before, result = sum(counts), 0, [2] * len(counts)
    for item in sorted(range(len(counts)), key=lambda j: (-counts[j], j)):
        result[item] = 0 if before < total / 3 else 1 if before < 2 * total / 3 else 2
        before += counts[item]
    return result


def knn_scores(train_rows, num_items, history, neighbours, shrink):
    """Compute the item-kNN scores of one history in float64."""
    rows = [set(row) for row in train_rows]
    holds = [{q for q, row in enumerate(rows) if item in row} for item in range(num_items)]
    scores = [0.0] * num_items
    for i in set(history):
        similar = []
        for j in range(num_items):
            both = len(holds[i] & holds[j])
            if j != i and both:
                similar.append((both / (math.sqrt(len(holds[i]) * len(holds[j])) + shrink), j))
        similar.sort(key=lambda pair: (-pair[0], splitmix(pair[1])))
        for similarity, j in similar[:neighbours]:
            scores[j] += similarity
    return scores


def random_expectation(num_left, num_targets, k):
    """Return expected (recall, ndcg, reciprocal rank, hit) at k of a random ranking of `num_left` items."""
    share = num_targets / num_left
    ideal = math.fsum(1 / math.log2(rank + 1) for rank in range(1, min(k, num_targets) + 1))
    gained = share * math.fsum(1 / math.log2(rank + 1) for rank in range(1, k + 1))
    none_before, reciprocal = 1.0, 0.0
    for rank in range(1, k + 1):
        left = num_left - rank + 1
        reciprocal += none_before * num_targets / left / rank
        none_before *= max(left - num_targets, 0) / left
    return k / num_left, gained / ideal, reciprocal, 1 - none_before


def parts(counts, number):
    """Assign each item to its part of the interactions by walking down the popularity ranking."""
    total, before, result = sum(counts), 0, [number - 1] * len(counts)
    for item in sorted(range(len(counts)), key=lambda j: (-counts[j], j)):
        if total:
            result[item] = next((p for p in range(number) if before * number < total * (p + 1)), number - 1)
        before += counts[item]
    return result


def beyond_accuracy(lists, counts, embeddings, k):
    """Return (coverage, Gini, novelty, popularity, diversity) by definition, means over queries with a value."""
    shown = [[item for item in row[:k] if item >= 0] for row in lists]
    times = sorted(sum(item in row for row in shown) for item in range(len(counts)))
    pairs = sum(abs(x - y) for x in times for y in times)
    total = sum(times)
    gini = pairs / (2 * len(times) * total) if total else math.nan
    bits = [-math.log2((count + 1) / (sum(counts) + len(counts))) for count in counts]
    different = [[1 - _cosine(embeddings[i], embeddings[j]) for i in row for j in row if i != j] for row in shown]
    return (
        sum(time > 0 for time in times) / len(times),
        gini,
        _mean([_mean([bits[item] for item in row]) for row in shown]),
        _mean([_mean([counts[item] for item in row]) for row in shown]),
        _mean([_mean(row) for row in different]),
    )


def _cosine(a, b):
    lengths = math.sqrt(math.fsum(x * x for x in a) * math.fsum(x * x for x in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


def _mean(values):
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
