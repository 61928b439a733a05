"""Comparisons: cases as they are written, rows, resuming, who beats whom, table and picture."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from squeezellm_hf import SqueezeLLMConfig
from squeezellm_hf.evaluation import cases
from squeezellm_hf.evaluation.cases import DEFAULT_CASES, parse_case
from squeezellm_hf.evaluation.compare import beaten_by, compare, layer_names
from squeezellm_hf.evaluation.footprint import model_footprint
from squeezellm_hf.evaluation.peers.gptq import GPTQ
from squeezellm_hf.evaluation.peers.nf4 import NF4
from squeezellm_hf.evaluation.perplexity import perplexity
from squeezellm_hf.evaluation.plot import plot
from squeezellm_hf.evaluation.remembered import RememberedModel
from squeezellm_hf.evaluation.report import Column, decimals, markdown
from squeezellm_hf.integration.in_memory import quantize_model

from .conftest import tiny_llama

IDS = torch.randint(0, 97, (10, 24), generator=torch.Generator().manual_seed(3))
CALIBRATION, TEXT = IDS[:7], IDS[7:]


def load() -> LlamaForCausalLM:
    return tiny_llama(0)


def rows_of(*texts: str, **options: Any) -> list[dict[str, Any]]:
    return list(compare(load, [parse_case(t) for t in texts], CALIBRATION, TEXT, **options))


def test_cases_are_read() -> None:
    assert parse_case("nf4").peer == NF4()
    gptq = parse_case("gptq:bits=3,group_size=64,act_order=false,damping=0.1")
    assert gptq.peer == GPTQ(3, 64, act_order=False, damping=0.1)
    ours = parse_case('squeezellm:bits=3,overrides={"a": {"bits": 2}, "b": {"bits": 4}},seed=1')
    assert ours.peer.options == {  # type: ignore[attr-defined]
        "bits": 3,
        "overrides": {"a": {"bits": 2}, "b": {"bits": 4}},
        "seed": 1,
    }
    assert all(parse_case(text).text == text for text in DEFAULT_CASES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("awq", "case 'awq': 'awq' is no method; allowed are squeezellm, rtn"),
        ("gptq:bits", "'bits' is not option=value"),
        ("gptq:bit=3", "unknown option 'bit'; allowed are bits, group_size"),
        ("gptq:bits=three", "bits must be of type int, got 'three'"),
        ("gptq:act_order=1", "act_order must be of type bool, got 1"),
        ("rtn:bits=true", "bits must be of type int, got True"),
        ("rtn:bits=9", "bits=9 is not in 1 .. 8"),
        ("squeezellm:bits=9", "bits must be"),
        ("squeezellm:dataset=c4", "unknown option 'dataset'"),
    ],
)
def test_cases_that_are_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="case") as error:
        parse_case(text)
    assert message in str(error.value)


def test_what_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases.importlib.util, "find_spec", lambda name: None)
    assert parse_case("nf4").missing == "bitsandbytes is not installed (pip install bitsandbytes)"
    assert parse_case("rtn").missing is None


def test_what_is_broken_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert str(parse_case("nf4").missing).startswith("bitsandbytes cannot be imported: ")


def test_rows() -> None:
    case = "squeezellm:bits=3,codebook=lnq"
    original, ours, rtn = rows_of(case, "rtn:bits=2,group_size=16")
    assert original["perplexity"] == perplexity(load(), TEXT).perplexity
    assert (original["ratio"], original["bits_per_weight"]) == (1.0, 32.0)
    config = SqueezeLLMConfig(
        bits=3, codebook="lnq", dataset=CALIBRATION, n_samples=7, sequence_length=24
    )
    model = quantize_model(load(), None, config, progress=False)
    assert ours["perplexity"] == pytest.approx(perplexity(model, TEXT).perplexity)
    assert ours["bits_per_weight"] == pytest.approx(model_footprint(model).bits_per_weight)
    assert ours["bytes"] == model_footprint(model).n_bytes
    assert ours["ratio"] == ours["perplexity"] / original["perplexity"]
    assert rtn["bits_per_weight"] == 2 + (16 + 2) / 16
    assert rtn["kl_99"] > rtn["kl_mean"] > 0
    assert 0 < rtn["top1_agreement"] < 1
    assert set(layer_names(load())) == set(model.config.quantization_config.modules)


def test_a_comparison_goes_on_where_it_was(tmp_path: Path) -> None:
    first = rows_of("rtn:bits=3,group_size=16", work_dir=tmp_path)
    loads = []

    def counting() -> LlamaForCausalLM:
        loads.append(1)
        return load()

    again = [parse_case(t) for t in ("rtn:bits=3,group_size=16", "rtn:bits=2,group_size=16")]
    second = list(compare(counting, again, CALIBRATION, TEXT, work_dir=tmp_path))
    assert second[:2] == first
    assert len(loads) == 2  # the original, and the case that is new
    other_text = list(compare(load, again[:1], CALIBRATION, TEXT[:2], work_dir=tmp_path))
    assert other_text[1]["n_tokens"] == 2 * 23


def test_an_answer_is_remembered_as_far_as_memory_goes(model: LlamaForCausalLM) -> None:
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    one, two = TEXT[:1], TEXT[1:2]
    with torch.no_grad():
        logits = model(one).logits
        remembered = RememberedModel(model, max_bytes=2 * logits.numel() * 4 - 1)
        for ids in (one, two, one, two):
            assert remembered(input_ids=ids).logits.equal(model(ids).logits)
    hook.remove()
    # 5 by this test itself; the second text has no room and is computed twice
    assert len(calls) == 5 + 3
    assert remembered.device == model.device


def test_beaten_by_what_takes_no_more_bits() -> None:
    rows = [
        {"case": "ours 3", "method": "squeezellm", "bits_per_weight": 3.3, "perplexity": 20.0},
        {"case": "ours 4", "method": "squeezellm", "bits_per_weight": 4.3, "perplexity": 12.0},
        {"case": "a", "method": "rtn", "bits_per_weight": 3.29, "perplexity": 30.0},
        {"case": "b", "method": "gptq", "bits_per_weight": 4.31, "perplexity": 11.0},
        {"case": "c", "method": "gptq", "bits_per_weight": 3.0, "perplexity": 40.0},
        {"case": "d", "method": "hqq", "bits_per_weight": 4.5, "perplexity": 15.0},
    ]
    assert [beaten_by(row, rows) for row in rows] == [
        None, "b", "ours 3", None, None, "ours 4",
    ]  # fmt: skip


def test_markdown_shows_what_the_table_shows() -> None:
    columns = (Column("a", "name"), Column("b", "x", decimals(1)), Column("c", "never"))
    rows = [{"a": "p|q", "b": 1.25}, {"a": "r", "b": None}]
    assert markdown(rows, columns) == ("| name | x |\n| --- | ---: |\n| p\\|q | 1.2 |\n| r | - |\n")


def test_plot_holds_every_method(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"method": "squeezellm", "bits_per_weight": 3.3, "ratio": 1.2},
        {"method": "squeezellm", "bits_per_weight": 4.3, "ratio": 1.05},
        {"method": "gptq", "bits_per_weight": 4.2, "ratio": 1.2},
    ]
    plot(tmp_path / "plot.svg", rows, "a title")
    picture = (tmp_path / "plot.svg").read_text()
    assert picture.startswith("<?xml")
    assert all(f"<!-- {text} -->" in picture for text in ("GPTQ", "a title"))
    assert "HQQ" not in picture
    with pytest.raises(ValueError, match=r"plot='.*x\.doc' must end in one of .*png"):
        plot(tmp_path / "x.doc", rows, "")
