"""One update of a GAN: the discriminator, then the generator, then the averaged generator.

The non-saturating loss (Goodfellow et al. 2014) with Adam. Samples are taken from an exponential
average of the generator's weights, which moves far less than the generator itself. Everything
that the next update depends on is in `tensors` and `numbers`, so that a run can go on to the same
bits. Nothing here knows files or processes.
"""
# ruff: noqa: TID253  (imported by the program inside a worker only)

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from llmos.services.model import safepoints
from llmos.services.optim import pieces
from llmos.services.programs import conditions, lm_state
from llmos.services.programs.base import Gate, Keep, as_it_is
from llmos.services.programs.gan_nets import MODEL_TYPE, Discriminator, Generator, Shape

# The average follows about the last 1 / (1 - 0.99) updates: a run of a few minutes has
# a thousand or two, and a longer memory would still show how it began.
AVERAGE = 0.99

# One-sided label smoothing (Salimans et al. 2016): a discriminator that is never quite sure
# keeps giving the generator something to learn from.
REAL = 0.9


class Trainer:
    """Both networks, both optimizers, the average, on one device."""

    def __init__(
        self, shape: Shape, lr: float, beta1: float, device: str, half: bool, gate: Gate
    ) -> None:
        self.shape, self.half, self.device = shape, half, torch.device(device)
        self._gate = gate
        self.generator = self._placed(Generator(shape))
        self.discriminator = self._placed(Discriminator(shape))
        self.average = self._copied(self.generator).eval().requires_grad_(False)
        self.updates = 0
        for net in (self.generator, self.discriminator):
            safepoints.install(net, gate)
        self._optimizers = {
            "generator": self._adam(self.generator, lr, beta1),
            "discriminator": self._adam(self.discriminator, lr, beta1),
        }

    def update(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """Learn from `real` (batch, channels, height, width) in [-1, 1].

        -> losses of the discriminator and the generator, as tensors on the device.
        """
        self._gate.boundary("discriminator")
        real = real.to(self.device, memory_format=torch.channels_last)
        with self._autocast():
            fake = self.generator(self._noise(len(real)))
            real_score = self.discriminator(real)
            fake_score = self.discriminator(fake.detach())
        # For a logit s, -log(sigmoid(s)) is softplus(-s); the target of real images is REAL.
        real_score, fake_score = real_score.float(), fake_score.float()
        loss_real = REAL * softplus(-real_score) + (1 - REAL) * softplus(real_score)
        loss_d = (loss_real + softplus(fake_score)).mean()
        self._apply("discriminator", loss_d)
        self.discriminator.requires_grad_(False)
        self._gate.boundary("generator")
        with self._autocast():
            score = self.discriminator(fake)
        loss_g = softplus(-score.float()).mean()
        self._apply("generator", loss_g)
        self.discriminator.requires_grad_(True)
        self.updates += 1
        self._gate.boundary("average")
        self._follow()
        return loss_d.detach(), loss_g.detach()

    @torch.no_grad()
    def sample(self, noise: Tensor) -> Tensor:
        """Images (batch, channels, height, width) in [-1, 1] for `noise` (batch, latent)."""
        images: Tensor = self.average(noise.to(self.device)).float().cpu()
        return images

    def write_model(self, folder: Path) -> None:
        """The model's files: generator (the average), discriminator, config.json."""
        self.capture_model(as_it_is)(folder)

    def capture_model(self, keep: Keep) -> Callable[[Path], None]:
        """The model as it is now -> what writes it."""
        nets = {"generator": self.average, "discriminator": self.discriminator}
        kept = {
            name: {key: keep(tensor) for key, tensor in net.state_dict().items()}
            for name, net in nets.items()
        }
        config = {"model_type": MODEL_TYPE, "architectures": ["DCGAN"], "shape": asdict(self.shape)}

        def write(folder: Path) -> None:
            for name, tensors in kept.items():
                lm_state.write(tensors, folder / f"{name}.safetensors")
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

        return write

    def conditions(self) -> dict[str, Any]:
        """What must be the same for a continued run to give the same bits."""
        return conditions.now(self.device, "bfloat16" if self.half else "float32")

    def tensors(self, keep: Keep = as_it_is) -> dict[str, Tensor]:
        """All state that is tensors, by name."""
        found = {}
        for net in ("generator", "discriminator", "average"):
            for name, tensor in getattr(self, net).state_dict().items():
                found[f"{net}/{name}"] = keep(tensor)
        for net, optimizer in self._optimizers.items():
            for index, slots in optimizer.state_dict()["state"].items():
                for slot, tensor in slots.items():
                    found[f"optimizer/{net}/{index}/{slot}"] = keep(tensor)
        found["random/cpu"] = torch.get_rng_state()
        return found

    def moments(self) -> list[Tensor]:
        """What the optimizers keep."""
        states = [s for o in self._optimizers.values() for s in o.state.values()]
        return [t for slots in states for t in slots.values()]

    def all_tensors(self) -> Iterator[Tensor]:
        """What the next update needs of the device."""
        for net in (self.generator, self.discriminator, self.average):
            yield from safepoints.tensors_of(net)
        for optimizer in self._optimizers.values():
            yield from pieces.tensors_of(optimizer)

    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Go back to what `tensors` gave after `updates` updates."""
        for net in ("generator", "discriminator", "average"):
            prefix = f"{net}/"
            state = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            getattr(self, net).load_state_dict(state)
        for net, optimizer in self._optimizers.items():
            state_dict = optimizer.state_dict()
            parameters = list(getattr(self, net).parameters())
            state_dict["state"] = _slots(tensors, f"optimizer/{net}/", parameters)
            optimizer.load_state_dict(state_dict)
        torch.set_rng_state(tensors["random/cpu"])
        self.updates = updates

    def _noise(self, count: int) -> Tensor:
        # Drawn on the CPU: one generator to keep, and the same noise on every device.
        return torch.randn(count, self.shape.latent).to(self.device)

    def _apply(self, net: str, loss: Tensor) -> None:
        optimizer = self._optimizers[net]
        optimizer.zero_grad(set_to_none=True)
        self._gate.boundary(f"{net} backward")
        loss.backward()  # type: ignore[no-untyped-call]
        pieces.step(optimizer, self._gate)

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average. Early on it is the plain mean of all generators so far."""
        share = 1 - min(AVERAGE, self.updates / (self.updates + 10))
        ours, theirs = self.average.state_dict(), self.generator.state_dict()
        for name, tensor in ours.items():
            if tensor.is_floating_point():
                tensor.lerp_(theirs[name], share)
            else:
                tensor.copy_(theirs[name])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def _copied(self, net: Generator) -> Generator:
        return copy.deepcopy(net)

    def _placed(self, net: nn.Module) -> Any:
        return net.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _adam(self, net: nn.Module, lr: float, beta1: float) -> torch.optim.Adam:
        return torch.optim.Adam(net.parameters(), lr, (beta1, 0.99), fused=True)


def _slots(
    tensors: dict[str, Tensor], prefix: str, parameters: list[nn.Parameter]
) -> dict[int, dict[str, Tensor]]:
    """What an optimizer keeps for each parameter, by the parameter's number.

    Laid out in memory as the parameter is (channels last): the fused optimizer walks through
    both side by side, and would pair the wrong numbers otherwise.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            index, _, slot = key[len(prefix) :].partition("/")
            parameter = parameters[int(index)]
            if tensor.shape == parameter.shape:
                tensor = torch.empty_like(parameter, requires_grad=False).copy_(tensor)
            found.setdefault(int(index), {})[slot] = tensor
    return found
