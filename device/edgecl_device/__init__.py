"""The device package: learns from one sample at a time on a stock inference runtime.

Needs numpy, safetensors and onnxruntime; never PyTorch.
"""

from edgecl_device.errors import (
    BundleError,
    BusyError,
    ClosedError,
    EdgeclError,
    ForgetRefusedError,
    InputError,
    PredictionError,
    SchemaError,
    StepMissingError,
    StoreError,
    StoreFullError,
    StoreMismatchError,
    UpdateRefusedError,
)
from edgecl_device.generator import Generator
from edgecl_device.learner import Learner
from edgecl_device.manifest import AdaptSpec, DrawSpec, Manifest, ReplaySpec, StepSpec, TensorSpec
from edgecl_device.memory import ReplayMemory
from edgecl_device.reports import AdaptReport, Identified, LearnReport, Prediction, TaskReport

__all__ = [
    "AdaptReport",
    "AdaptSpec",
    "BundleError",
    "BusyError",
    "ClosedError",
    "DrawSpec",
    "EdgeclError",
    "ForgetRefusedError",
    "Generator",
    "Identified",
    "InputError",
    "LearnReport",
    "Learner",
    "Manifest",
    "Prediction",
    "PredictionError",
    "ReplayMemory",
    "ReplaySpec",
    "SchemaError",
    "StepMissingError",
    "StepSpec",
    "StoreError",
    "StoreFullError",
    "StoreMismatchError",
    "TaskReport",
    "TensorSpec",
    "UpdateRefusedError",
]
