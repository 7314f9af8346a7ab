from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from medveil.models.autodiff.selfcheck import directional_check  # noqa: E402 (needs torch)
from medveil.models.training import TorchOracle, fit  # noqa: E402

pytestmark = pytest.mark.train


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_the_gradient_predicts_the_loss_and_no_image_sees_another(
    name: str, examples: Callable[..., Any], rng: np.random.Generator
) -> None:
    data = examples(150)
    net = fit.new_net(name, data, 0)
    oracle = TorchOracle(net, (1, 16, 16), 2)
    directional_check(oracle, rng, name=name)
    targets = np.eye(2, dtype=np.float32)[data.labels]
    losses, gradients = oracle.loss_and_gradient(data.images, targets)  # more than one chunk
    few_losses, few_gradients = oracle.loss_and_gradient(data.images[140:], targets[140:])
    assert losses.shape == (150,)
    assert np.allclose(losses[140:], few_losses, rtol=1e-5)
    assert np.allclose(gradients[140:], few_gradients, rtol=1e-3, atol=1e-7)
    assert not net.training
