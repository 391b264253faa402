import pytest
import torch

from quantkit.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_anywhere_is_found(dtype: torch.dtype, bad: float):
    x = torch.full((300, 70), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(x)  # whose sum is infinite
    for row, column in ((0, 0), (299, 69), (123, 31)):
        spoilt = x.clone()
        spoilt[row, column] = bad
        assert not all_finite(spoilt)
        assert not all_finite(spoilt.T)


def test_what_has_no_such_numbers():
    assert all_finite(torch.empty(0, 3))
    assert all_finite(torch.arange(5))
    eight = torch.tensor([448.0, -448.0]).to(torch.float8_e4m3fn)
    assert all_finite(eight)
    eight.view(torch.uint8)[1] = 0x7F
    assert not all_finite(eight)
