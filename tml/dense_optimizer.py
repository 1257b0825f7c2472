"""SGD, Adagrad and Adam of dense parameters, the same to the last bit as torch.optim's on a
processor.

To build any optimizer of torch.optim loads its compiler, and with that a computer algebra system:
76 MB that stay, and 1.2 s of processor time before the first step, for updates of three lines each.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


class DenseOptimizer(ABC):
    """What updates dense parameters by their gradients."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float = 0.0
    ) -> None:
        self.learning_rate = lr
        """Of the next step."""
        self.parameters = list(parameters)
        self.weight_decay = weight_decay
        """λ: λθ is added to the gradient of each parameter θ."""
        self._states = [self._begin(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for parameter, state in zip(self.parameters, self._states, strict=True):
            if (gradient := parameter.grad) is not None:
                if self.weight_decay:
                    gradient = gradient.add(parameter, alpha=self.weight_decay)
                self._update(parameter, gradient, state)

    def zero_grad(self) -> None:
        """Let go of the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def state_of(self, parameter: nn.Parameter) -> State:
        """Saved suffix → state of one of the parameters, to be read or overwritten in place."""
        (found,) = (
            state
            for own, state in zip(self.parameters, self._states, strict=True)
            if own is parameter
        )
        return found

    @abstractmethod
    def _begin(self, parameter: nn.Parameter) -> State:
        """The state before the first update."""

    @abstractmethod
    def _update(self, parameter: nn.Parameter, gradient: Tensor, state: State) -> None:
        """Change parameter and state in place."""


class SGD(DenseOptimizer):
    """θ −= lr g."""

    def _begin(self, parameter: nn.Parameter) -> State:
        return {}

    def _update(self, parameter: nn.Parameter, gradient: Tensor, state: State) -> None:
        parameter.add_(gradient, alpha=-self.learning_rate)


class Adagrad(DenseOptimizer):
    """a += g²; θ −= lr g / (√a + eps)."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        self._eps = eps
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)

    def _begin(self, parameter: nn.Parameter) -> State:
        return {"accumulator": torch.zeros_like(parameter, requires_grad=False)}

    def _update(self, parameter: nn.Parameter, gradient: Tensor, state: State) -> None:
        squares = state["accumulator"].addcmul_(gradient, gradient)
        parameter.addcdiv_(gradient, squares.sqrt().add_(self._eps), value=-self.learning_rate)


class Adam(DenseOptimizer):
    """Adam (arXiv 1412.6980) with both moments corrected for their start."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: Sequence[float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        self._betas = betas
        self._eps = eps
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)

    def _begin(self, parameter: nn.Parameter) -> State:
        return {
            "m": torch.zeros_like(parameter, requires_grad=False),
            "v": torch.zeros_like(parameter, requires_grad=False),
            "step": torch.zeros(()),
        }

    def _update(self, parameter: nn.Parameter, gradient: Tensor, state: State) -> None:
        beta_1, beta_2 = self._betas
        state["step"] += 1
        updates = float(state["step"])
        m = state["m"].lerp_(gradient, 1 - beta_1)
        v = state["v"].mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
        root = (v.sqrt() / (1 - beta_2**updates) ** 0.5).add_(self._eps)
        parameter.addcdiv_(m, root, value=-self.learning_rate / (1 - beta_1**updates))
