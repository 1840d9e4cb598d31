"""The methods that have a closed form, solved on all samples at once in float64, and joint logistic regression.

Independent of the learners' recursions: sums over the whole training set, one linear system. What a stream of single samples
reaches is compared with these.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgecl.learner import Problem
from edgecl.methods import Joint
from edgecl.streams import Dataset
from edgecl_device.manifest import TensorSpec


def unit(x: NDArray[Any]) -> NDArray[np.float64]:
    """Rows divided by their length."""
    long = x.astype(np.float64)
    return long / np.maximum(np.linalg.norm(long, axis=1, keepdims=True), 1e-12)


def ridge(data: Dataset, gamma: float) -> float:
    """Test accuracy of ridge regression on one-hot targets."""
    x, targets = unit(data.x), np.eye(len(data.class_names))[data.y]
    readout = np.linalg.solve(x.T @ x + gamma * np.eye(x.shape[1]), x.T @ targets)
    return float(((unit(data.x_test) @ readout).argmax(1) == data.y_test).mean())


def discriminant(data: Dataset, g0: float) -> float:
    """Test accuracy of linear discriminant analysis with the within-class scatter plus g0 and equal priors."""
    x, means = unit(data.x), class_means(data)
    centred = x - means[data.y]
    readout = np.linalg.solve(centred.T @ centred + g0 * np.eye(x.shape[1]), means.T)
    offset = 0.5 * np.einsum("kd,dk->k", means, readout)
    return float(((unit(data.x_test) @ readout - offset).argmax(1) == data.y_test).mean())


def nearest_mean(data: Dataset) -> float:
    """Test accuracy of the nearest class mean."""
    means = class_means(data)
    distance = (means**2).sum(1) - 2 * unit(data.x_test) @ means.T
    return float((distance.argmin(1) == data.y_test).mean())


def class_means(data: Dataset) -> NDArray[np.float64]:
    """Mean of every class [K, d]."""
    x = unit(data.x)
    return np.stack([x[data.y == label].mean(0) for label in range(len(data.class_names))])


class ScaledLinear(nn.Module):
    """A linear classifier from zero on features of length 1, scaled up to length sqrt(d)."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.scale = size**0.5
        self.fc = nn.Linear(size, classes)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, z: Tensor) -> Tensor:
        scores: Tensor = self.fc(z * self.scale)
        return scores


def logistic_regression(data: Dataset, config: Joint.Config) -> float:
    """Test accuracy of logistic regression trained offline on all classes at once."""
    size, classes = data.x.shape[1], len(data.class_names)
    joint = Joint(Problem(TensorSpec("z", (1, size), "float32"), classes), config, suffix=ScaledLinear(size, classes))
    state = joint.fit(torch.tensor(unit(data.x), dtype=torch.float32), torch.tensor(data.y))
    with torch.no_grad():
        scores = joint.scores(joint.parameters(state), torch.tensor(unit(data.x_test), dtype=torch.float32))
    return float((scores.argmax(1).numpy() == data.y_test).mean())
