"""Bit-packing of table indices: one contiguous little-endian bit stream per row.

Index ``i`` of a row occupies bits ``[i * bits, (i + 1) * bits)`` of the row's stream, least
significant bit first; bit ``j`` of the stream is bit ``j % 32`` of 32-bit word ``j // 32``. Every
row starts on a word; the unused bits of its last word are zero. For 3 bits::

    word 0:  22 111 000 ... (bit 31 on the left, bit 0 on the right: index 0 is lowest)

so that 32 indices fill ``bits`` words exactly, whatever the width.
"""

import torch
from torch import Tensor

WORD_BITS = 32
MAX_BITS = 8


def packed_words(in_features: int, bits: int) -> int:
    """Number of int32 words that hold one row of ``in_features`` indices of ``bits`` bits."""
    return -(-in_features * bits // WORD_BITS)


def check_bits(bits: int) -> None:
    """Raise ValueError unless ``bits`` is an integer between 1 and 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be an integer from 1 to {MAX_BITS}, got {bits!r}")


def _groups(in_features: int) -> int:
    """32 indices of any width fill whole words: the unit in which rows are packed and unpacked."""
    return -(-in_features // WORD_BITS)


def pack(indices: Tensor, bits: int) -> Tensor:
    """Pack table indices into words.

    Args:
        indices: [out_features, in_features], any integer dtype, values in [0, 2**bits).
        bits: width of an index, 1 to 8.

    Returns:
        int32 [out_features, ceil(in_features * bits / 32)], on the device of ``indices``.

    Raises:
        ValueError: if ``bits`` or the shape, the dtype or a value of ``indices`` is not allowed.
    """
    check_bits(bits)
    if indices.dim() != 2 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(
            "indices must be an integer tensor [out_features, in_features], "
            f"got {indices.dtype} {list(indices.shape)}"
        )
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < 2**bits:
        raise ValueError(
            f"indices must lie in [0, {2**bits}) for bits={bits}, "
            f"got [{int(indices.min())}, {int(indices.max())}]"
        )
    rows, in_features = indices.shape
    groups = _groups(in_features)
    padded = torch.zeros(rows, groups * WORD_BITS, dtype=torch.uint8, device=indices.device)
    padded[:, :in_features] = indices
    padded = padded.view(rows, groups, WORD_BITS)
    # int64 so that an index which straddles two words can be shifted without loss.
    words = torch.zeros(rows, groups, bits, dtype=torch.int64, device=indices.device)
    for position in range(WORD_BITS):
        word, shift = divmod(position * bits, WORD_BITS)
        shifted = padded[:, :, position].to(torch.int64) << shift
        words[:, :, word] |= shifted & 0xFFFFFFFF
        if shift + bits > WORD_BITS:
            words[:, :, word + 1] |= shifted >> WORD_BITS
    # Two's complement: words of 2**31 and more become negative int32 with the same bits.
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return words.view(rows, groups * bits)[:, : packed_words(in_features, bits)].contiguous()


def unpack(qweight: Tensor, bits: int, in_features: int) -> Tensor:
    """Unpack words into table indices; the inverse of :func:`pack`.

    Args:
        qweight: int32 [out_features, ceil(in_features * bits / 32)].
        bits: width of an index, 1 to 8.
        in_features: number of indices in a row.

    Returns:
        uint8 [out_features, in_features], on the device of ``qweight``.

    Raises:
        ValueError: if ``bits`` or the shape or dtype of ``qweight`` is not allowed.
    """
    check_bits(bits)
    check_qweight(qweight, bits, in_features)
    rows = qweight.shape[0]
    groups = _groups(in_features)
    words = torch.zeros(rows, groups * bits, dtype=torch.int32, device=qweight.device)
    words[:, : qweight.shape[1]] = qweight
    words = words.view(rows, groups, bits)
    mask = 2**bits - 1
    indices = torch.empty(rows, groups, WORD_BITS, dtype=torch.uint8, device=qweight.device)
    for position in range(WORD_BITS):
        word, shift = divmod(position * bits, WORD_BITS)
        low_bits = min(bits, WORD_BITS - shift)
        # The shift of a negative int32 fills with ones: the mask removes them.
        index = (words[:, :, word] >> shift) & (2**low_bits - 1)
        if low_bits < bits:
            index |= (words[:, :, word + 1] << low_bits) & mask
        indices[:, :, position] = index
    return indices.view(rows, groups * WORD_BITS)[:, :in_features].contiguous()


def take_columns(qweight: Tensor, bits: int, start: int, stop: int) -> Tensor:
    """The packed indices of columns ``start`` to ``stop`` (exclusive), in memory of their own.

    Args:
        qweight: int32 [out_features, words] with ``words * 32 >= stop * bits``.
        bits: width of an index, 1 to 8.
        start: first column.
        stop: column behind the last one.

    Returns:
        int32 [out_features, ceil((stop - start) * bits / 32)], the unused bits zero.
    """
    first, shift = divmod(start * bits, WORD_BITS)
    words = packed_words(stop - start, bits)
    source = qweight[:, first : first + words + 1]
    padded = torch.zeros(qweight.shape[0], words + 1, dtype=torch.int32, device=qweight.device)
    padded[:, : source.shape[1]] = source
    low, high = padded[:, :-1], padded[:, 1:]
    if shift:
        # The shift of a negative int32 fills with ones: the mask removes them.
        low = (low >> shift) & (2 ** (WORD_BITS - shift) - 1) | (high << (WORD_BITS - shift))
    taken = low.contiguous()
    if used := (stop - start) * bits % WORD_BITS:
        taken[:, -1] &= 2**used - 1
    return taken


def check_qweight(qweight: Tensor, bits: int, in_features: int, name: str = "qweight") -> None:
    """Raise ValueError unless ``qweight`` has the dtype and shape of packed indices."""
    words = packed_words(in_features, bits)
    if qweight.dtype != torch.int32 or qweight.dim() != 2 or qweight.shape[1] != words:
        raise ValueError(
            f"{name} must be int32 [out_features, {words}] for in_features={in_features}, "
            f"bits={bits}, got {qweight.dtype} {list(qweight.shape)}"
        )


def check_padding(qweight: Tensor, bits: int, in_features: int, name: str = "qweight") -> None:
    """Raise ValueError if a bit beyond the last index of a row is set."""
    used = in_features * bits % WORD_BITS
    if not used or not qweight.numel():
        return
    beyond = (qweight[:, -1] >> used) & (2 ** (WORD_BITS - used) - 1)
    if bool(beyond.any()):
        row = int(beyond.nonzero()[0])
        raise ValueError(
            f"{name} holds bits beyond the last of in_features={in_features} indices in row {row}; "
            "the unused bits of a row's last word must be zero"
        )
