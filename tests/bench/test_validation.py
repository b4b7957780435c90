from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from bench import validation
from bench.chips import CHIPS
from bench.estimate import Estimate
from bench.tutorials import _attention_kernel, _product_kernel
from bench.validation import GOAL, Published, Validation, cases, validate, validation_table
from bench.workloads import read


def checked(low: float, high: float, seconds: float) -> Validation:
    case = Published("matmul", "sm_80", low, high, "", 1e12, [], mock.Mock(), mock.Mock())
    return Validation(case, (1, 1, 1, 1, 1), Estimate("", seconds, 0.1, 9.0, "tensor"))


def test_an_error_is_relative_to_the_middle_and_never_hidden() -> None:
    slow, inside = checked(10, 30, 0.1), checked(5, 15, 0.1)
    assert slow.speed == pytest.approx(10)
    assert slow.error == pytest.approx(-0.5)
    assert inside.error == pytest.approx(0)
    assert (slow.is_inside, inside.is_inside) == (True, True)
    assert not checked(11, 30, 0.1).is_inside
    caption = str(validation_table([slow, inside]).caption)
    assert "Mean absolute error 25%, largest -50%" in caption
    assert "is missed by matmul" in caption
    assert "kept by all" in str(validation_table([inside]).caption)


def operations(case: int) -> tuple[float, float]:
    """Tensor-core operations of a case, as its parts have them and as it states them."""
    published = cases()[case]
    kernel = read(
        published.launch(published.configurations[-1]), published.arch, CHIPS[published.arch]
    )
    total = kernel.warps * sum(
        float(torch.tensor(p.times).expand(kernel.programs).sum()) * i.operations
        for p in published.parts(kernel) for i in p.code
    )  # fmt: skip
    return total, published.operations


@pytest.mark.parametrize("case", [0, 1, 2, 5])
def test_all_of_the_work_is_counted(compiler: ProcessPoolExecutor, case: int) -> None:
    found, stated = compiler.submit(operations, case).result()
    causal = case == 1  # whole blocks of the diagonal: half a block of 128 too many of 8,192 / 2
    assert found == pytest.approx(stated * (1 + 128 / 8192 if causal else 1))


def error(case: int) -> float:
    return validate(cases()[case]).error


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(cases())))
def test_the_model_is_near_what_was_published(compiler: ProcessPoolExecutor, case: int) -> None:
    assert abs(compiler.submit(error, case).result()) < GOAL


def test_sources_are_addresses_or_the_tutorial() -> None:
    assert all("https://" in c.source or "tutorial" in c.source for c in cases())
    results = [checked(1, 1, 1.0)._replace(published=c) for c in cases()]
    assert len(list(validation.sources(results))) == len(results)


def test_the_product_multiplies() -> None:
    a, b = torch.randn(40, 64), torch.randn(64, 50)
    c = torch.empty(40, 50, dtype=torch.float16)
    _product_kernel[(3 * 4,)](
        a, b, c, 40, 50, 64, 64, 1, 50, 1, 50, 1,
        GROUP=2, BLOCK_M=16, BLOCK_N=16, BLOCK_K=32,
    )  # fmt: skip
    torch.testing.assert_close(c.float(), a @ b, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_attends(causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 64, 16, dtype=torch.float16)
    out, lse = torch.empty_like(q), torch.empty(2 * 64)
    _attention_kernel[(2, 2)](
        0.25, lse, q, k, v, out, 2 * 64, 64, CAUSAL=causal, D=16, BLOCK_M=32, BLOCK_N=16
    )
    expected = scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=5e-3)
