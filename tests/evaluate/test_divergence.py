import math

import pytest
import torch
from tiny_models import VOCAB, make_model

from quantkit.evaluate import divergence
from quantkit.evaluate.divergence import (
    compare_windows,
    divergence_of,
    full_divergence_of,
    kl_and_top1,
)


@pytest.fixture(scope="module")
def pair():
    original, model = make_model("llama"), make_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.003)
    return model, original


def slowly(model, original, windows) -> list[tuple[float, float, float, float]]:
    """Loss of the model and of the original, KL and top-1 agreement of each window, token by token."""
    rows = []
    for window in windows:
        with torch.no_grad():
            mine = model(window[None], use_cache=False).logits[0].double().softmax(-1).tolist()
            theirs = original(window[None], use_cache=False).logits[0].double().softmax(-1).tolist()
        losses, others, kls, same = [], [], [], 0
        for i in range(len(window) - 1):
            q, p, token = mine[i], theirs[i], int(window[i + 1])
            losses.append(-math.log(q[token]))
            others.append(-math.log(p[token]))
            kls.append(sum(a * math.log(a / b) for a, b in zip(p, q)))
            same += q.index(max(q)) == p.index(max(p))
        count = len(losses)
        rows.append((sum(losses) / count, sum(others) / count, sum(kls) / count, same / count))
    return rows


def mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    spread = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(spread / len(values))


# In chunks of a few tokens and at once.
@pytest.mark.parametrize("chunk", [VOCAB * 5, 1 << 24])
def test_equals_the_definitions_written_slowly(pair, chunk: int, monkeypatch):
    monkeypatch.setattr(divergence, "_CHUNK", chunk)
    blocks = torch.randint(2, VOCAB, (6, 24), generator=torch.Generator().manual_seed(0))
    want = slowly(*pair, blocks)
    windows = compare_windows(*pair, blocks)
    found = full_divergence_of(windows, 24)
    kl, kl_error = mean_and_error([row[2] for row in want])
    top1, top1_error = mean_and_error([row[3] for row in want])
    difference, error = mean_and_error([row[0] - row[1] for row in want])
    assert (found.kl, found.kl_stderr) == pytest.approx((kl, kl_error), rel=1e-4)
    assert (found.top1, found.top1_stderr) == pytest.approx((top1, top1_error))
    assert found.ratio == pytest.approx(math.exp(difference), rel=1e-5)
    assert found.ratio_stderr == pytest.approx(math.exp(difference) * error, rel=1e-3)
    assert found.tokens == 6 * 23
    assert 0.2 < found.top1 < 1, "the test would not see a wrong argmax"


def test_the_direction_is_the_originals(pair):
    """KL is not symmetric: a model that rules out what its original allows must look bad."""
    sure, unsure = torch.tensor([[20.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert kl_and_top1(original=unsure, model=sure)[0] > 9
    assert kl_and_top1(original=sure, model=unsure)[0] == pytest.approx(math.log(2), rel=1e-6)


def test_a_model_beside_itself(pair):
    blocks = torch.randint(2, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    found = full_divergence_of(compare_windows(pair[0], pair[0], blocks), 24)
    assert (found.ratio, found.kl, found.top1) == (1, 0, 1)


def test_one_window_has_no_error():
    found = divergence_of(torch.tensor([1.5]), torch.tensor([1.0]))
    assert found.ratio == pytest.approx(math.exp(0.5))
    assert found.ratio_stderr is None
