"""The multiple-choice knapsack: one choice for each layer, the best that a limit allows.

    minimise  sum_l values[l][c_l]  over the choices c,  subject to  sum_l weights[l][c_l] <= limit

For a bit budget, weights are bytes and values predicted divergences; for a target divergence, the
other way round. Lagrange's relaxation gives a bound, and with it most choices can be ruled out;
dynamic programming over the rest finds the optimum (E. Zemel, 1984; H. Kellerer, U. Pferschy and
D. Pisinger, "Knapsack Problems", 2004, chapter 11).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Partial solutions kept beside one another. More are thinned out: the result may then miss the
# optimum, by no more than the bound tells.
_MOST_STATES = 1 << 18


@dataclass(frozen=True)
class Allocation:
    """A choice for every layer.

    Attributes:
        choices: index of the candidate of each layer.
        weight: their total weight, at most the limit.
        value: their total value.
        lower_bound: no choice within the limit has a smaller value. Equal to ``value`` if the
            choice is proven optimal.
    """

    choices: tuple[int, ...]
    weight: float
    value: float
    lower_bound: float

    @property
    def gap(self) -> float:
        """How much of the value better choices could save at most, in [0, 1]."""
        return (self.value - self.lower_bound) / self.value if self.value > 0 else 0.0


def allocate(
    weights: Sequence[Sequence[float]],
    values: Sequence[Sequence[float]],
    limit: float,
    *,
    most_states: int = _MOST_STATES,
) -> Allocation:
    """Solve the multiple-choice knapsack of this file. Deterministic.

    Args:
        weights: of each layer's candidates, finite, >= 0. Sums of integers stay exact.
        values: of the same candidates, finite, >= 0.
        limit: of the total weight.
        most_states: partial solutions to keep, at least 2: bounds time and memory.

    Raises:
        ValueError: if even the lightest choices exceed the limit.
    """
    layers = [_Layer(w, v) for w, v in zip(weights, values, strict=True)]
    least = sum(layer.weights[0] for layer in layers)
    if least > limit:
        raise ValueError(f"limit={limit:g} is below the least possible total, {least:g}")
    price, bound, choices = _relaxed(layers, limit)
    best = sum(layer.values[c] for layer, c in zip(layers, choices, strict=True))
    # Sums in another order differ in their last bits.
    tolerance = 1e-12 * max(best, abs(price) * limit, 1e-300)
    found, complete = _search(layers, limit, price, best - bound + tolerance, most_states)
    if found is not None:
        total = sum(layer.values[c] for layer, c in zip(layers, found, strict=True))
        if total < best:
            choices, best = found, total
    return Allocation(
        choices=tuple(int(layer.index[c]) for layer, c in zip(layers, choices, strict=True)),
        weight=float(sum(layer.weights[c] for layer, c in zip(layers, choices, strict=True))),
        value=float(best),
        lower_bound=float(best if complete else min(bound, best)),
    )


class _Layer:
    """A layer's candidates that no other one betters in both: weights rise and values fall.

    Attributes:
        weights, values: of these candidates.
        index: of each in the order it was given.
    """

    def __init__(self, weights: Sequence[float], values: Sequence[float]) -> None:
        if not len(weights) or len(weights) != len(values):
            raise ValueError(f"{len(weights)} weights and {len(values)} values of a layer")
        all_weights, all_values = np.asarray(weights, float), np.asarray(values, float)
        if not (np.isfinite([all_weights, all_values]).all() and (all_weights >= 0).all()):
            raise ValueError(f"weights and values must be finite and >= 0, got {weights}, {values}")
        order = np.lexsort((all_values, all_weights))
        falling = np.minimum.accumulate(all_values[order])
        kept = np.concatenate([[True], falling[1:] < falling[:-1]])
        self.index = order[kept]
        self.weights: Floats = all_weights[self.index]
        self.values: Floats = all_values[self.index]

    def steps(self) -> list[tuple[float, int, int]]:
        """Steps along the lower convex hull: (value saved per weight, from, to), falling."""
        hull: list[int] = []
        for point in range(len(self.index)):
            while len(hull) > 1 and self._slope(hull[-2], hull[-1]) <= self._slope(hull[-1], point):
                hull.pop()
            hull.append(point)
        return [(self._slope(a, b), a, b) for a, b in pairwise(hull)]

    def _slope(self, start: int, stop: int) -> float:
        saved = self.values[start] - self.values[stop]
        return float(saved / (self.weights[stop] - self.weights[start]))


def _relaxed(layers: list[_Layer], limit: float) -> tuple[float, float, list[int]]:
    """The price of weight at which the relaxation is tight, its bound, and a feasible choice."""
    steps = sorted(
        ((*step, number) for number, layer in enumerate(layers) for step in layer.steps()),
        key=lambda step: (-step[0], step[3], step[1]),
    )
    choices = [0] * len(layers)
    used = sum(float(layer.weights[0]) for layer in layers)
    price, blocked = 0.0, set()
    for slope, start, stop, number in steps:
        added = float(layers[number].weights[stop] - layers[number].weights[start])
        if number not in blocked and choices[number] == start and used + added <= limit:
            choices[number], used = stop, used + added
        else:
            # The first step that does not fit sets the price; later ones may still fill the rest.
            price = price or slope
            blocked.add(number)
    bound = sum(float((layer.values + price * layer.weights).min()) for layer in layers)
    return price, bound - price * limit, choices


def _search(
    layers: list[_Layer], limit: float, price: float, slack: float, most_states: int
) -> tuple[list[int] | None, bool]:
    """Dynamic programming over total weights, without what cannot beat a known solution.

    A choice's *regret* is how far its value + price * weight is above the least of its layer. A
    whole solution is worth the bound + its regrets + price * (limit - weight): so regrets and
    unused weight, priced, add up to at most ``slack`` in a better one.

    Returns:
        The best choice found, and whether it is proven to be the best.
    """
    priced = [layer.values + price * layer.weights for layer in layers]
    regrets = [p - p.min() for p in priced]
    allowed = [np.flatnonzero(regret <= slack) for regret in regrets]
    lightest = _remaining(
        [layer.weights[a].min() for layer, a in zip(layers, allowed, strict=True)]
    )
    heaviest = _remaining(
        [layer.weights[a].max() for layer, a in zip(layers, allowed, strict=True)]
    )
    weight, regret, value = np.zeros(1), np.zeros(1), np.zeros(1)
    history: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    complete = True
    for number, (layer, choice) in enumerate(zip(layers, allowed, strict=True)):
        new_weight = (weight[:, None] + layer.weights[choice]).ravel()
        new_value = (value[:, None] + layer.values[choice]).ravel()
        new_regret = (regret[:, None] + regrets[number][choice]).ravel()
        unused = np.maximum(limit - new_weight - heaviest[number], 0.0)
        sound = (new_weight + lightest[number] <= limit) & (new_regret + price * unused <= slack)
        order = np.flatnonzero(sound)
        order = order[np.lexsort((new_value[order], new_weight[order]))]
        if not len(order):
            return None, complete
        falling = np.minimum.accumulate(new_value[order])
        order = order[np.concatenate([[True], falling[1:] < falling[:-1]])]
        if len(order) > most_states:
            complete = False
            order = _thin(order, new_weight[order], new_regret[order], most_states)
        weight, value, regret = new_weight[order], new_value[order], new_regret[order]
        history.append((order // len(choice), choice[order % len(choice)]))
    state = int(value.argmin())
    choices: list[int] = []
    for parent, choice in reversed(history):
        choices.append(int(choice[state]))
        state = int(parent[state])
    return choices[::-1], complete


def _remaining(amounts: list[float]) -> Floats:
    """The sum of all later amounts, for each."""
    return np.append(np.cumsum(amounts[::-1])[::-1][1:], 0.0)


def _thin(
    order: NDArray[np.int64], weight: Floats, regret: Floats, most_states: int
) -> NDArray[np.int64]:
    """Of the states in each of ``most_states`` equal intervals of weight, that of least regret."""
    span = max(weight[-1] - weight[0], 1e-300)
    bucket = np.minimum((weight - weight[0]) / span * most_states, most_states - 1).astype(np.int64)
    ranked = np.lexsort((regret, bucket))
    first = np.concatenate([[True], np.diff(bucket[ranked]) > 0])
    return order[np.sort(ranked[first])]
