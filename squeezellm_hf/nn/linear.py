"""A linear layer whose weight is a table index per cell plus a few sparse values."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from squeezellm_hf.formats import csr, packing
from squeezellm_hf.nn.mapped import MappedFiles
from squeezellm_hf.nn.weight import DequantizedWeight
from squeezellm_hf.ops import lut_dequantize, lut_linear

SPARSE = ("crow_indices", "col_indices", "values")
NAMES = ("qweight", "lookup_table", *SPARSE, "bias")
CACHE_LINE_BYTES = 64
TABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class SqueezeLLMLinear(nn.Module):
    """y = x W^T + bias with W[o, i] = lookup_table[o, index(o, i)] + sparse[o, i].

    All tensors are parameters (accelerate's offload and tensor parallelism pass buffers by), none
    requires a gradient, and none changes its dtype with ``.to(dtype)``: a table recast to bf16
    would be another table.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bits: width of a table index, 1 to 8.
        nnz: number of sparse values; 0 for none.
        bias: whether a bias is added.
        table_dtype: fp16, bf16 or fp32, of the tables and the sparse values.
        dtype: of the bias, and of :attr:`weight`.
        device: of all tensors, ``"meta"`` for a skeleton to load into.

    Parameters (shapes, dtypes):
        qweight: int32 [out_features, ceil(in_features * bits / 32)].
        lookup_table: table_dtype [out_features, 2**bits].
        crow_indices, col_indices, values: CSR, see :class:`squeezellm_hf.formats.csr.CSR`; None
            where nnz is 0.
        bias: dtype [out_features], or None.
    """

    qweight: nn.Parameter
    lookup_table: nn.Parameter
    crow_indices: nn.Parameter | None
    col_indices: nn.Parameter | None
    values: nn.Parameter | None
    bias: nn.Parameter | None

    # What computes; an instance may have others, see squeezellm_hf.nn.backend.
    _linear = staticmethod(lut_linear)
    _dequantize = staticmethod(lut_dequantize)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        *,
        nnz: int = 0,
        bias: bool = False,
        table_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        packing.check_bits(bits)
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.weight_dtype = dtype or torch.get_default_dtype()
        words = packing.packed_words(in_features, bits)
        column_dtype = csr.column_dtype(in_features)

        def empty(*shape: int, dtype: torch.dtype | None) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)

        self.qweight = empty(out_features, words, dtype=torch.int32)
        self.lookup_table = empty(out_features, 2**bits, dtype=table_dtype)
        for name, size, kind in zip(
            SPARSE,
            (out_features + 1, nnz, nnz),
            (torch.int32, column_dtype, table_dtype),
            strict=True,
        ):
            self.register_parameter(name, empty(size, dtype=kind) if nnz else None)
        self.register_parameter("bias", empty(out_features, dtype=dtype) if bias else None)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        bits: int,
        in_features: int,
        dtype: torch.dtype | None = None,
    ) -> "SqueezeLLMLinear":
        """Wrap the tensors of a checkpoint (see the class) without copying them.

        Args:
            tensors: by name.
            bits: width of a table index.
            in_features: size of the last dimension of the input.
            dtype: of :attr:`weight`; default: that of the bias, or of the tables.

        Raises:
            ValueError: naming the tensor, if one is missing or does not fit.
        """
        for name in ("qweight", "lookup_table"):
            if name not in tensors:
                raise ValueError(f"{name} is missing from {sorted(tensors)}")
        table = tensors["lookup_table"]
        values, bias = tensors.get("values"), tensors.get("bias")
        layer = cls(
            in_features,
            tensors["qweight"].shape[0],
            bits,
            nnz=0 if values is None else values.numel(),
            bias=bias is not None,
            table_dtype=table.dtype,
            dtype=dtype or (table if bias is None else bias).dtype,
            device="meta",
        )
        for name, tensor in tensors.items():
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
        layer.check()
        return layer

    @property
    def nnz(self) -> int:
        """Number of sparse values."""
        return 0 if self.values is None else self.values.numel()

    @property
    def weight(self) -> Tensor:
        """The weight [out_features, in_features], for code that reads it; has no values of its own.

        Every operation on its values dequantizes them anew.
        """
        if torch.compiler.is_compiling():
            return self.dequantize(self.weight_dtype)  # the compiler drops it where it is not used
        return DequantizedWeight(self, self.weight_dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors that stand for the weight: indices, tables, sparse part."""
        tensors = (self.qweight, self.lookup_table, *(getattr(self, name) for name in SPARSE))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features], in the dtype of x."""
        # nn.Module takes 0.35 us to find a parameter as an attribute: 2 us for these.
        found: Any = self._parameters
        if "qweight" not in found:  # a replica of DataParallel, say: its tensors are attributes
            found = {name: getattr(self, name) for name in NAMES}
        return self._linear(
            x,
            found["qweight"],
            found["lookup_table"],
            bits=self.bits,
            crow_indices=found["crow_indices"],
            col_indices=found["col_indices"],
            values=found["values"],
            bias=found["bias"],
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out_features, in_features] in ``dtype`` (default: that of the tables)."""
        return self._dequantize(
            self.qweight,
            self.lookup_table,
            bits=self.bits,
            in_features=self.in_features,
            crow_indices=self.crow_indices,
            col_indices=self.col_indices,
            values=self.values,
            dtype=dtype,
        )

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """A plain ``nn.Linear`` with the dequantized weight, in ``dtype``."""
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self.dequantize(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype))
        return linear

    def check(self, prefix: str = "") -> None:
        """Raise ValueError, naming the tensor behind ``prefix``, unless all tensors are sound.

        After this, no kernel can be led out of bounds by their contents. Tensors on the meta
        device (offloaded to disk) are checked for shape and dtype alone.
        """
        packing.check_qweight(self.qweight, self.bits, self.in_features, f"{prefix}qweight")
        expected: dict[str, tuple[int, ...]] = {
            "qweight": (self.out_features, self.qweight.shape[1]),
            "lookup_table": (self.out_features, 2**self.bits),
            "bias": (self.out_features,),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"{prefix}{name} must have shape {list(shape)}, got {list(tensor.shape)}"
                )
        for name in ("lookup_table", "values"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.dtype not in TABLE_DTYPES:
                raise ValueError(
                    f"{prefix}{name} must be float16, bfloat16 or float32, got {tensor.dtype}"
                )
            if not tensor.is_meta and not bool(tensor.isfinite().all()):
                raise ValueError(f"{prefix}{name} holds values that are not finite")
        sparse = [tensor for name in SPARSE if (tensor := getattr(self, name)) is not None]
        if 0 < len(sparse) < len(SPARSE):
            missing = next(name for name in SPARSE if getattr(self, name) is None)
            raise ValueError(f"{prefix}{missing} is missing beside the other sparse tensors")
        if self.qweight.is_meta:
            return
        packing.check_padding(self.qweight, self.bits, self.in_features, f"{prefix}qweight")
        if sparse:
            csr.check_csr(
                *sparse,
                out_features=self.out_features,
                in_features=self.in_features,
                prefix=prefix,
            )

    def align(self, mapped: MappedFiles | None = None) -> None:
        """Copy ``qweight`` if it does not start on a cache line.

        Safetensors maps a file as it lies; the CPU kernels read rows whose length is a power of two
        up to 2.7 times slower where every vector straddles two lines.

        Args:
            mapped: the files that the tensors may lie in, right after they were mapped.
        """
        if self.qweight.data_ptr() % CACHE_LINE_BYTES:
            tensor = self.qweight.data
            self.qweight.data = tensor.clone() if mapped is None else mapped.copy(tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SqueezeLLMLinear":
        """Follow a change of device; of all tensors, only the bias follows a change of dtype."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if changed.dtype == tensor.dtype or tensor is self.bias:
                return changed
            return tensor.to(changed.device)

        probe = self.lookup_table.new_empty(0, dtype=self.weight_dtype)
        self.weight_dtype = fn(probe).dtype
        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.bits}, nnz={self.nnz}, bias={self.bias is not None}"
        )
