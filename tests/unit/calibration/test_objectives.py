"""What calibration differentiates: each objective against what it stands for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional

from squeezellm_hf.calibration.objectives import (
    IGNORED,
    CausalLM,
    MaskedLM,
    Objective,
    Outputs,
    SampledLabels,
    Seq2SeqLM,
    to_device,
)

DRAWS = 3000


class Net(nn.Module):
    """Two layers in fp64; the result has logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4, dtype=torch.float64)
        self.second = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        return {"logits": self.logits(x), "length": torch.tensor(3)}

    def logits(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class WithLogits(Net):
    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.logits(x))


class Recorder(nn.Module):
    """A language model that remembers what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input_ids: Tensor, labels: Any = None, **kwargs: Any) -> Any:
        self.seen = {"input_ids": input_ids, "labels": labels, **kwargs}
        return SimpleNamespace(loss=None if labels is None else self.scale * 3)


def mean_square(objective: Objective, model: nn.Module, x: Tensor) -> Tensor:
    """The mean of the squared gradients of the first weight over many draws."""
    total = torch.zeros(4, 3, dtype=torch.float64)
    for index in range(DRAWS):
        model.zero_grad()
        objective(model, {"x": x}, index).backward()
        total += model.first.weight.grad.square()
    return (total / DRAWS).detach()


def jacobian(model: nn.Module, x: Tensor, of: Any) -> Tensor:
    """d of(logits) / d first.weight: [..., 4, 3]."""
    parameters = dict(model.named_parameters())

    def outputs(weight: Tensor) -> Tensor:
        result = functional_call(model, parameters | {"first.weight": weight}, (x,))
        return of(result["logits"] if isinstance(result, dict) else result.logits)

    return jacrev(outputs)(model.first.weight)


def test_random_signs_estimate_the_fisher_of_a_gaussian() -> None:
    model, x = Net(), torch.randn(2, 3, dtype=torch.float64)
    expected = jacobian(model, x, lambda y: y.flatten()).square().mean(dim=0).detach()
    actual = mean_square(Outputs(), model, x)
    torch.testing.assert_close(actual, expected, rtol=0.12, atol=0.03 * expected.max().item())


def test_drawn_labels_estimate_the_true_fisher() -> None:
    model, x = WithLogits(), torch.randn(1, 3, dtype=torch.float64)
    slopes = jacobian(model, x, lambda y: functional.log_softmax(y[0], dim=-1))
    odds = functional.softmax(model(x).logits[0].detach(), dim=-1)
    expected = (odds[:, None, None] * slopes.square()).sum(dim=0).detach()
    actual = mean_square(SampledLabels(), model, x)
    torch.testing.assert_close(actual, expected, rtol=0.12, atol=0.03 * expected.max().item())


@pytest.mark.parametrize("objective", [Outputs(3), SampledLabels(3)])
def test_draws_depend_on_seed_and_index_alone(objective: Objective) -> None:
    model = WithLogits() if isinstance(objective, SampledLabels) else Net()
    x = {"x": torch.randn(8, 3, dtype=torch.float64)}
    losses = [float(objective(model, x, index).detach()) for index in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]
    assert float(type(objective)(4)(model, x, 0).detach()) != losses[0]


def test_outputs_need_a_floating_point_output() -> None:
    class Counter(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"count": x.long()}

    with pytest.raises(ValueError, match="Counter gives no floating-point output"):
        Outputs()(Counter(), {"x": torch.ones(2)}, 0)


def test_text_of_a_causal_model_is_its_own_label() -> None:
    model, ids = Recorder(), torch.arange(6)
    assert float(CausalLM()(model, ids, 0)) == 3
    assert model.seen["labels"].equal(ids[None])
    assert "use_cache" not in model.seen  # it has no config that knows of a cache
    model.config = SimpleNamespace(use_cache=True)
    CausalLM()(model, ids, 0)
    assert model.seen["use_cache"] is False
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    CausalLM()(model, {"input_ids": ids[None], "attention_mask": mask}, 0)
    assert model.seen["labels"].tolist() == [[0, 1, 2, 3, IGNORED, IGNORED]]
    assert model.seen["attention_mask"] is mask


@pytest.mark.parametrize("objective", [CausalLM(), MaskedLM(0, 9), Seq2SeqLM(), Outputs()])
def test_labels_that_are_given_are_used(objective: Objective) -> None:
    model, labels = Recorder(), torch.tensor([[7, 8]])
    sample = {"input_ids": torch.tensor([[1, 2]]), "labels": labels}
    assert float(objective(model, sample, 0)) == 3
    assert model.seen["labels"] is labels
    assert model.seen["input_ids"] is sample["input_ids"]
    assert set(sample) == {"input_ids", "labels"}


def test_hidden_tokens_are_those_to_be_predicted() -> None:
    model, ids = Recorder(), torch.arange(2, 10_002)
    objective = MaskedLM(seed=0, vocab_size=50_000, mask_token=1)
    objective(model, ids, 0)
    given, labels = model.seen["input_ids"][0], model.seen["labels"][0]
    chosen = labels != IGNORED
    assert given[~chosen].equal(ids[~chosen])
    assert labels[chosen].equal(ids[chosen])
    assert 0.13 < float(chosen.float().mean()) < 0.17
    assert 0.75 < float((given[chosen] == 1).float().mean()) < 0.85
    assert 0.07 < float((given[chosen] == ids[chosen]).float().mean()) < 0.13
    objective(model, ids, 1)
    assert not model.seen["labels"][0].equal(labels)
    objective(model, ids, 0)
    assert model.seen["labels"][0].equal(labels)


def test_without_a_mask_token_others_take_its_place() -> None:
    model, ids = Recorder(), torch.full((1000,), 5)
    MaskedLM(seed=0, vocab_size=100)(model, ids, 0)
    given, labels = model.seen["input_ids"][0], model.seen["labels"][0]
    changed = given != ids
    assert bool((labels[changed] == 5).all())
    assert len(given[changed].unique()) > 20


def test_padding_is_not_hidden_and_something_always_is() -> None:
    model, ids = Recorder(), torch.tensor([[5, 6, 0, 0, 0, 0, 0, 0]])
    mask = (ids > 0).long()
    objective = MaskedLM(seed=0, vocab_size=100, mask_token=1)
    for index in range(30):
        objective(model, {"input_ids": ids, "attention_mask": mask}, index)
        labels = model.seen["labels"]
        assert bool((labels[mask == 0] == IGNORED).all())
        assert bool((labels != IGNORED).any())


def test_an_encoder_reads_the_first_half() -> None:
    model = Recorder()
    Seq2SeqLM()(model, torch.arange(7), 0)
    assert model.seen["input_ids"].tolist() == [[0, 1, 2]]
    assert model.seen["labels"].tolist() == [[3, 4, 5, 6]]
    Seq2SeqLM()(model, {"input_ids": torch.arange(4)[None]}, 0)
    assert model.seen["labels"].tolist() == [[2, 3]]
    with_decoder = Outputs(encoder_decoder=True).from_text(torch.arange(4)[None])
    assert with_decoder["decoder_input_ids"].tolist() == [[2, 3]]
    assert Seq2SeqLM().from_text(torch.tensor([[4]]))["labels"].tolist() == [[4]]


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"dataset\[2\] has neither labels nor input_ids"):
        CausalLM()(Recorder(), {"inputs_embeds": torch.ones(1, 2)}, 2)
    with pytest.raises(ValueError, match=r"dataset\[1\] has input_features; Recorder also needs"):
        Seq2SeqLM()(Recorder(), {"input_features": torch.ones(1, 2)}, 1)

    class Headless(Recorder):
        def forward(self, input_ids: Tensor, labels: Any = None, **kwargs: Any) -> Any:
            return SimpleNamespace(loss=None)

    with pytest.raises(ValueError, match="Headless gives no loss for labels"):
        CausalLM()(Headless(), torch.arange(3), 0)


def test_samples_go_to_a_device() -> None:
    moved = to_device({"x": torch.ones(2), "flag": True}, torch.device("meta"))
    assert moved["x"].is_meta
    assert moved["flag"] is True
    assert to_device(torch.ones(2), torch.device("meta")).is_meta
