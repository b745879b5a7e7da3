"""Arguments of optimizers, right and wrong."""

from __future__ import annotations

import pytest
import torch

import gpukern.optim as optim


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("SGD", {"lr": -1.0}, "Invalid learning rate: -1.0"),
        ("SGD", {"lr": 0.1, "momentum": -1.0}, "Invalid momentum value: -1.0"),
        ("SGD", {"lr": 0.1, "nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
        ("SGD", {"lr": torch.inf}, "Invalid lr: inf"),
        ("SGD", {"lr": torch.nan}, "Invalid lr: nan"),
        ("Adam", {"lr": torch.nan}, "Invalid learning rate: nan"),
        ("Adam", {"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ("Adam", {"eps": torch.inf}, "Invalid eps: inf"),
        ("AdamW", {"weight_decay": -1}, "Invalid weight_decay value: -1"),
        ("Adagrad", {"lr_decay": -1.0}, "Invalid lr_decay value: -1.0"),
        ("RMSprop", {"alpha": -1.0}, "Invalid alpha value: -1.0"),
        ("Lion", {"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        ("LARS", {"trust_coefficient": -1.0}, "Invalid trust_coefficient value: -1.0"),
        ("LAMB", {"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element"),
        ("SGD", {"lr": 0.1, "max_grad_norm": 0.0}, "Invalid max_grad_norm: 0.0"),
        ("SGD", {"lr": 0.1, "max_grad_value": torch.nan}, "Invalid max_grad_value: nan"),
        ("SGD", {"lr": 0.1, "state_dtype": torch.int32}, "Invalid state_dtype: torch.int32"),
        (
            "SGD",
            {"lr": 0.1, "state_dtype": "float32"},
            "Invalid state_dtype: 'float32', expected a floating-point torch.dtype",
        ),
    ],
)
def test_bad_numbers(name, options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        getattr(optim, name)([torch.nn.Parameter(torch.zeros(1))], **options)


def test_torchs_switches_are_taken():
    owner = torch.nn.Parameter(torch.zeros(1))
    optimizer = optim.Adam([owner], foreach=True, capturable=True)
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.param_groups[0]["foreach"]
    with pytest.raises(RuntimeError, match="differentiable"):
        optim.Adam([owner], differentiable=True)
    with pytest.raises(ValueError, match="empty parameter list"):
        optim.SGD([], lr=0.1)


def test_named_parameters(where):
    model = torch.nn.Linear(3, 2, device=where)
    optimizer = optim.AdamW(model.named_parameters(), lr=0.1)
    for owner in model.parameters():
        owner.grad = torch.ones_like(owner)
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_signatures_are_torchs_and_ours():
    import inspect

    names = list(inspect.signature(optim.Adam).parameters)
    assert names[:2] == ["params", "lr"] and "amsgrad" in names and names[-1] == "seed" and "arguments" not in names
