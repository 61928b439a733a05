"""Block by block gives what the whole model at once gives, bit for bit on one device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from squeezellm_hf import SqueezeLLMConfig, quantize_model
from squeezellm_hf.calibration import blocks
from squeezellm_hf.methods.squeezellm import SqueezeLLMParameters
from squeezellm_hf.pipeline import blockwise, make_plan, quantize_modules
from squeezellm_hf.pipeline import quantize as pipeline_quantize
from tests.conftest import BLOCKS, tiny_llama
from tests.families import FAMILIES

CPU = torch.device("cpu")
# Sliding windows, a cache by default, hidden tokens, experts, Conv1D, states instead of attention.
NAMES = ["Gemma 3", "OPT", "GPT-NeoX", "LLaVA", "BERT", "Mixtral", "GPT-2", "Falcon-H1"]


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert any(name.endswith("qweight") for name in first)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert tensor.equal(second[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codebook", ["kmeans", "lnq", "guided"])
def test_same_as_the_whole_at_once(
    codebook: str, dtype: torch.dtype, token_ids: torch.Tensor
) -> None:
    whole, one_by_one = tiny_llama().to(dtype), tiny_llama().to(dtype)
    parameters = SqueezeLLMParameters(bits=3, codebook=codebook, guided_groups=2)
    plan = make_plan(whole, parameters)  # the output head, too, which is outside the blocks
    assert "lm_head" in plan
    quantize_modules(whole, plan, token_ids, progress=False)
    quantize_modules(one_by_one, plan, token_ids, progress=False, device=CPU)
    assert_same(whole, one_by_one)


@pytest.mark.parametrize("name", NAMES)
def test_families(name: str, token_ids: torch.Tensor) -> None:
    (family,) = (each for each in FAMILIES if each.name == name)
    models = []
    for blockwise_ in (None, True):
        models.append(family.build())
        config = SqueezeLLMConfig(
            preset="fast", bits=3, dataset=token_ids, n_samples=4, sequence_length=32,
            blockwise=blockwise_,
        )  # fmt: skip
        quantize_model(models[-1], None, config, progress=False)
    assert_same(*models)


def test_an_encoder_before_the_blocks_is_refused(token_ids: torch.Tensor) -> None:
    (family,) = (each for each in FAMILIES if each.name == "T5")
    config = SqueezeLLMConfig(
        preset="fast", dataset=token_ids, n_samples=4, sequence_length=32, blockwise=True
    )
    with pytest.raises(ValueError, match="called with arguments that depend on the text"):
        quantize_model(family.build(), None, config, progress=False)


def test_without_data() -> None:
    whole, one_by_one = tiny_llama(), tiny_llama()
    plan = make_plan(whole, SqueezeLLMParameters(bits=3), skip=["lm_head"])
    quantize_modules(whole, plan, None, progress=False)
    quantize_modules(one_by_one, plan, None, progress=False, device=CPU)
    assert_same(whole, one_by_one)


def test_one_block_at_a_time_is_on_the_device(
    token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    plan = make_plan(model, SqueezeLLMParameters(bits=3), skip=["lm_head"])
    sizes = {
        id(tensor): index
        for index, block in enumerate(model.model.layers)
        for tensor in blocks.tensors_of(block)
    }
    there: set[int] = set()
    seen: list[set[int]] = []
    original = blocks.on_device

    class Watched:
        def __init__(self, tensors, device) -> None:
            tensors = list(tensors)
            self.blocks = {sizes[id(t)] for t in tensors if id(t) in sizes}
            self.context = original(tensors, device)

        def __enter__(self) -> None:
            there.update(self.blocks)
            seen.append(set(there))
            self.context.__enter__()

        def __exit__(self, *error: Any) -> None:
            there.difference_update(self.blocks)
            self.context.__exit__(*error)

    monkeypatch.setattr(blocks, "on_device", Watched)
    monkeypatch.setattr(blockwise, "on_device", Watched)
    quantize_modules(model, plan, token_ids, progress=False, device=CPU)
    assert {frozenset(each) for each in seen if each} == {frozenset({i}) for i in range(BLOCKS)}
    assert not there


@pytest.mark.parametrize("layers_before_death", [0, 1, 7, 9])
def test_a_killed_run_goes_on(
    layers_before_death: int,
    token_ids: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Killed(Exception):
        pass

    original, done = pipeline_quantize.quantize_weights, []

    def dying(matrices: Any) -> Any:
        if len(done) == layers_before_death:
            raise Killed
        done.extend(matrix.name for matrix in matrices)
        return original(matrices)

    def run(path: Path | None) -> Any:
        model = tiny_llama()
        plan = make_plan(model, SqueezeLLMParameters(bits=3), skip=["lm_head"])
        quantize_modules(model, plan, token_ids, work_dir=path, progress=False, device=CPU)
        return model

    with monkeypatch.context() as patch:
        patch.setattr(pipeline_quantize, "quantize_weights", dying)
        with pytest.raises(Killed):
            run(tmp_path)
    again: list[str] = []
    monkeypatch.setattr(
        pipeline_quantize,
        "quantize_weights",
        lambda matrices: again.extend(m.name for m in matrices) or original(matrices),
    )
    resumed = run(tmp_path)
    assert len(again) == 14 - layers_before_death
    assert not set(again) & set(done)
    assert_same(resumed, run(None))


class Peculiar(torch.nn.Module):
    """A Llama whose blocks get, or have between them, what others have not."""

    def __init__(self) -> None:
        super().__init__()
        self.llama = tiny_llama()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.llama.get_input_embeddings()

    def forward(self, **kwargs: Any) -> Any:
        return self.llama(**kwargs)


def test_arguments_that_depend_on_the_text_are_refused(token_ids: torch.Tensor) -> None:
    model = Peculiar()
    text: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: text.append(output))
    for block in model.llama.model.layers:
        block.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "text": text[-1]}), with_kwargs=True
        )
    plan = make_plan(model, SqueezeLLMParameters(bits=3), skip=["lm_head"])
    with pytest.raises(ValueError, match="block 0 of Peculiar is called with arguments that"):
        quantize_modules(model, plan, token_ids, progress=False, device=CPU)


def test_something_between_the_blocks_is_refused(token_ids: torch.Tensor) -> None:
    model = Peculiar()
    model.llama.model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0] + 1.0, *args[1:]), kwargs), with_kwargs=True
    )
    plan = make_plan(model, SqueezeLLMParameters(bits=3), skip=["lm_head"])
    with pytest.raises(ValueError, match="do not simply follow one another"):
        quantize_modules(model, plan, token_ids, progress=False, device=CPU)


def test_no_blocks(token_ids: torch.Tensor) -> None:
    model = tiny_llama()
    plan = make_plan(model, SqueezeLLMParameters(bits=3), skip=["layers"])
    with pytest.raises(ValueError, match="blockwise: LlamaForCausalLM has no list of blocks"):
        quantize_modules(model, plan, token_ids, progress=False, device=CPU)


def test_through_the_config(token_ids: torch.Tensor) -> None:
    whole, one_by_one = tiny_llama(), tiny_llama()
    data = {"dataset": token_ids, "n_samples": 4, "sequence_length": 32}
    quantize_model(whole, None, SqueezeLLMConfig(bits=3, **data), progress=False)
    config = SqueezeLLMConfig(bits=3, **data, blockwise=True)
    quantize_model(one_by_one, None, config, progress=False)
    assert_same(whole, one_by_one)
    assert "blockwise" not in one_by_one.config.quantization_config.to_dict()


def test_while_loading(checkpoint: Path, token_ids: torch.Tensor) -> None:
    load = AutoModelForCausalLM.from_pretrained
    config = {"bits": 3, "dataset": token_ids, "n_samples": 4, "sequence_length": 32}
    whole = load(checkpoint, quantization_config=SqueezeLLMConfig(**config))
    one_by_one = load(checkpoint, quantization_config=SqueezeLLMConfig(**config, blockwise=True))
    assert_same(whole, one_by_one)


def test_chosen_where_sums_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    plan = make_plan(model, SqueezeLLMParameters(bits=3), skip=["lm_head"])
    assert blockwise.fits(model, plan, CPU)

    class Little:
        available = 4 * sum(model.get_submodule(name).weight.numel() for name in plan)

    monkeypatch.setattr(blockwise.psutil, "virtual_memory", Little)
    assert not blockwise.fits(model, plan, CPU)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blockwise": "yes"}, "blockwise must be True, False or None, got 'yes'"),
        ({"blockwise": True, "distill_steps": 3}, "distillation needs the whole original"),
    ],
)
def test_config_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SqueezeLLMConfig(**fields)
