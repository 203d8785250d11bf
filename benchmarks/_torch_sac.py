"""A plain PyTorch soft actor-critic: what a careful person writes for one agent.

The same algorithm as `policies.sac` (clipped double Q-learning, learned temperature,
Adam everywhere), eager, with replay rows that already lie in one tensor, fused Adam and
multi-tensor target updates. Needs torch, so it is imported only where that is wanted.
"""

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _mlp(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(inputs, size), nn.ReLU()]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class Agent:
    """Networks, optimisers and one gradient step of each.

    Attributes:
        actor: mean and log standard deviation of the pre-image.
        critics: two action values.
        targets: their moving averages.
        log_temperature: learned.
    """

    def __init__(self, observation_size: int, action_size: int, hidden=(256, 256)):
        self.actor = _mlp(observation_size, hidden, 2 * action_size)
        both = observation_size + action_size
        self.critics = nn.ModuleList([_mlp(both, hidden, 1) for _ in range(2)])
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_temperature = torch.zeros((), requires_grad=True)
        self.target_entropy = -float(action_size)
        self.discount, self.rate = 0.99, 0.005
        self.adam_actor, self.adam_critic, self.adam_temperature = (
            torch.optim.Adam(parameters, lr=3e-4, fused=True)
            for parameters in (
                self.actor.parameters(),
                self.critics.parameters(),
                [self.log_temperature],
            )
        )

    def sample(self, observation: Tensor, noise: Tensor | None = None):
        """An action and its log density, from the pre-image."""
        mean, log_std = self.actor(observation).chunk(2, dim=-1)
        log_std = log_std.clamp(-5.0, 2.0)
        noise = torch.randn_like(mean) if noise is None else noise
        position = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        squash = 2.0 * (math.log(2.0) - position - F.softplus(-2.0 * position))
        return position.tanh(), (log_prob - squash).sum(-1)

    @staticmethod
    def values(critics: Any, observation: Tensor, action: Tensor) -> Tensor:
        """``[critic, batch]``."""
        inputs = torch.cat([observation, action], dim=-1)
        return torch.stack([critic(inputs).squeeze(-1) for critic in critics])

    def update(self, batch: dict[str, Tensor], noise: Any = (None, None)) -> None:
        """Critics, actor, temperature, targets.

        Args:
            batch: observation, action, reward, next_observation, discount (0 where the
                step terminated, else 1), rows of one tensor each.
            noise: of the target's action and the actor's, ``[batch, act]``; drawn if
                None.
        """
        temperature = self.log_temperature.detach().exp()
        with torch.no_grad():
            action, log_prob = self.sample(batch["next_observation"], noise[0])
            value = self.values(self.targets, batch["next_observation"], action)
            value = value.amin(0) - temperature * log_prob
            target = batch["reward"] + self.discount * batch["discount"] * value
        q = self.values(self.critics, batch["observation"], batch["action"])
        self._step(self.adam_critic, (q - target).square().sum(0).mean())

        self.critics.requires_grad_(False)
        action, log_prob = self.sample(batch["observation"], noise[1])
        q = self.values(self.critics, batch["observation"], action).amin(0)
        self._step(self.adam_actor, (temperature * log_prob - q).mean())
        self.critics.requires_grad_(True)

        gap = (log_prob.detach() + self.target_entropy).mean()
        self._step(self.adam_temperature, -self.log_temperature * gap)
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.targets.parameters()),
                list(self.critics.parameters()),
                self.rate,
            )

    @staticmethod
    def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def load(self, params: Any, target_critic: Any) -> None:
        """Takes the weights of `policies.sac`."""
        _load(self.actor, params.actor["params"])
        for index in range(2):
            member = _member(params.critic, index)
            _load(self.critics[index], member)
            _load(self.targets[index], _member(target_critic, index))
        with torch.no_grad():
            self.log_temperature.fill_(float(params.log_temperature))

    def difference(self, params: Any, target_critic: Any) -> float:
        """Largest difference of any weight from those of `policies.sac`."""
        worst = abs(self.log_temperature.item() - float(params.log_temperature))
        pairs = [(self.actor, params.actor["params"])]
        for index in range(2):
            pairs.append((self.critics[index], _member(params.critic, index)))
            pairs.append((self.targets[index], _member(target_critic, index)))
        for network, theirs in pairs:
            for layer, name in zip(network[::2], _names(network), strict=True):
                kernel = layer.weight.detach().numpy().T - theirs[name]["kernel"]
                bias = layer.bias.detach().numpy() - theirs[name]["bias"]
                worst = max(worst, np.abs(kernel).max(), np.abs(bias).max())
        return float(worst)


def _names(network: nn.Sequential) -> list[str]:
    return [f"fc{i}" for i in range(len(network) // 2)] + ["last_fc"]


def _member(stacked: Any, index: int) -> Any:
    return {
        name: {part: np.asarray(leaf[index]) for part, leaf in layer.items()}
        for name, layer in stacked["params"].items()
    }


def _load(network: nn.Sequential, params: Any) -> None:
    with torch.no_grad():
        for layer, name in zip(network[::2], _names(network), strict=True):
            layer.weight.copy_(torch.tensor(np.asarray(params[name]["kernel"]).T))
            layer.bias.copy_(torch.tensor(np.asarray(params[name]["bias"])))


class Replay:
    """Rows in tensors; a sample is one index of each."""

    def __init__(self, arrays: dict[str, np.ndarray], batch_size: int):
        self.tensors = {name: torch.tensor(value) for name, value in arrays.items()}
        self.batch_size = batch_size
        self.rows = len(next(iter(self.tensors.values())))

    def sample(self) -> dict[str, Tensor]:
        """A uniform batch, with replacement."""
        index = torch.randint(self.rows, (self.batch_size,))
        return {name: value[index] for name, value in self.tensors.items()}
