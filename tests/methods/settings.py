"""One row a method: with which hyper-parameters the laws are tried, and which of them apply."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Setting:
    """How the laws suite tries a method.

    Attributes:
        method: The method's name.
        parameters: Hyper-parameters.
        symmetric: Whether the order of the members must not matter; not where a parameter names members by their
            place, or an order is drawn.
    """

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    symmetric: bool = True

    def __str__(self) -> str:
        return "-".join([self.method, *(f"{key}={value}" for key, value in self.parameters.items())])


SETTINGS = [
    Setting("adamerging", {"num_steps": 2, "granularity": "task"}),
    Setting("adamerging", {"num_steps": 2, "density": 0.2}, symmetric=False),
    Setting("arcee_fusion", {"fence": 0.5}),
    Setting("average"),
    Setting("average", {"weights": (0.5, 0.2, 0.3)}, symmetric=False),
    Setting("breadcrumbs"),
    Setting("breadcrumbs", {"density": 0.5, "gamma": 0.1, "election": "total"}),
    Setting("consensus"),
    Setting("consensus", {"min_tasks": 1, "mask_scale": 0.2, "scale": 1.0}),
    Setting("consensus", {"task": 1}, symmetric=False),
    Setting("dare", symmetric=False),
    Setting("dare", {"density": 0.5, "election": "total", "rescale": "norm"}, symmetric=False),
    Setting("della", symmetric=False),
    Setting("della", {"election": "none", "rescale": "norm", "density": 0.5}, symmetric=False),
    Setting("ema", symmetric=False),
    Setting("ema", {"decay": 0.5, "start": "zero"}, symmetric=False),
    Setting("emr"),
    Setting("emr", {"task": 1}, symmetric=False),
    Setting("epoch_soup", {"last": 2}, symmetric=False),
    Setting("fisher"),
    Setting("fisher", {"normalize": True}),
    Setting("fisher", {"favour_target": True}, symmetric=False),
    Setting("gradient_matching"),
    Setting("gradient_matching", {"scale": (1.0, -0.5, 0.5)}, symmetric=False),
    Setting("greedy_soup"),
    Setting("greedy_soup", {"start": "all"}),
    Setting("greedy_soup", {"order": "random"}, symmetric=False),
    Setting("isotropic"),
    Setting("isotropic", {"subspaces": "common_and_task"}),
    Setting("karcher"),
    Setting("karcher", {"weights": (0.5, 0.2, 0.3)}, symmetric=False),
    Setting("magmax", {"scale": 0.5}),
    # Adam follows the rounding of gradients that are zero in truth, such as those of keys' biases
    Setting("learned_soup", {"num_epochs": 1}, symmetric=False),
    Setting("learned_soup", {"num_epochs": 1, "granularity": "model"}),
    Setting("localize"),
    Setting("localize", {"density": (0.5, 0.1, 0.2), "scale": 0.5}, symmetric=False),
    Setting("model_stock"),
    Setting("model_stock", {"vectors": "rows", "clip": False}),
    Setting("multislerp"),
    Setting("multislerp", {"task_vectors": True, "weights": (0.5, 0.2, 0.3)}, symmetric=False),
    Setting("nearswap", {"t": 0.05}, symmetric=False),
    Setting("nuslerp"),
    Setting("nuslerp", {"vectors": "columns"}),
    Setting("nuslerp", {"vectors": "rows", "task_vectors": True}),
    Setting("passthrough", {"keep": 1}, symmetric=False),
    Setting("pcb"),
    Setting("pcb", {"density": 1.0, "scale": 0.5}),
    Setting("ram"),
    Setting("ram", {"rescale": 0.1, "scope": "tensor"}),
    Setting("regmean"),
    Setting("regmean_plus"),
    Setting("sce"),
    Setting("sce", {"select_topk": 1.0, "normalize": True, "tie": "positive"}),
    Setting("slerp"),
    Setting("slerp", {"t": 0.3}, symmetric=False),
    Setting("task_arithmetic"),
    Setting("task_arithmetic", {"scale": -1.0, "weights": (0.5, 0.2, 0.3), "normalize": True}, symmetric=False),
    Setting("task_singular_vectors"),
    Setting("ties"),
    Setting("ties", {"trim": "tensor", "density": 0.5, "tie": "positive"}),
    Setting("ties", {"election": "count", "weights": (1.0, 0.2, 0.3)}, symmetric=False),
    Setting("wise_ft"),
    Setting("wise_ft", {"start": "member", "alpha": 0.25}, symmetric=False),
    Setting("wise_ft", {"start": "member", "grid": (0.25, 0.5)}, symmetric=False),
    Setting("wudi"),
]
