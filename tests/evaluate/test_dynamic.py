import torch
from tiny_models import VOCAB, make_model

from quantkit.evaluate.dynamic import dynamic_crossquant
from quantkit.models.outliers import plant_outliers


def test_the_dynamic_form_survives_outliers_and_leaves_no_trace():
    model = make_model("llama")
    model.load_state_dict(plant_outliers(model.state_dict(), model.config.to_dict()))
    ids = torch.randint(0, VOCAB, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids, use_cache=False).logits

        def error(alpha: float) -> float:
            with dynamic_crossquant(model, alpha=alpha):
                return float((model(ids, use_cache=False).logits - before).norm() / before.norm())

        crossed, per_token = error(0.15), error(1.0)
        assert 0 < crossed < 0.5 * per_token
        assert torch.equal(model(ids, use_cache=False).logits, before)
