from typing import Any

import pytest

from squeezellm_hf.methods import METHODS, get_method
from squeezellm_hf.methods.squeezellm import SqueezeLLMParameters, quantize_weight


def test_defaults_are_those_of_the_paper() -> None:
    parameters = SqueezeLLMParameters()
    assert (parameters.bits, parameters.solver, parameters.codebook) == (4, "lloyd", "kmeans")
    assert (parameters.outlier_fraction, parameters.sensitive_fraction) == (0.004, 0.0005)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_up_to_a_byte(bits: int) -> None:
    assert SqueezeLLMParameters(bits=bits).bits == bits


@pytest.mark.parametrize("bits", [0, 9, -1, 4.0, "4", True, None])
def test_other_bits_are_refused(bits: Any) -> None:
    with pytest.raises(ValueError, match=r"bits must be an integer from 1 to 8, got"):
        SqueezeLLMParameters(bits=bits)


@pytest.mark.parametrize("name", ["outlier_fraction", "sensitive_fraction"])
@pytest.mark.parametrize(
    "value", [-0.1, 0.5, 1, float("nan"), float("inf"), "0.1", None, True, False]
)
def test_fractions_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be a number in \[0, 0.5\), got"):
        SqueezeLLMParameters(**{name: value})


@pytest.mark.parametrize("value", [0, 0.0, 0.49])
def test_fractions_in_range(value: float) -> None:
    assert SqueezeLLMParameters(outlier_fraction=value).outlier_fraction == value


@pytest.mark.parametrize("solver", ["Lloyd", "dp", None, ["exact"]])
def test_unknown_solver_is_refused(solver: Any) -> None:
    with pytest.raises(ValueError, match="solver must be one of"):
        SqueezeLLMParameters(solver=solver)


def test_registry_finds_the_method() -> None:
    method = get_method("squeezellm")
    assert method is METHODS["squeezellm"]
    assert method.parameters is SqueezeLLMParameters
    assert method.quantize_weight is quantize_weight


@pytest.mark.parametrize("name", ["spqr-", "", None, ["squeezellm"]])
def test_unknown_method_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="method must be one of"):
        get_method(name)


@pytest.mark.parametrize("value", ["k-means", "LNQ", None, 3, ["lnq"]])
def test_unknown_codebook_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"codebook must be one of .*guided.*, got"):
        SqueezeLLMParameters(codebook=value)


@pytest.mark.parametrize("name", ["guided_groups", "lnq_rounds", "lnq_sweeps"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, None])
def test_counts_below_one_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got"):
        SqueezeLLMParameters(**{name: value})


def test_which_hessians_a_codebook_needs() -> None:
    assert SqueezeLLMParameters().hessian_groups is None
    assert SqueezeLLMParameters(codebook="lnq").hessian_groups == 0
    assert SqueezeLLMParameters(codebook="guided", guided_groups=3).hessian_groups == 3
