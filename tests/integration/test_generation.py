"""Every way to generate that users take, on a quantized tiny model."""

from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    pipeline,
    set_seed,
)
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from squeezellm_hf import SqueezeLLMConfig
from squeezellm_hf.nn import grouping
from tests.tiny_checkpoint import write

NEW = 12
PROMPTS = ["The first", "A second, longer text", "3"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    config = SqueezeLLMConfig(bits=3, dataset=None)
    original = write(folder / "original", num_hidden_layers=3)
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    model.save_pretrained(folder / "quantized")
    AutoTokenizer.from_pretrained(original).save_pretrained(folder / "quantized")
    return folder / "quantized"


@pytest.fixture(scope="module")
def model(path: Path):
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.fixture(scope="module")
def plain(path: Path):
    """The same weights in ordinary layers: what every mode is held against."""
    return AutoModelForCausalLM.from_pretrained(path).dequantize()


@pytest.fixture(scope="module")
def tokenizer(path: Path):
    return AutoTokenizer.from_pretrained(path)


def generate(model, inputs, **options) -> torch.Tensor:
    set_seed(0)
    return model.generate(**inputs, max_new_tokens=NEW, pad_token_id=256, **options)


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beam search": {"do_sample": False, "num_beams": 3},
    "beams that return several": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "repetition penalty": {"do_sample": False, "repetition_penalty": 1.3},
    "without a cache": {"do_sample": False, "use_cache": False},
    "prompt look-up": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("mode", MODES)
def test_as_with_ordinary_layers(model, plain, tokenizer, mode: str) -> None:
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    expected = generate(plain, inputs, **MODES[mode])
    assert expected.shape[1] == inputs["input_ids"].shape[1] + NEW
    assert generate(model, inputs, **MODES[mode]).equal(expected)


def test_assisted_by_another_model(model, plain, tokenizer) -> None:
    """Each as the assistant of the other: the text is that of the main model alone."""
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    expected = generate(model, inputs, do_sample=False)
    for main, assistant in ((model, plain), (plain, model)):
        output = generate(main, inputs, do_sample=False, assistant_model=assistant)
        assert output.equal(expected)


def test_assisted_by_its_own_first_layers(model, tokenizer) -> None:
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    expected = generate(model, inputs, do_sample=False)
    assert generate(model, inputs, do_sample=False, assistant_early_exit=1).equal(expected)


@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded"])
def test_caches(model, tokenizer, cache: str) -> None:
    if cache == "offloaded" and not torch.accelerator.is_available():
        pytest.skip("offloads from an accelerator")
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    expected = generate(model, inputs, do_sample=False)
    assert generate(model, inputs, do_sample=False, cache_implementation=cache).equal(expected)


@pytest.mark.parametrize(
    ("backend", "available"),
    [("quanto", is_optimum_quanto_available), ("hqq", is_hqq_available)],
)
def test_quantized_cache(model, plain, tokenizer, backend: str, available) -> None:
    if not available():
        pytest.skip(f"needs the package of {backend}")
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    settings = {
        "do_sample": False, "cache_implementation": "quantized",
        "cache_config": {"backend": backend, "nbits": 4, "q_group_size": 32, "residual_length": 4},
    }  # fmt: skip
    assert generate(model, inputs, **settings).equal(generate(plain, inputs, **settings))


def test_a_cache_that_is_kept_between_calls(model, tokenizer) -> None:
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    whole = generate(model, inputs, do_sample=False, return_dict_in_generate=True)
    half = model.generate(
        **inputs, max_new_tokens=NEW // 2, do_sample=False, return_dict_in_generate=True
    )
    rest = model.generate(
        half.sequences, past_key_values=half.past_key_values, max_new_tokens=NEW // 2,
        do_sample=False, attention_mask=torch.ones_like(half.sequences),
    )  # fmt: skip
    assert rest.equal(whole.sequences)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_a_padded_batch_gives_what_each_prompt_gives(model, tokenizer, options: dict) -> None:
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert (batch["attention_mask"][:, 0] == 0).any()  # padded on the left
    together = generate(model, batch, do_sample=False, **options)
    for prompt, row in zip(PROMPTS, together, strict=True):
        alone = generate(model, tokenizer(prompt, return_tensors="pt"), do_sample=False, **options)
        assert row[-NEW:].equal(alone[0, -NEW:])


@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.bfloat16, "float16"])
def test_pipeline_with_device_and_dtype(path: Path, tokenizer, dtype) -> None:
    generator = pipeline("text-generation", model=str(path), device="cpu", dtype=dtype)
    wanted = {"auto": torch.float32, "float16": torch.float16}.get(dtype, dtype)
    assert generator.model.dtype == wanted
    options = {"max_new_tokens": NEW, "do_sample": False}
    text = generator(PROMPTS[0], **options)[0]["generated_text"]
    assert text.startswith(PROMPTS[0])
    ids = generator.model.generate(**tokenizer(PROMPTS[0], return_tensors="pt"), **options)
    assert text == tokenizer.decode(ids[0], skip_special_tokens=True)
    batch = generator(PROMPTS, batch_size=2, **options)
    for prompt, answers in zip(PROMPTS, batch, strict=True):
        assert answers[0]["generated_text"].startswith(prompt)


def test_chat_in_a_pipeline(path: Path) -> None:
    chat = [{"role": "user", "content": "Hello"}]
    generator = pipeline("text-generation", model=str(path), device_map="cpu")
    answer = generator(chat, max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert answer[0] == chat[0]
    assert answer[1]["role"] == "assistant"


def test_compiled_decoding_groups_the_layers_of_one_input(model, tokenizer) -> None:
    """Of a block's seven calls four are left, no norm but the last, and no activation."""
    seen: list[list[str]] = []
    kept: list[list[str]] = []

    class Recorded(grouping.GroupLinears):
        def __call__(self, graph: torch.fx.Graph) -> None:
            super().__call__(graph)
            names = [str(node.target).split(".")[-2:-1] for node in graph.nodes]
            seen.append([name[0] for name in names if name and name[0].startswith("lut_linear")])
            kept.append([name[0] for name in names if name and name[0] in ("rsqrt", "exp")])

    def is_row(x: torch.Tensor) -> bool:
        return x.shape[:-1].numel() == 1

    compile_config = CompileConfig(fullgraph=True, mode="reduce-overhead")
    compile_config._compile_all_devices = True
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": NEW, "cache_implementation": "static"}
    expected = model.generate(**inputs, **options, disable_compile=True)
    torch._dynamo.reset()
    with inductor.patch(post_grad_custom_pre_pass=Recorded(is_row)):
        actual = model.generate(**inputs, **options, compile_config=compile_config)
    assert torch.equal(actual, expected)
    assert seen == [["lut_linear_group"] * 4 * model.config.num_hidden_layers]
    assert kept == [["rsqrt"]]
