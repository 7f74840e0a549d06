"""What is searched: how many GPUs each stage of a pipeline has, and which types come first.

Source: Metis (USENIX ATC 2024), ``search_space`` of its repository. Two prunings: no stage is much smaller than the
mean, and long lists are permuted by pairs, pairs of pairs and so on of their smallest members.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, permutations

Sizes = tuple[int, ...]


def type_orders(types: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """In which the types may follow each other along the pipeline, the first in alphabetical order."""
    return permutations(sorted(set(types)))


def device_groups(gpus: int, stages: int, *, variance: float = 1.0, max_permute_len: int | None = 4) -> list[Sizes]:
    """GPUs of each stage: powers of two that sum to ``gpus``, none below ``variance`` times the mean size.

    ``max_permute_len``: longer lists are permuted in units of several members; None: never.
    """
    least = variance * max(gpus // stages, stages // gpus)
    sizes = [1 << k for k in range(gpus.bit_length()) if 1 << k >= least]
    return [
        tuple(chain(*order))
        for increasing in _sums(gpus, stages, sizes)
        for order in multiset_permutations(units(increasing, max_permute_len or stages))
    ]


def _sums(total: int, terms: int, sizes: list[int]) -> Iterator[Sizes]:
    """Non-decreasing lists of so many of these sizes."""
    if terms == 0:
        if total == 0:
            yield ()
        return
    for place, size in enumerate(sizes):
        if size * terms > total:
            return
        if sizes[-1] * terms >= total:
            for rest in _sums(total - size, terms - 1, sizes[place:]):
                yield size, *rest


def units(increasing: Sizes, most: int) -> list[Sizes]:
    """What is permuted as one: while there are more than ``most``, the smallest are joined in pairs.

    As many pairs as are too many, or half of those that are alike if that is more; fewer if no more are equal.
    """
    found: list[Sizes] = [(size,) for size in increasing]
    while (excess := len(found) - most) > 0:
        alike = next((place for place, unit in enumerate(found) if unit != found[0]), len(found))
        joined = _joined(found, max(excess, alike // 2))
        if len(joined) == len(found):
            return found
        found = joined
    return found


def _joined(found: list[Sizes], pairs: int) -> list[Sizes]:
    """The first pairs of neighbours become one each where both sum to the least."""
    least, joined = sum(found[0]), []
    for a, b in zip(found[: 2 * pairs : 2], found[1 : 2 * pairs : 2], strict=False):
        joined += [a + b] if sum(a) == sum(b) == least else [a, b]
    done = 2 * min(pairs, len(found) // 2)
    return joined + found[done:]


def multiset_permutations(items: list[Sizes]) -> Iterator[tuple[Sizes, ...]]:
    """Each once, the largest first in the first; every other is the one before with a prefix turned by one.

    Williams, Loopless generation of multiset permutations using a constant number of variables by prefix shifts
    (SODA 2009).
    """
    order = sorted(items, reverse=True)
    yield tuple(order)
    i = len(order) - 2
    while i >= 0 and (i + 2 < len(order) or order[i + 1] < order[0]):
        taken = i + 2 if i + 2 < len(order) and order[i] >= order[i + 2] else i + 1
        head, moved = order[0], order.pop(taken)
        order.insert(0, moved)
        i = 0 if moved < head else i + 1
        yield tuple(order)
