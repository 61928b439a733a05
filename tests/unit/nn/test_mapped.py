"""Copies out of mapped files are the tensors, and leave the mapping alone."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from squeezellm_hf.nn.linear import CACHE_LINE_BYTES
from squeezellm_hf.nn.mapped import MappedFiles

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
WORDS = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two tensors, of which the second starts at an odd place."""
    path = tmp_path / "model with a space.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randint(-9, 9, (3,), dtype=torch.int32, generator=generator),
        "b": torch.randint(-(2**31), 2**31, (WORDS, 8), dtype=torch.int32, generator=generator),
    }
    save_file(tensors, path)
    return path


def read(path: Path, name: str) -> torch.Tensor:
    return safe_open(path, framework="pt").get_slice(name)[...]


def stored(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as opened:
        return opened.get_tensor(name).clone()


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_copy_is_the_tensor(file: Path, name: str) -> None:
    tensor = read(file, name)
    copy = MappedFiles().copy(tensor)
    assert copy.data_ptr() != tensor.data_ptr()
    assert copy.data_ptr() % CACHE_LINE_BYTES == 0
    assert copy.dtype == tensor.dtype
    assert copy.equal(stored(file, name))


# In a process of its own: what another test has freed would be taken again, and not counted.
MEASURE = """
import subprocess
import sys
from pathlib import Path
from safetensors import safe_open
from squeezellm_hf.nn.mapped import MappedFiles

def resident_bytes():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in l)
    return int(line.split()[1]) << 10

tensor = safe_open(sys.argv[1], framework="pt").get_slice("b")[...]
mapped = MappedFiles()
before = resident_bytes()
copy = mapped.copy(tensor)
copied = resident_bytes()
clone = tensor.clone()
assert copy.equal(clone)
print((copied - before) / tensor.nbytes, (resident_bytes() - before) / tensor.nbytes)
"""


@linux
def test_a_copy_leaves_the_mapping_alone(file: Path) -> None:
    """One copy in memory; a clone of a mapped tensor leaves two."""
    command = [sys.executable, "-c", MEASURE, str(file)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    copied, cloned = map(float, output.split())
    assert copied < 1.25
    assert cloned > 2.5


def test_parts_and_transposes(file: Path) -> None:
    tensor = read(file, "b")
    mapped, whole = MappedFiles(), stored(file, "b")
    assert mapped.copy(tensor[5:77]).equal(whole[5:77])
    assert mapped.copy(tensor.T).equal(whole.T)
    assert mapped.copy(tensor[:, 1:3]).equal(whole[:, 1:3])


def test_tensors_of_no_file_are_cloned() -> None:
    tensor = torch.arange(1000)
    copy = MappedFiles().copy(tensor)
    assert copy.equal(tensor)
    assert copy.data_ptr() != tensor.data_ptr()
    assert MappedFiles().copy(torch.empty(0, 4)).shape == (0, 4)
    assert MappedFiles().copy(torch.empty(2, 4, device="meta")).is_meta


def test_a_file_that_is_gone_or_replaced(file: Path) -> None:
    """What is mapped is the old file, whatever its name stands for now."""
    tensor, whole = read(file, "b"), stored(file, "b")
    mapped = MappedFiles()
    other = file.with_name("other")
    save_file({"a": torch.zeros(3, dtype=torch.int32), "b": torch.zeros_like(whole)}, other)
    other.replace(file)
    assert mapped.copy(tensor).equal(whole)
    file.unlink()
    assert mapped.copy(tensor).equal(whole)
    assert MappedFiles().copy(tensor).equal(whole)
