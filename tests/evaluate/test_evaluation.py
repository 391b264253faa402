import gc
import weakref

import pytest
from tiny_models import save_model

from quantkit.errors import QuantkitError
from quantkit.evaluate.evaluation import evaluate


def test_alone_and_together_agree(quantized, tiny, text):
    """Without KL one model is in memory at a time; perplexities and their ratio stay what they were."""
    models = {str(quantized("int4")): str(tiny()), str(quantized("int8")): str(tiny())}
    together = evaluate(models, [str(text), "sample"], seqlen=64, limit=6)
    alone = evaluate(models, [str(text), "sample"], seqlen=64, limit=6, metrics=("ppl",))
    for a, b in zip(together, alone):
        assert a.ppl == b.ppl
        assert a.original_ppl == b.original_ppl
        for name in (str(text), "sample"):
            assert a.divergence[name].ratio == b.divergence[name].ratio
            assert a.divergence[name].ratio == pytest.approx(
                a.ppl[name].ppl / a.original_ppl[name].ppl
            )
            assert b.divergence[name].kl is None
    assert list(alone[0].to_dict()["baseline"]) == [str(text), "sample"]


@pytest.mark.parametrize(("metrics", "most"), [(("ppl",), 1), (("ppl", "kl"), 2)])
def test_how_many_models_are_in_memory(quantized, tiny, metrics, most, monkeypatch):
    from quantkit.runtime import load as module

    alive: list[weakref.ref] = []
    counts = []
    real = module.load

    def load(*arguments, **settings):
        gc.collect()
        model = real(*arguments, **settings)
        alive.append(weakref.ref(model))
        counts.append(sum(ref() is not None for ref in alive))
        return model

    monkeypatch.setattr(module, "load", load)
    models = {str(quantized("int4")): str(tiny()), str(quantized("int8")): str(tiny())}
    evaluate(models, ["sample"], seqlen=32, limit=1, metrics=metrics)
    assert len(counts) == 3
    assert max(counts) == most


def test_all_models_see_the_same_windows(tiny, tmp_path):
    short = save_model(tmp_path / "short", max_position_embeddings=96)
    found = evaluate({str(tiny()): None, str(short): None}, ["sample"], limit=2)
    assert [result.ppl["sample"].seqlen for result in found] == [96, 96]


def test_nothing_is_loaded_before_everything_is_known(tiny, text, tmp_path, monkeypatch):
    from quantkit.runtime import load as module

    monkeypatch.setattr(module, "load", None)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    for settings, says in (
        ({"texts": [str(text), str(short)]}, r"short\.txt"),
        ({"texts": ["sample"], "metrics": ("f1",)}, "unknown metric"),
        ({"texts": [str(tmp_path / "none.txt")]}, "no such text"),
        ({"texts": ["sample"], "seqlen": 257}, "at most 256"),
    ):
        with pytest.raises(QuantkitError, match=says):
            evaluate({str(tiny()): None}, **settings)
