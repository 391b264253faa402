import json

import pytest
import torch

from quantkit.calibration.outliers import input_outliers, outlier_ratio
from quantkit.calibration.statistics import InputStatistics


def test_the_largest_channel_over_the_median_of_its_head():
    assert outlier_ratio(torch.tensor([1.0, 2.0, 8.0])) == 4
    assert outlier_ratio(torch.tensor([[1.0, 2.0, 8.0], [4.0, 4.0, 40.0]])) == 10
    assert outlier_ratio(torch.zeros(4)) == 0


@pytest.mark.parametrize(("factor", "rotation"), [(True, None), (False, 32), (True, 32)])
def test_smoothing_and_rotating_bring_it_down(factor: bool, rotation: int | None):
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 50
    stats = InputStatistics(64, hessian=False, keep=200, batches=1, device=torch.device("cpu"))
    stats.update(x)
    found = input_outliers(stats, stats.absmax if factor else None, rotation)
    assert found["before"] > 40
    assert found["after"] < 10


def test_every_layer_of_a_report_has_them(quantized):
    report = json.loads((quantized("fireq") / "quantkit" / "report.json").read_text())
    for layer in report["layers"]:
        assert set(layer["outliers"]) == {"keys", "qkv", "o", "gate_up", "down"}
        assert layer["outliers"]["keys"]["after"] < layer["outliers"]["keys"]["before"]
        assert layer["linears"]["self_attn.q_proj"]["bits"] == pytest.approx(4.125, abs=0.01)
