"""Comparisons that say where they fail: largest error, its index, both values."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora import reference


def _same_kind(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype, f"dtype: expected {expected.dtype}, got {actual.dtype}"
    assert actual.shape == expected.shape, (
        f"shape: expected {tuple(expected.shape)}, got {tuple(actual.shape)}"
    )


def _report(actual: Tensor, expected: Tensor, error: Tensor, is_wrong: Tensor, what: str) -> str:
    """The worst wrong element; a NaN error counts as the largest."""
    ranked = torch.where(is_wrong, error.nan_to_num(torch.inf, torch.inf, torch.inf), -1.0)
    flat = int(ranked.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), ranked.shape))
    return (
        f"{what}: {int(is_wrong.sum())} of {is_wrong.numel()} elements; largest error {error.flatten()[flat].item()} at "
        f"{index}: expected {expected.flatten()[flat].item()}, got {actual.flatten()[flat].item()}"
    )


def assert_bitwise_equal(actual: Tensor, expected: Tensor) -> None:
    """Same dtype, shape and bits; every NaN equals every NaN, and -0 differs from +0."""
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    _same_kind(actual, expected)
    is_wrong = actual != expected
    if actual.is_floating_point():
        is_wrong &= ~(actual.isnan() & expected.isnan())
        is_wrong |= (actual == 0) & (expected == 0) & (actual.signbit() != expected.signbit())
    if is_wrong.any():
        error = (actual.double() - expected.double()).abs()
        raise AssertionError(_report(actual, expected, error, is_wrong, "bits differ"))


def assert_same_tensors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bytes: packed codes may be stored under a float dtype, where some are NaN."""
    assert got.keys() == expected.keys()
    different = []
    for name, value in expected.items():
        _same_kind(got[name], value)
        mine, other = (t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (got[name], value))
        if not torch.equal(mine, other):
            different.append(name)
    assert not different, f"not equal bit for bit: {different[:5]} of {len(different)}"


def assert_within(actual: Tensor, expected: Tensor, tolerance: Tensor | float) -> None:
    """|actual - expected| <= tolerance, element by element, in float64; expected may have another float dtype."""
    assert actual.shape == expected.shape, (
        f"shape: expected {tuple(expected.shape)}, got {tuple(actual.shape)}"
    )
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    tolerance = torch.as_tensor(tolerance, dtype=torch.float64).detach().cpu()
    error = (actual - expected).abs()
    is_wrong = ~(error <= tolerance)
    if is_wrong.any():
        excess = (error / tolerance)[is_wrong].nan_to_num(torch.inf).max()
        raise AssertionError(
            _report(actual, expected, error, is_wrong, f"beyond the tolerance, by up to {excess:.3g} times")
        )


def assert_close_by_depth(
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype = torch.float32,
    factor: float = 1.0,
    scale: float | None = None,
) -> None:
    """For results of two small models that round in `dtype` at every operation, each in another order.

    16 rounded products deep, on values of the size `scale`: the largest expected one if None.
    """
    largest = expected.abs().max().item() if scale is None else scale
    assert_within(actual, expected, factor * 16 * torch.finfo(dtype).eps / 2 * largest)


def assert_codes_agree(
    actual: Tensor,
    expected: Tensor,
    x: Tensor,
    absmax: Tensor,
    *,
    block_size: int,
    quant_type: str,
    ulps: float = 2.0,
) -> int:
    """Packed codes may differ only where x / absmax is within `ulps` of a threshold, and then by one code.

    Returns how many differ. Two correct quantisers differ there, since they round 1 / absmax differently. The code of
    -0 counts as that of +0, which other implementations never write.
    """
    n = x.numel()
    got, wanted = (reference.unpack(packed.detach().cpu(), n).long() for packed in (actual, expected))
    if quant_type == "fp4":
        got, wanted = (code.where(code != 8, 0) for code in (got, wanted))
    index = (got != wanted).nonzero().flatten()
    values = reference.code_values(quant_type).double()
    position = torch.searchsorted(torch.unique(values), values)
    thresholds = reference.decision_thresholds(quant_type)
    scaled = x.detach().cpu().double().flatten()[index] / absmax.cpu().double()[index // block_size]
    nearest = thresholds[(scaled[:, None] - thresholds.double()).abs().argmin(dim=1)]
    ulp = torch.nextafter(nearest.abs(), torch.tensor(torch.inf)).double() - nearest.abs().double()
    distance = (scaled - nearest.double()).abs() / ulp
    is_wrong = (distance > ulps) | ((position[got[index]] - position[wanted[index]]).abs() != 1)
    if is_wrong.any():
        first = int(is_wrong.nonzero()[0])
        raise AssertionError(
            f"codes differ: {int(is_wrong.sum())} of {n} away from a threshold; the first at flat index "
            f"{int(index[first])}, {distance[first].item():.3g} ulp from the threshold {nearest[first].item()}: "
            f"expected code {int(wanted[index[first]])}, got {int(got[index[first]])}"
        )
    return int(index.numel())


def assert_scale_codes_agree(
    actual: Tensor,
    expected: Tensor,
    absmax: Tensor,
    nested: tuple[Tensor, Tensor, Tensor],
    *,
    slack: float | None = None,
) -> int:
    """8-bit codes of scales may differ by one, where the scaled value is within `slack` (2 ulp) of the midpoint.

    `nested` is nested_absmax, nested_quant_map, nested_offset. Returns how many differ.
    """
    nested_absmax, quant_map, offset = (tensor.detach().cpu() for tensor in nested)
    actual, expected, absmax = actual.cpu(), expected.cpu(), absmax.cpu()
    _same_kind(actual, expected)
    index = (actual != expected).nonzero().flatten()
    lower = torch.minimum(actual, expected).long()[index]
    middle = (quant_map[lower] + quant_map[(lower + 1).clamp(max=255)]) / 2
    scaled = (absmax - offset).double()[index] / nested_absmax.double()[index // reference.NESTED_BLOCK_SIZE]
    ulp = torch.nextafter(middle.abs(), torch.tensor(torch.inf)).double() - middle.abs().double()
    limit = 2 * ulp if slack is None else torch.full_like(ulp, slack)
    apart = (actual[index].int() - expected[index].int()).abs()
    is_wrong = (apart != 1) | ~((scaled - middle.double()).abs() <= limit)
    if is_wrong.any():
        first = int(is_wrong.nonzero()[0])
        raise AssertionError(
            f"scale codes differ: {int(is_wrong.sum())} of {actual.numel()}; the first at {int(index[first])}, scaled value "
            f"{scaled[first].item()} beside the midpoint {middle[first].item()}: expected code "
            f"{int(expected[index[first]])}, got {int(actual[index[first]])}"
        )
    return int(index.numel())
