"""The allocation against all choices there are."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squeezellm_hf.pipeline.allocation import allocate

Layers = list[list[tuple[int, int]]]

layers_of_candidates = st.lists(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 1000)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


def split(layers: Layers) -> tuple[list[list[int]], list[list[int]]]:
    return [[w for w, _ in c] for c in layers], [[v for _, v in c] for c in layers]


def enumerated(layers: Layers, limit: int) -> int | None:
    """The least total value within the limit, by trying everything."""
    totals = (
        (sum(w for w, _ in choice), sum(v for _, v in choice))
        for choice in itertools.product(*layers)
    )
    return min((value for weight, value in totals if weight <= limit), default=None)


@settings(max_examples=300, deadline=None)
@given(layers_of_candidates, st.integers(0, 300))
def test_is_the_optimum_of_all_choices(layers: Layers, limit: int) -> None:
    weights, values = split(layers)
    best = enumerated(layers, limit)
    if best is None:
        with pytest.raises(ValueError, match="below the least possible total"):
            allocate(weights, values, limit)
        return
    found = allocate(weights, values, limit)
    assert found.value == best
    assert found.lower_bound == best
    assert found.gap == 0
    assert found.weight == sum(w[c] for w, c in zip(weights, found.choices, strict=True)) <= limit
    assert found.value == sum(v[c] for v, c in zip(values, found.choices, strict=True))


@settings(max_examples=100, deadline=None)
@given(layers_of_candidates, st.integers(0, 300), st.integers(2, 5))
def test_with_few_states_it_stays_within_its_bound(
    layers: Layers, limit: int, most_states: int
) -> None:
    best = enumerated(layers, limit)
    if best is None:
        return
    found = allocate(*split(layers), limit, most_states=most_states)
    assert found.weight <= limit
    assert found.lower_bound <= best + 1e-9
    assert found.value >= best


@settings(max_examples=100, deadline=None)
@given(layers_of_candidates, st.lists(st.integers(0, 300), min_size=2, max_size=6))
def test_more_room_is_never_worse(layers: Layers, limits: list[int]) -> None:
    weights, values = split(layers)
    least = sum(min(w) for w in weights)
    found = [allocate(weights, values, limit).value for limit in sorted(limits) if limit >= least]
    assert found == sorted(found, reverse=True)


def test_a_large_instance_is_solved_to_a_small_gap() -> None:
    generator = np.random.default_rng(0)
    bits = np.array([2.1, 2.3, 2.6, 3.1, 3.3, 3.6, 4.2, 4.4, 4.7])
    size = generator.choice([110_592, 331_776, 884_736], 210)
    weights = np.round(size[:, None] * bits / 8)
    noise = generator.uniform(0.8, 1.2, (210, len(bits)))
    values = size[:, None] * generator.lognormal(0, 2, (210, 1)) * noise * 4.0**-bits
    limit = float(size.sum() * 3.3 / 8)
    found = allocate(weights.tolist(), values.tolist(), limit)
    assert 0.999 * limit <= found.weight <= limit
    assert found.gap < 1e-5
    uniform = values[:, 4].sum()
    assert found.value < 0.8 * uniform


def test_is_deterministic_and_takes_floats_as_weights() -> None:
    generator = np.random.default_rng(1)
    weights = generator.lognormal(0, 3, (40, 6)).tolist()
    values = generator.integers(1, 10_000, (40, 6)).tolist()
    limit = float(np.median(weights) * 200)
    first = allocate(weights, values, limit)
    assert first == allocate(weights, values, limit)
    assert first.weight <= limit


@pytest.mark.parametrize(
    ("weights", "values"), [([[]], [[]]), ([[1, 2]], [[1]]), ([[np.nan]], [[1]]), ([[-1]], [[1]])]
)
def test_refuses_malformed_layers(weights: list[list[float]], values: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="weights and"):
        allocate(weights, values, 10)
