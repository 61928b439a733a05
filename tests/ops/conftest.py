"""Instruction sets as a fixture: tests that ask for it run once for each that this machine has."""

from collections.abc import Iterator

import pytest

import squeezellm_hf.ops  # noqa: F401  (loads the library)
from squeezellm_hf.ops import native


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "instruction_set" in metafunc.fixturenames:
        names = native.status().available
        absent = pytest.param(None, marks=pytest.mark.skip(reason=str(native.status().reason)))
        metafunc.parametrize("instruction_set", names or [absent], indirect=True)


@pytest.fixture
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    native.set_instruction_set(request.param)
    yield request.param
    native.set_instruction_set(None)
