"""The plane of the largest components against scikit-learn, and its gradient against a fixed plane."""

import pytest
import torch
from sklearn.decomposition import PCA

from gmail_lightning.losses import principal_components


def batch(rows: int = 40, dim: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, dim, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 2, dim).double()
    return torch.nn.functional.normalize(features + 0.7, dim=1)


@pytest.mark.parametrize("components", [1, 5, 11])
def test_equals_scikit_learn(components: int) -> None:
    features = batch()
    pca = PCA(components, svd_solver="full").fit(features.numpy())
    expected = torch.from_numpy(pca.inverse_transform(pca.transform(features.numpy())))
    torch.testing.assert_close(principal_components(features, components), expected, rtol=1e-9, atol=1e-9)
    single = principal_components(features.float(), components)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, expected.float(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(single.norm(dim=1), torch.ones(40), atol=1e-3)  # and stays so


def test_all_components_change_nothing() -> None:
    features = batch()
    assert torch.equal(principal_components(features, 12), features)
    assert torch.equal(principal_components(features, 500), features)
    torch.testing.assert_close(principal_components(features[:6], 8), features[:6])  # six rows span five dimensions


def test_the_gradient_moves_rows_within_the_plane() -> None:
    features = batch().requires_grad_()
    weight = torch.randn(40, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (principal_components(features, 3) * weight).sum().backward()
    directions = torch.from_numpy(PCA(3, svd_solver="full").fit(features.detach().numpy()).components_)
    torch.testing.assert_close(features.grad, weight @ directions.T @ directions, rtol=1e-8, atol=1e-9)


def test_equal_features_have_finite_gradients() -> None:
    features = torch.ones(8, 6, requires_grad=True)  # all eigenvalues are equal
    projected = principal_components(features, 2)
    assert torch.equal(projected, features)
    projected.sum().backward()
    assert torch.isfinite(features.grad).all()


def test_autocast_changes_nothing() -> None:
    features = batch().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = principal_components(features, 4)
    assert torch.equal(inside, principal_components(features, 4))


def test_bad_input_is_named() -> None:
    for features, components in ((torch.ones(3, 2), 0), (torch.ones(0, 2), 2), (torch.ones(3), 2)):
        with pytest.raises(ValueError, match="at least one component"):
            principal_components(features, components)
