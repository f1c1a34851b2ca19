"""The figure against a projection by hand; the state that a resume needs."""

import pytest
import torch
from torch.nn.functional import normalize

from gmail_lightning.callbacks import ModalityGapReport
from gmail_lightning.callbacks.modality_gap import draw, format_table


def some_pairs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    real = torch.randn(30, 6)
    return normalize(real + 0.5 * torch.randn(30, 6) + 1, dim=1), normalize(real, dim=1)


def test_both_panels_show_the_plane_of_the_state_before() -> None:
    before, after = some_pairs(0), some_pairs(1)
    figure = draw(before, after)
    union = torch.cat(before).double()
    _, vectors = torch.linalg.eigh((union - union.mean(0)).T @ (union - union.mean(0)))
    basis = vectors[:, [-1, -2]]
    for axis, (generated, real) in zip(figure.axes, (before, after), strict=False):
        shown = [torch.as_tensor(c.get_offsets()) for c in axis.collections]
        for points, features in zip(shown, (real, generated), strict=True):
            expected = (features.double() - union.mean(0)) @ basis
            torch.testing.assert_close(points.abs().double(), expected.abs(), rtol=1e-4, atol=1e-4)
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()


def test_the_table_names_every_set_and_the_change() -> None:
    before = {"novel": {"g2r_R@1": 0.25, "margin": 0.5}, "paired": {"g2r_R@1": 0.125}}
    after = {"novel": {"g2r_R@1": 0.375, "margin": 0.25}, "paired": {"g2r_R@1": 0.5}}
    lines = format_table(before, after).splitlines()
    assert [line.split()[0] for line in lines if "change" in line] == ["novel", "paired"]
    assert any("R@1" in line and line.split()[-3:] == ["0.250", "0.375", "+0.125"] for line in lines)
    assert any("margin" in line and line.split()[-1] == "-0.250" for line in lines)


def test_state_survives_a_checkpoint_file(tmp_path) -> None:
    report = ModalityGapReport()
    report.before, report._before_pairs = {"novel": {"margin": 0.5}}, some_pairs(0)
    torch.save(report.state_dict(), tmp_path / "state.pt")
    again = ModalityGapReport()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.before == report.before
    for kept, original in zip(again._before_pairs, report._before_pairs, strict=True):
        assert kept.dtype == torch.float32
        assert (kept - original).abs().max().item() == pytest.approx(0, abs=5e-4)  # half precision
