"""Every tensor op once more, as loops over Python lists, written from the description of the methods and not from the
code."""

from __future__ import annotations

import math
from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def softmax(row: Sequence[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    return [p / sum(powers) for p in powers]


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


# ---- score


def cls_attention(query: Sequence[Matrix], key: Sequence[Matrix], scaling: float) -> list[float]:
    """[H][1 + N][d]: softmax of the CLS row over all keys, CLS dropped from the result, summed over heads."""
    total = [0.0] * (len(key[0]) - 1)
    for q, k in zip(query, key, strict=True):
        weights = softmax([scaling * dot(q[0], row) for row in k])
        total = [t + w for t, w in zip(total, weights[1:], strict=True)]
    return total


def column_attention(query: Sequence[Matrix], key: Sequence[Matrix], scaling: float) -> list[float]:
    """[H][N][d]: how much every token is looked at by all tokens, mean over heads."""
    total = [0.0] * len(key[0])
    for q, k in zip(query, key, strict=True):
        for row in q:
            for column, weight in enumerate(softmax([scaling * dot(row, other) for other in k])):
                total[column] += weight / len(query)
    return total


def query_attention(
    query: Sequence[Matrix],
    key: Sequence[Matrix],
    scaling: float,
    allowed: Sequence[Sequence[bool]],
    weight: Sequence[float],
) -> list[float]:
    """[H][Q][d] on [Hkv][T][d]: mean over heads and weighted mean over queries of the softmax over the keys each query
    may see."""
    share = len(query) // len(key)
    total = [0.0] * len(key[0])
    for head, q in enumerate(query):
        for row, mask, w in zip(q, allowed, weight, strict=True):
            seen = [t for t, ok in enumerate(mask) if ok]
            for t, attention in zip(
                seen, softmax([scaling * dot(row, key[head // share][t]) for t in seen]), strict=True
            ):
                total[t] += w * attention / (len(query) * sum(weight))
    return total


# ---- select


def best(scores: Sequence[float], valid: Sequence[bool], count: int) -> list[int]:
    """Indices of the ``count`` best valid tokens, best first, the lower index on a tie."""
    return sorted((i for i, ok in enumerate(valid) if ok), key=lambda i: (-scores[i], i))[:count]


def quantile(values: Sequence[float], q: float) -> float:
    """Between the two values around place q * (n - 1), as far as the place is."""
    ordered, place = sorted(values), q * (len(values) - 1)
    low = ordered[math.floor(place)]
    return low + (ordered[math.ceil(place)] - low) * (place - math.floor(place))


def outliers(values: Sequence[float]) -> list[int]:
    first, third = quantile(values, 0.25), quantile(values, 0.75)
    return [i for i, value in enumerate(values) if value > third + 1.5 * (third - first)]


def spaced(valid: Sequence[bool], count: int) -> list[int]:
    """``count`` of the valid tokens, one from the end of each of ``count`` equal shares of them."""
    real = [i for i, ok in enumerate(valid) if ok]
    return [real[-(-(share * len(real)) // count) - 1] for share in range(1, count + 1)]


# ---- merge


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    norms = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return dot(a, b) / norms if norms else 0.0


def merged(features: Matrix, anchor: int, members: Sequence[int], rule: str) -> list[float]:
    """What an anchor becomes when ``members`` join it."""
    if not members:
        return list(features[anchor])
    mean = [sum(features[m][c] for m in members) / len(members) for c in range(len(features[0]))]
    if rule == "anchor_plus_mean":
        return [a + m for a, m in zip(features[anchor], mean, strict=True)]
    return [(a + len(members) * m) / (1 + len(members)) for a, m in zip(features[anchor], mean, strict=True)]


def weighed(features: Matrix, members: Sequence[int], weights: Sequence[float]) -> list[float]:
    """What a row becomes that is nothing but its members, each times its weight."""
    return [sum(w * features[m][c] for m, w in zip(members, weights, strict=True)) for c in range(len(features[0]))]


def matched(metric: Matrix, protected: int) -> list[tuple[int, int]]:
    """Who looks at whom: every even place that is not protected and the odd one most like it, the most alike pair
    first."""
    odd = [i for i in range(1, len(metric), 2) if i >= protected]
    pairs = []
    for i in range(0, len(metric), 2):
        if i >= protected and odd:
            likeness = [cosine(metric[i], metric[j]) for j in odd]
            nearest = first_largest(likeness)
            pairs.append((-round(likeness[nearest], 6), i, odd[nearest]))
    return [(i, j) for _, i, j in sorted(pairs)]


# ---- V2V of the papers, for one span

# dominant tokens in raster order; anchor -> the tokens that join it, anchors in order
Entry = tuple[list[int], dict[int, list[int]]]


def join(pool: Sequence[int], anchors: Sequence[int], keys: Matrix) -> dict[int, list[int]]:
    clusters: dict[int, list[int]] = {anchor: [] for anchor in anchors}
    if not anchors:
        return clusters
    for token in pool:
        if token not in clusters:
            likeness = [cosine(keys[token], keys[anchor]) for anchor in anchors]
            clusters[anchors[likeness.index(max(likeness))]].append(token)
    return clusters


def anchor_ranks(pool: int, count: int, rule: str) -> list[int]:
    if rule == "spread":
        return [i * pool // count for i in range(count)]
    return [i * max(1, pool // count) for i in range(count) if i * max(1, pool // count) < pool]


def duet_entry(
    importance: Sequence[float], keys: Matrix, dominant: int, contextual: int, width: int, rule: str
) -> Entry:
    """The ``dominant`` most important stay; of the next ``width * contextual`` by importance, anchors at even ranks
    take the others in."""
    order = best(importance, [True] * len(importance), len(importance))
    pool = order[dominant : dominant + width * contextual]
    anchors = [pool[rank] for rank in anchor_ranks(len(pool), contextual, rule)] if contextual else []
    return sorted(order[:dominant]), join(pool, anchors, keys)


def visionzip_entry(importance: Sequence[float], keys: Matrix, dominant: int, contextual: int, rule: str) -> Entry:
    """The ``dominant`` most important stay; every other token joins the most similar of ``contextual`` anchors, even in
    raster order."""
    kept = sorted(best(importance, [True] * len(importance), dominant))
    others = [i for i in range(len(importance)) if i not in kept]
    anchors = [others[rank] for rank in anchor_ranks(len(others), contextual, rule)] if contextual else []
    return kept, join(others, anchors, keys)


# ---- greedy choices, for one span


def coverage(chosen: Sequence[int], features: Matrix) -> float:
    """How well the chosen tokens stand for all: the sum, over every token, of its likeness to the chosen one most like
    it (none: 0)."""
    return sum(max([0.0, *(cosine(row, features[v]) for v in chosen)]) for row in features)


def scope_entry(importance: Sequence[float], features: Matrix, count: int, alpha: float) -> list[int]:
    """Tokens in the order in which they are chosen: each has the largest gain in coverage times importance ** alpha, on
    a tie the first."""
    chosen: list[int] = []
    while len(chosen) < count:
        before = coverage(chosen, features)
        rest = [v for v in range(len(features)) if v not in chosen]
        score = [(coverage([*chosen, v], features) - before) * importance[v] ** alpha for v in rest]
        chosen.append(rest[first_largest(score)])
    return chosen


def cover_in_steps(importance: Sequence[float], features: Matrix, count: int, picks: int) -> list[int]:
    """As ``scope_entry`` with alpha 1, ``picks`` tokens per step: of the 4 * picks with the largest scores those whose
    score, times 1 - the likeness to the most similar one with a larger score, is largest."""
    chosen: list[int] = []
    while len(chosen) < count:
        before = coverage(chosen, features)
        rest = [v for v in range(len(features)) if v not in chosen]
        score = {v: (coverage([*chosen, v], features) - before) * importance[v] for v in rest}
        large = sorted(rest, key=lambda v: (-round(score[v], 9), v))[: 4 * picks]
        fresh = [
            1 - max([0.0, *(cosine(features[v], features[u]) for u in large[:rank])]) for rank, v in enumerate(large)
        ]
        order = sorted(range(len(large)), key=lambda rank: (-round(score[large[rank]] * fresh[rank], 9), rank))
        chosen += [large[rank] for rank in order[:picks]]
    return chosen[:count]


def divprune_entry(features: Matrix, count: int) -> list[int]:
    """Tokens in the order in which they are chosen: first the loneliest, then whoever is farthest from the nearest
    chosen one."""
    chosen: list[int] = []
    while len(chosen) < count:
        rest = [v for v in range(len(features)) if v not in chosen]
        others = {v: chosen or [u for u in rest if u != v] for v in rest}
        distance = [min((1 - cosine(features[v], features[u]) for u in others[v]), default=0.0) for v in rest]
        chosen.append(rest[first_largest(distance)])
    return chosen


def vispruner_entry(importance: Sequence[float], features: Matrix, count: int, important: int) -> list[int]:
    """The ``important`` most attended tokens, and of the others those that are left when similar ones leave, eight at a
    time."""
    order = sorted(range(len(features)), key=lambda v: (-importance[v], v))
    chosen, rest, wanted = order[:important], order[important:], count - important
    while len(rest) > wanted > 0:
        asked, between = rest[0::2], rest[1::2]
        best = {v: max((cosine(features[v], features[u]) for u in between), default=-2.0) for v in asked}
        asked.sort(key=lambda v: -best[v])
        leave = min(8, len(rest) - wanted, len(asked))
        rest = asked[leave:] + between
    return sorted(chosen + (rest if wanted > 0 else []))


def nearest(keys: Matrix, token: int, times: Sequence[int]) -> list[int]:
    """All other tokens that are there, and the token itself if it is there more than once, the most similar first."""
    there = [v for v, n in enumerate(times) if n > (v == token)]
    return sorted(there, key=lambda v: (-round(cosine(keys[token], keys[v]), 6), v))


def around(
    importance: Sequence[float], keys: Matrix, kept: Sequence[int], neighbours: int, rest_row: bool, rule: str = "mean"
) -> list[dict[int, float]]:
    """PruMerge: what each row is made of, token -> weight; behind the rows of the kept tokens one of all others."""
    share = [value / sum(importance) for value in importance] if rule == "mean" else list(importance)
    once = [1] * len(keys)
    rows = [{token: 1.0} | {v: share[v] for v in nearest(keys, token, once)[:neighbours]} for token in kept]
    if rest_row:
        rows.append({v: share[v] for v in range(len(keys)) if v not in kept})
    return [{v: w / sum(row.values()) for v, w in row.items()} if rule == "mean" else row for row in rows]


def prumerge_plus_entry(importance: Sequence[float], count: int, important: float) -> list[int]:
    """Outliers, at most a share of ``count`` of them, and evenly spaced tokens of the others."""
    everyone = [True] * len(importance)
    attended = best(importance, everyone, min(len(outliers(importance)), math.ceil(count * important)))
    even = count - len(attended)
    return sorted(attended + (spaced([i not in attended for i in range(len(importance))], even) if even else []))


def tome_entry(keys: Matrix, count: int, order: str, pace: int) -> list[list[int]]:
    """Groups of tokens, in rows; the first of each is where the row stands. One of ``pace`` that are left goes in every
    round."""
    groups = [[i] for i in range(len(keys))]
    while len(groups) > max(1, count):
        mean = [[sum(keys[i][c] for i in group) / len(group) for c in range(len(keys[0]))] for group in groups]
        pairs = matched(mean, 0)
        leave = min(len(groups) - max(1, count), max(1, len(groups) // pace))
        for i, j in pairs[:leave]:
            groups[j] = [*groups[j], *groups[i]]
        gone = {i for i, _ in pairs[:leave]}
        if order == "raster":
            groups = [group for i, group in enumerate(groups) if i not in gone]
        else:
            alone = [len(groups) - 1] if len(groups) == 1 else []
            groups = [groups[i] for i, _ in pairs[leave:]] + [groups[i] for i in alone] + groups[1::2]
    return groups[:count]


def duet_plus_entry(
    importance: Sequence[float], rows: Matrix, count: int, alpha: float, pool: float, tau: float
) -> tuple[list[int], dict[int, list[int]]]:
    """Chosen tokens in raster order, and for each the tokens that merge into it: of the floor(pool * count) most
    important others those whose most similar chosen token is closer than ``tau``."""
    most = max(importance, default=1.0)
    weight = [(value / most) ** alpha for value in importance]
    size = range(len(rows))
    kernel = [[weight[i] * weight[j] * (0.05 * (i == j) + cosine(rows[i], rows[j])) for j in size] for i in size]
    chosen: list[int] = []
    while len(chosen) < count:  # what the chosen leave unexplained, by elimination
        best_left = max((i for i in size if i not in chosen), key=lambda i: (round(kernel[i][i], 9), -i))
        pivot = kernel[best_left]
        kernel = [
            [value - row[best_left] * pivot[j] / pivot[best_left] for j, value in enumerate(row)] for row in kernel
        ]
        chosen.append(best_left)
    chosen.sort()
    clusters: dict[int, list[int]] = {token: [] for token in chosen}
    offered = best(importance, [i not in chosen for i in size], math.floor(pool * count + 1e-9)) if chosen else []
    for token in offered:
        likeness = [cosine(rows[token], rows[other]) for other in chosen]
        nearest = first_largest(likeness)
        if likeness[nearest] > tau + 1e-9:
            clusters[chosen[nearest]].append(token)
    return chosen, clusters


def first_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: (round(values[i], 9), -i))


# ---- text queries


def query_rows(
    kind: str,
    visual: Sequence[bool],
    valid: Sequence[bool],
    labels: Sequence[int] | None = None,
    salient: Sequence[bool] | None = None,
    turns: str = "first",
) -> list[int]:
    """The rows that rank visual tokens, for one sample."""
    last_visual = max((i for i, v in enumerate(visual) if v), default=-1)
    text = [i for i, ok in enumerate(valid) if ok and i > last_visual]
    if labels is None:
        rows = text
    else:
        answer = {i for i in text if labels[i] != -100}
        first = min(answer, default=len(valid))
        rows = [i for i in text if i not in answer and (turns == "all" or i < first)]
        if kind == "last" and answer:
            starts = [i for i in sorted(answer) if i - 1 not in answer]
            asked = [i - 1 for i in (starts if turns == "all" else starts[:1])]
            return [i for i in asked if i in rows]
    if kind == "last":
        return rows[-1:]
    if kind == "salient":
        assert salient is not None
        return [i for i in rows if salient[i]]
    return rows


def suppressed(rows: Matrix, score: Sequence[float], count: int, threshold: float) -> list[int]:
    """Non-maximum suppression: first those that resemble none before them, then the best of the others."""
    order = sorted(range(len(rows)), key=lambda i: (-score[i], i))
    kept: list[int] = []
    for i in order:
        if len(kept) < count and not any(alike(rows[i], rows[j]) >= threshold for j in kept):
            kept.append(i)
    kept += [i for i in order if i not in kept][: count - len(kept)]
    return sorted(kept)


def apart(rows: Matrix, steps: int, start: int) -> list[int]:
    """Farthest point sampling: each pick is the farthest from all before it."""
    picks = [start]
    while len(picks) < steps:
        rest = [i for i in range(len(rows)) if i not in picks]
        picks.append(max(rest, key=lambda i: (min(math.dist(rows[i], rows[j]) for j in picks), -i)))
    return picks[:steps]


def solved(table: list[list[float]], right: list[float]) -> list[float]:
    """Gauss with pivots."""
    rows = [[*row, value] for row, value in zip(table, right, strict=True)]
    for i in range(len(rows)):
        pivot = max(range(i, len(rows)), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(len(rows)):
            if r != i:
                factor = rows[r][i] / rows[i][i]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [row[-1] / row[i] for i, row in enumerate(rows)]


def left_over(row: Sequence[float], basis: Matrix, ridge: float) -> list[float]:
    """A row less the combination of the basis that is nearest to it, squared coefficients times ``ridge`` counted in."""
    if not basis:
        return list(row)
    table = [[dot(a, b) + ridge * (i == j) for j, b in enumerate(basis)] for i, a in enumerate(basis)]
    mix = solved(table, [dot(b, row) for b in basis])
    return [x - sum(m * b[c] for m, b in zip(mix, basis, strict=True)) for c, x in enumerate(row)]


def approximated(rows: Matrix, count: int, basis: int, ridge: float) -> tuple[list[int], dict[int, list[int]]]:
    """Who stays, and who is averaged into whom: the basis and the largest errors stay, the rest joins what it resembles
    most of the latter."""
    if count == len(rows):
        return list(range(count)), {}
    start = max(range(len(rows)), key=lambda i: (dot(rows[i], rows[i]), -i))
    spread = apart(rows, min(basis, count - 1), start)
    error = {
        i: math.hypot(*left_over(rows[i], [rows[b] for b in spread], ridge))
        for i in range(len(rows))
        if i not in spread
    }
    main = sorted(error, key=lambda i: (-error[i], i))[: count - len(spread)]
    joined: dict[int, list[int]] = {}
    for i in sorted(set(error) - set(main)):
        joined.setdefault(max(main, key=lambda m: (alike(rows[i], rows[m]), -m)), []).append(i)
    return sorted(main + spread), joined


def alike(a: Sequence[float], b: Sequence[float]) -> float:
    """Cosine; 0 for rows of zeros."""
    lengths = math.hypot(*a) * math.hypot(*b)
    return dot(a, b) / lengths if lengths else 0.0


def discounted(rows: Matrix, score: Sequence[float], count: int) -> list[int]:
    """The largest score, which takes of all others the square of their cosine with it; and again."""
    left, kept = dict(enumerate(score)), []
    while len(kept) < count:
        best = max(left, key=lambda i: (left[i], -i))
        kept.append(best)
        del left[best]
        left = {i: x * (1 - alike(rows[i], rows[best]) ** 2) for i, x in left.items()}
    return sorted(kept)


def sieved(rows: Matrix, text: Matrix, scores: Matrix, count: int, heads: int, energy: float) -> list[int]:
    """Attention of the heads that look most, squared, times the squared share that text cannot say, discounted by
    likeness of what is left."""
    middle = [sum(column) / len(text) for column in zip(*text, strict=True)]
    words, seen = ([[x - m for x, m in zip(row, middle, strict=True)] for row in table] for table in (text, rows))
    values = sorted((max(0.0, x) for x in eigenvalues([[dot(a, b) for b in words] for a in words])), reverse=True)
    reached, largest = 0.0, 0.0
    for largest in values:
        reached += largest
        if reached >= energy * sum(values) * (1 - 1e-9):
            break
    rest = [left_over(row, words, largest + 1e-6) for row in seen]
    share = [math.hypot(*r) / math.hypot(*row) for r, row in zip(rest, seen, strict=True)]
    mass = [sum(column) for column in zip(*scores, strict=True)]
    looking = sorted(range(len(mass)), key=lambda h: (-mass[h], h))[:heads]
    attention = [sum(row[h] for h in looking) for row in scores]
    return discounted(rest, [(a * s) ** 2 for a, s in zip(attention, share, strict=True)], count)


def eigenvalues(table: list[list[float]]) -> list[float]:
    """Of a symmetric matrix, by Jacobi rotations."""
    rows, n = [row[:] for row in table], len(table)
    for _ in range(60):
        for p in range(n):
            for q in range(p + 1, n):
                if abs(rows[p][q]) < 1e-15:
                    continue
                angle = 0.5 * math.atan2(2 * rows[p][q], rows[q][q] - rows[p][p])
                c, s = math.cos(angle), math.sin(angle)
                for k in range(n):
                    rows[k][p], rows[k][q] = c * rows[k][p] - s * rows[k][q], s * rows[k][p] + c * rows[k][q]
                for k in range(n):
                    rows[p][k], rows[q][k] = c * rows[p][k] - s * rows[q][k], s * rows[p][k] + c * rows[q][k]
    return [rows[i][i] for i in range(n)]
