"""Check the files of a checkpoint before transformers reads them.

Transformers fills a missing tensor with what it finds in memory and casts a float of another
dtype without a word. The headers of the safetensors files tell in time.
"""

from collections.abc import Mapping, Sequence

from safetensors import SafetensorError, safe_open

from squeezellm_hf.formats import csr
from squeezellm_hf.integration.config import ModuleRecord

_HEADER_DTYPES = {"torch.int32": "I32", "torch.int16": "I16"}
_TABLE_HEADER_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}

Expected = dict[str, tuple[str, ...]]


def expected_tensors(record: ModuleRecord) -> Expected:
    """The dtypes, as safetensors calls them, that each tensor of a layer may have."""
    table = (_TABLE_HEADER_DTYPES[record.table_dtype],)
    tensors: Expected = {"qweight": ("I32",), "lookup_table": table}
    if record.nnz:
        columns = tuple(
            _HEADER_DTYPES[str(csr.column_dtype(n))] for n in (1, csr.INT16_COLUMNS + 1)
        )
        tensors |= {"crow_indices": ("I32",), "col_indices": columns, "values": table}
    return tensors


def check_files(files: Sequence[str], records: Mapping[str, ModuleRecord]) -> None:
    """Raise ValueError, naming the file or tensor, unless the files hold what config.json says.

    Args:
        files: paths of all shards.
        records: the quantized modules by name.

    Names may differ from those of the modules where transformers renames tensors on load; then
    only the number of tensors of each kind is compared.
    """
    dtypes = _header_dtypes(files)
    kinds = [name.rpartition(".")[2] for name in dtypes]
    wanted: dict[str, int] = {}
    for record in records.values():
        for kind in expected_tensors(record):
            wanted[kind] = wanted.get(kind, 0) + 1
    short = {kind for kind, count in wanted.items() if kinds.count(kind) < count}
    for module, record in records.items():
        for kind, allowed in expected_tensors(record).items():
            found = dtypes.get(f"{module}.{kind}")
            if found is None and kind in short:
                raise ValueError(f"{module}.{kind} is missing from the checkpoint")
            if found is not None and found not in allowed:
                raise ValueError(
                    f"{module}.{kind} must have the dtype {' or '.join(allowed)}, got {found}"
                )
        if not record.nnz and f"{module}.values" in dtypes:
            raise ValueError(f"{module}.values is in the checkpoint, but config.json says nnz=0")
    for kind in ("qweight", "crow_indices"):
        if kinds.count(kind) > wanted.get(kind, 0):
            raise ValueError(
                f"the checkpoint has {kind} of {kinds.count(kind)} layers, but the modules of "
                f"config.json are {wanted.get(kind, 0)} with one"
            )


def check_nnz(nnz: int, record: ModuleRecord, module: str) -> None:
    """Raise ValueError unless a layer has as many sparse values as config.json says."""
    if nnz != record.nnz:
        raise ValueError(
            f"{module}.values must be [nnz={record.nnz}] as config.json says, got [{nnz}]"
        )


def _header_dtypes(files: Sequence[str]) -> dict[str, str]:
    dtypes = {}
    for path in files:
        if not str(path).endswith(".safetensors"):
            raise ValueError(f"{path}: a SqueezeLLM checkpoint is read from safetensors files only")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    dtypes[name] = file.get_slice(name).get_dtype()
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or truncated: {error}") from error
    return dtypes
