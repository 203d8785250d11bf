"""A plain PyTorch energy transition model: the published update and its prediction.

Written from the equations (Chen et al., "Offline transition modeling via contrastive
energy learning", ICML 2024), the way one would write it without a second thought for
speed: one MLP over ``[s, a, y]``, autograd for the chain. Needs torch, so it is imported
only where that is wanted.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Chain:
    """Steps of ``η_i (½ clip(∇E) + noise ε)``, clipped to ``±step_clip``, in a box.

    Attributes:
        step_sizes: ``η_i``, falling quadratically from ``first`` to ``last``.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        first: float = 0.1,
        last: float = 1e-3,
        noise: float = 0.5,
        drift_clip: float = 10.0,
        step_clip: float = 0.5,
        margin: float = 1.1,
    ):
        left = 1.0 - np.arange(num_steps) / max(num_steps - 1, 1)
        self.step_sizes = (first - last) * left**2 + last
        self.noise, self.drift_clip = noise, drift_clip
        self.step_clip, self.margin = step_clip, margin

    def __call__(self, energy: Any, condition: Tensor, target: Tensor) -> Tensor:
        """The ends of chains that start at ``target``, gradients stopped."""
        for step_size in self.step_sizes:
            target = target.detach().requires_grad_()
            (drift,) = torch.autograd.grad(energy(condition, target).sum(), target)
            move = 0.5 * drift.clamp(-self.drift_clip, self.drift_clip)
            if self.noise:
                move = move + self.noise * torch.randn_like(target)
            move = (step_size * move).clamp(-self.step_clip, self.step_clip)
            target = (target.detach() - move).clamp(-self.margin, self.margin)
        return target


class Energy(nn.Module):
    """An MLP over ``[condition ‖ target]`` with one output per row."""

    def __init__(self, condition_size: int, target_size: int, hidden: Sequence[int]):
        super().__init__()
        sizes = (condition_size + target_size, *hidden)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, condition: Tensor, target: Tensor) -> Tensor:
        """``[*batch, cond]``, ``[*batch, dim]`` -> energy ``[*batch]``."""
        return self.net(torch.cat([condition, target], dim=-1)).squeeze(-1)

    def load(self, params: Any) -> None:
        """Takes the weights of `nets.conditional_energy`."""
        params = params["params"]
        count = len(self.net) // 2
        rows = [_kernel(params["condition_layer"]), _kernel(params["target_layer"])]
        names = [f"hidden_{i}" for i in range(count - 1)]
        kernels = [np.concatenate(rows), *(_kernel(params[name]) for name in names)]
        biases = [params["condition_layer"], *(params[name] for name in names)]
        kernels.append(_kernel(params["output"]))
        biases.append(params["output"])
        with torch.no_grad():
            for layer, kernel, bias in zip(self.net[::2], kernels, biases, strict=True):
                layer.weight.copy_(torch.tensor(kernel.T))
                layer.bias.copy_(torch.tensor(np.asarray(bias["bias"])))

    def gradient(self) -> list[np.ndarray]:
        """Of each layer's weight ``[in, out]`` and bias, as numpy."""
        parts = []
        for layer in self.net[::2]:
            parts += [layer.weight.grad.numpy().T, layer.bias.grad.numpy()]
        return parts


def _kernel(layer: Any) -> np.ndarray:
    return np.asarray(layer["kernel"])


class Training:
    """The published update: InfoNCE on chain negatives, gradient penalty, Adam with L2."""

    def __init__(
        self,
        energy: Energy,
        chain: Chain,
        *,
        num_negatives: int,
        margin: float = 5.0,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
    ):
        self.energy, self.chain = energy, chain
        self.num_negatives, self.margin = num_negatives, margin
        self.optimizer = torch.optim.Adam(
            energy.parameters(), lr=learning_rate, weight_decay=weight_decay
        )

    def loss(self, condition: Tensor, positive: Tensor, initial: Tensor):
        """Contrast and penalty of each row, given where the negatives start.

        Args:
            condition: ``[batch, cond]``, normalised.
            positive: ``[batch, dim]``, in the box.
            initial: ``[batch, negative, dim]``.
        """
        each = condition[:, None].expand(-1, initial.shape[1], -1)
        negative = self.chain(self.energy, each, initial)
        targets = torch.cat([negative, positive[:, None]], dim=1).requires_grad_()
        each = condition[:, None].expand(-1, targets.shape[1], -1)
        energies = self.energy(each, targets)
        contrast = energies[:, -1] + torch.logsumexp(-energies, dim=1)
        (slope,) = torch.autograd.grad(energies.sum(), targets, create_graph=True)
        excess = (slope.norm(dim=-1) - self.margin).clamp(min=0.0)
        return contrast, excess.square().mean(dim=1)

    def update(self, condition: Tensor, positive: Tensor, initial: Any = None):
        """One step on the sum over rows; returns mean contrast and mean penalty."""
        if initial is None:
            shape = (len(positive), self.num_negatives, positive.shape[1])
            initial = 2.0 * torch.rand(shape) - 1.0
        contrast, penalty = self.loss(condition, positive, initial)
        self.optimizer.zero_grad(set_to_none=True)
        (contrast + penalty).sum().backward()
        self.optimizer.step()
        return contrast.mean().item(), penalty.mean().item()


def predict(
    energy: Energy, chain: Chain, condition: Tensor, target_size: int, block: int
) -> Tensor:
    """One chain per row from "nothing changes", ``block`` rows at a time; in the box."""
    ends = [
        chain(energy, rows, torch.zeros(len(rows), target_size))
        for rows in condition.split(block)
    ]
    return torch.cat(ends)
