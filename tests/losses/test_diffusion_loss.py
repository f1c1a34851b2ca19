import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from gmail_lightning.losses import denoising_loss, min_snr_weight


def test_weights_are_the_paper_s_and_diffusers_snr() -> None:
    schedule = DDPMScheduler()
    timestep = torch.tensor([0, 10, 500, 999])
    snr = compute_snr(schedule, timestep)
    alpha = schedule.alphas_cumprod[timestep]
    torch.testing.assert_close(snr, alpha / (1 - alpha))
    for kind, offset in (("epsilon", 0), ("v_prediction", 1)):
        expected = [min(float(x), 5.0) / (float(x) + offset) for x in snr]
        assert min_snr_weight(snr, 5.0, kind).tolist() == pytest.approx(expected)


def test_a_timestep_without_signal_has_no_weight() -> None:
    snr = torch.tensor([1.0, 0.0])
    assert min_snr_weight(snr, 5.0, "v_prediction").tolist() == [0.5, 0.0]


def test_the_loss_is_a_weighted_mean_over_rows_in_fp32() -> None:
    prediction, target = torch.randn(3, 2, 4, 4).bfloat16(), torch.randn(3, 2, 4, 4)
    rows = [((prediction[i].double() - target[i].double()) ** 2).mean().item() for i in range(3)]
    assert denoising_loss(prediction, target).item() == pytest.approx(sum(rows) / 3)
    weighted = denoising_loss(prediction, target, torch.tensor([0.0, 1.0, 2.0]))
    assert weighted.item() == pytest.approx((rows[1] + 2 * rows[2]) / 3)
    assert weighted.dtype == torch.float32
