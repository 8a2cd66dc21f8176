"""Slow float64 reference implementations that share no code with `src`."""

import math
from fractions import Fraction


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def sampled_softmax(query, positive, candidates, log_kappa, mask, temperature=1.0):
    """Compute the loss of docs/theory.md, section 2, one row and one candidate at a time."""
    losses = []
    for row, user in enumerate(query):
        score = dot(user, positive[row]) / temperature
        terms = [score]
        for place, item in enumerate(candidates):
            if not mask[row][place]:
                terms.append(dot(user, item) / temperature - float(log_kappa[place]))
        largest = max(terms)
        losses.append(-score + largest + math.log(sum(math.exp(term - largest) for term in terms)))
    return losses


def finite_difference(function, values, step=1e-6):
    """Compute central differences of a scalar function of a flat list of floats."""
    gradient = []
    for place in range(len(values)):
        up, down = list(values), list(values)
        up[place] += step
        down[place] -= step
        gradient.append((function(up) - function(down)) / (2 * step))
    return gradient


def expected_counts(parts, *, unique, num_items, always=()):
    """Compute the expected count of every item by the table of docs/theory.md, section 2.

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


def epoch_absence(draws, count, others):
    """Compute the probability that `draws` of `others` rows, without replacement, miss the `count` rows of an item."""
    absent = Fraction(1)
    for drawn in range(draws):
        absent *= Fraction(max(others - count - drawn, 0), others - drawn)
    return absent


def epoch_counts(parts, *, unique, counts, always=()):
    """Compute the expected count of every item from draws without replacement, pooled.

    parts: (draws, rows) of independent draws of rows without replacement, each item having `counts` of the rows.
    """
    result = []
    for item, count in enumerate(counts):
        absent, total = Fraction(1), Fraction(0)
        for draws, rows in parts:
            absent *= epoch_absence(draws, count, rows)
            total += Fraction(draws * count, rows)
        result.append(1.0 if item in always else float(1 - absent if unique else total))
    return result


class StreamingGaps:
    """The gap estimator in rows, one item at a time."""

    def __init__(self, rate, patience=5.0, rows=None):
        self.rate, self.patience, self.rows = rate, patience, rows
        self.gap, self.last, self.number, self.clock = {}, {}, {}, 0

    def observe(self, items):
        self.clock += len(items)
        for item in set(items):
            times = items.count(item)
            elapsed = self.clock - self.last.get(item, 0)
            old = self.gap.get(item)
            if old is None:
                chance = (len(items) / elapsed) ** (times - 1)
                if self.rows is not None and elapsed <= self.rows:
                    elapsed = self.rows * sum(1.0 / (self.rows - k) for k in range(elapsed))
                self.gap[item], self.number[item] = (chance * elapsed + (1 - chance) * len(items)) / times, 0
            else:
                self.number[item] += times
                weight = max(1.0 - (1.0 - self.rate) ** times, times / self.number[item])
                self.gap[item] = (1.0 - weight) * old + weight * elapsed / times
            self.last[item] = self.clock

    def probability(self, item):
        if item not in self.gap:
            return 0.0
        return 1.0 / max(1.0, self.gap[item], (self.clock - self.last[item]) / self.patience)


def step_gaps(batches, rate):
    """Compute the published form with gaps in steps: 1/B[h] is the probability of being in a batch."""
    gap, last = {}, {}
    for step, batch in enumerate(batches, start=1):
        for item in set(batch):
            between = step - last.get(item, 0)
            gap[item] = between if item not in gap else (1.0 - rate) * gap[item] + rate * between
            last[item] = step
    return {item: 1.0 / value for item, value in gap.items()}


def popularity_decile(counts):
    """Compute each item's decile of the interactions by walking down the popularity ranking."""
    order = sorted(range(len(counts)), key=lambda item: (-counts[item], item))
    total, before, decile = sum(counts), 0, [0] * len(counts)
    for item in order:
        decile[item] = min(10 * before // total, 9)
        before += counts[item]
    return decile


def _softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _log_sum(terms):
    largest = max(terms)
    return largest + math.log(sum(math.exp(term - largest) for term in terms))


def log_corrections(name, *, rows, extra, p, num_items, total):
    """Return what each method of docs/theory.md subtracts: (from a candidate of a source, from the positive).

    rows: B. extra: draws of the second source, or of the only one. p: frequency of every item. total: R.
    """
    uniform = 1.0 / num_items
    candidate = {
        "full-softmax": lambda j, source: 0.0,
        "sampled-softmax-uniform": lambda j, source: math.log(extra * uniform),
        "in-batch": lambda j, source: 0.0,
        "in-batch-logq": lambda j, source: math.log(p[j]),
        "in-batch-logq-batch-probability": lambda j, source: math.log(1.0 - (1.0 - p[j]) ** rows),
        "in-batch-logq-all": lambda j, source: math.log(p[j]),
        "in-batch-importance": lambda j, source: -math.log(uniform / p[j]),
        "uniform-importance": lambda j, source: math.log(uniform / p[j]) if p[j] else math.inf,
        "mixed": lambda j, source: math.log((rows * p[j] + extra * uniform) / (rows + extra)),
        "mixed-by-source": lambda j, source: math.log(p[j] if source == "in_batch" else uniform),
        "mixed-by-source-batch-probability": lambda j, source: math.log(
            1.0 - ((1.0 - p[j]) ** rows if source == "in_batch" else (1.0 - uniform) ** extra)
        ),
        "expected-count": lambda j, source: math.log(
            1.0 - float(epoch_absence(rows - 1, round(p[j] * total), total - 1)) * (1.0 - uniform) ** extra
        ),
        "sampled-logistic": lambda j, source: math.log((rows - 1) * p[j] * total / (total - 1) + extra * uniform),
        "nce": lambda j, source: math.log(extra * p[j]),
    }.get(name, lambda j, source: 0.0)
    positive = candidate if name in {"in-batch-logq-all", "sampled-logistic", "nce"} else lambda j, source: 0.0
    return candidate, lambda y: positive(y, "in_batch")


def refined_row(score, scores, q, q_y, strength=1.0):
    """Compute (1 - P_hat(y), -log( exp s_y / sum_i exp(s_i - log Q'_i) )), with kappa^strength for kappa = n' Q'."""
    if not scores:
        return 0.0, 0.0
    log_left = strength * math.log(len(scores))
    log_sum = _log_sum([s - strength * (math.log(q_j) - math.log(1.0 - q_y)) for s, q_j in zip(scores, q, strict=True)])
    return 1.0 / (1.0 + math.exp(score - (log_sum - log_left))), log_sum - score


def objective(name, query, table, positives, candidates, *, known, temperature, bias, strength, settings, weights=None):
    """Compute one loss per row by the formulas of docs/theory.md, section 3.

    candidates: for each row its (item, source) pairs as drawn, copies kept. settings: arguments of `log_corrections`.
    weights: fixed weights of the rows of refined logQ (they have no gradient).
    """
    candidate, of_positive = log_corrections(name, **settings)
    losses = []
    for row, y in enumerate(positives):
        own = name == "nce"
        live = [(j, s) for j, s in candidates[row] if (own and j == y) or (j != y and j not in known[row])]
        live = [(j, s) for j, s in live if candidate(j, s) < math.inf]  # of weight zero
        score = dot(query[row], table[y]) / temperature
        raw = [dot(query[row], table[j]) / temperature for j, _ in live]
        corrected = [s - strength * candidate(j, source) for s, (j, source) in zip(raw, live, strict=True)]
        if name == "refined-logq":
            p = settings["p"]
            masked = sum(p[j] for j in known[row] | {y})
            weight, loss = refined_row(score, raw, [p[j] for j, _ in live], masked, strength)
            losses.append((weight if weights is None else weights[row]) * loss)
        elif name == "bpr":
            losses.append(sum(_softplus(s - score) for s in corrected) / max(len(corrected), 1))
        elif name in {"negative-sampling", "logistic-observed", "logistic-popular", "sampled-logistic", "nce", "gbce"}:
            beta = 1.0
            if name == "gbce":
                rate = settings["extra"] / (settings["num_items"] - 1)
                beta = rate * (0.75 * (1.0 - 1.0 / rate) + 1.0 / rate)
            raised = score + bias - strength * of_positive(y)
            losses.append(beta * _softplus(-raised) + sum(_softplus(s + bias) for s in corrected))
        else:
            raised = score - strength * of_positive(y)
            losses.append(_log_sum([raised, *corrected]) - raised)
    return losses


def _row_gradients(weight, rows, targets):
    """Sum the gradients of |w_row - target|^2 over a step's rows, per distinct row."""
    gradients = {}
    for row, target in zip(rows, targets, strict=True):
        sums = gradients.setdefault(row, [0.0] * len(target))
        for d, goal in enumerate(target):
            sums[d] += 2.0 * (weight[row][d] - goal)
    return gradients


def adam_table(weight, steps, targets, *, lr, eps, betas=(0.9, 0.999)):
    """Apply Adam to the touched rows of a table, one number at a time; other rows keep mean, variance and weight."""
    weight = [list(row) for row in weight]
    mean, variance = [[0.0] * len(row) for row in weight], [[0.0] * len(row) for row in weight]
    for t, (rows, goals) in enumerate(zip(steps, targets, strict=True), start=1):
        for row, gradient in _row_gradients(weight, rows, goals).items():
            for d, g in enumerate(gradient):
                mean[row][d] = betas[0] * mean[row][d] + (1 - betas[0]) * g
                variance[row][d] = betas[1] * variance[row][d] + (1 - betas[1]) * g * g
                unbiased, square = mean[row][d] / (1 - betas[0] ** t), variance[row][d] / (1 - betas[1] ** t)
                weight[row][d] -= lr * unbiased / (math.sqrt(square) + eps)
    return weight


def adagrad_table(weight, steps, targets, *, lr, eps):
    """Apply row-wise Adagrad, one number at a time."""
    weight = [list(row) for row in weight]
    total = [0.0] * len(weight)
    for rows, goals in zip(steps, targets, strict=True):
        for row, gradient in _row_gradients(weight, rows, goals).items():
            total[row] += sum(g * g for g in gradient) / len(gradient)
            for d, g in enumerate(gradient):
                weight[row][d] -= lr * g / (math.sqrt(total[row]) + eps)
    return weight
