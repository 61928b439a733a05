"""Distillation on a GPU: graphs, mixed precision, and the same bits every time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from squeezellm_hf import SqueezeLLMConfig, quantize_model
from squeezellm_hf.distillation import checkpoint
from squeezellm_hf.distillation.trainer import Trainer
from squeezellm_hf.ops import tables
from squeezellm_hf.ops.tables import look_up, table_gradient
from tests.conftest import VOCABULARY, tiny_llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TEXT = torch.randint(0, VOCABULARY, (1600,), generator=torch.Generator().manual_seed(2))


def distilled(work_dir: Path | None = None, **changes: Any) -> Any:
    dtype = changes.pop("dtype", torch.bfloat16)
    config = SqueezeLLMConfig(
        **{
            "bits": 2,
            "dataset": None,
            "distill_steps": 24,
            "distill_dataset": TEXT,
            "distill_batch_size": 4,
            "distill_sequence_length": 32,
            "work_dir": None if work_dir is None else str(work_dir),
            **changes,
        }
    )
    return quantize_model(tiny_llama().to("cuda", dtype), None, config, progress=False)


def tensors(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, tensor in first.items():
        assert tensor.equal(second[name]), name


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many graphs every run captured."""
    capture, counts = Trainer._capture, []

    def counting(self: Trainer) -> Any:
        graphs = capture(self)
        counts.append(len(graphs))
        return graphs

    monkeypatch.setattr(Trainer, "_capture", counting)
    return counts


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_brings_the_model_nearer(captured: list[int], micro_batch_size: int | None) -> None:
    model = distilled(distill_micro_batch_size=micro_batch_size)
    record = model.config.quantization_config.distilled
    assert record["divergence_after"] < 0.99 * record["divergence_before"]
    assert captured == [1 if micro_batch_size is None else 2]


def test_a_graph_does_what_its_kernels_do(monkeypatch: pytest.MonkeyPatch) -> None:
    graphed = distilled()
    monkeypatch.setattr(Trainer, "_capture", lambda _: {})
    eager = distilled()
    ours, theirs = (m.config.quantization_config.distilled for m in (graphed, eager))
    assert ours["divergence_after"] == pytest.approx(theirs["divergence_after"], rel=0.02)


@pytest.mark.parametrize(
    "changes", [{}, {"distill_norms": True, "distill_values": True, "distill_indices": True}]
)
def test_resumption_ends_in_the_same_bits(
    changes: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr(checkpoint, "WRITE_SHARE", float("inf"))
    step, steps = Trainer._step, []

    def dying(self: Trainer) -> Tensor:
        if len(steps) == 7:
            raise KeyboardInterrupt
        steps.append(self.progress.step)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", dying)
        with pytest.raises(KeyboardInterrupt):
            distilled(tmp_path / "killed", **changes)
    resumed = distilled(tmp_path / "killed", **changes)
    assert_identical(tensors(resumed), tensors(distilled(**changes)))


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_tables_are_those_of_a_cpu(
    bits: int, triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not triton:
        monkeypatch.setattr(tables, "_triton", lambda: None)
    elif tables._triton() is None:
        pytest.skip("no Triton")
    for columns in (500, 2049):
        indices = torch.randint(0, 2**bits, (300, columns), dtype=torch.uint8)
        grad = torch.randn(300, columns).bfloat16()
        expected = table_gradient(grad, indices, 2**bits)
        actual = table_gradient(grad.cuda(), indices.cuda(), 2**bits)
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-4)
        assert table_gradient(grad.cuda(), indices.cuda(), 2**bits).equal(actual)
        table = torch.randn(300, 2**bits).bfloat16()
        weight = look_up(table.cuda(), indices.cuda())
        assert weight.cpu().equal(look_up(table, indices))


def test_an_fp32_model() -> None:
    record = distilled(dtype=torch.float32).config.quantization_config.distilled
    assert record["divergence_after"] < record["divergence_before"]
