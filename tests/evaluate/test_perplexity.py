import math

import pytest
import torch
from tiny_models import VOCAB, make_model

from quantkit.errors import QuantkitError
from quantkit.evaluate.perplexity import perplexity


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def tokens(count: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, (count,), generator=torch.Generator().manual_seed(0))


def test_equals_the_protocol_written_slowly(model):
    ids, seqlen = tokens(1000), 64
    losses = []
    for start in range(0, 1000 - seqlen + 1, seqlen):
        window = ids[start : start + seqlen]
        with torch.no_grad():
            logits = model(window[None], use_cache=False).logits[0].double()
        each = [-float(logits[i].log_softmax(0)[window[i + 1]]) for i in range(seqlen - 1)]
        losses.append(sum(each) / len(each))
    mean = sum(losses) / len(losses)
    spread = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1) / len(losses))
    result = perplexity(model, ids, seqlen)
    assert result.windows == 15
    assert result.tokens == 960
    assert result.ppl == pytest.approx(math.exp(mean), rel=1e-5)
    assert result.stderr == pytest.approx(math.exp(mean) * spread, rel=1e-3)


def test_limit(model):
    assert perplexity(model, tokens(1000), 64, limit=3).windows == 3
    assert perplexity(model, tokens(64), 64).stderr is None


def test_shorter_than_a_window(model):
    with pytest.raises(QuantkitError, match="shorter than one window"):
        perplexity(model, tokens(63), 64)


def test_outputs_that_are_not_finite(model):
    broken = make_model("llama")
    broken.lm_head.weight.data[5] = float("nan")
    with pytest.raises(QuantkitError, match="not finite"):
        perplexity(broken, tokens(128), 64)
