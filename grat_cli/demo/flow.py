"""Training of the demos' transformers by rectified flow (arXiv 2209.03003), with fp32 master weights.

A model learns the velocity `noise - latents` of the straight path `(1 - sigma) * latents + sigma * noise`.
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grat_cli.demo.precision import orthogonalising, training_dtype
from grat_cli.demo.shards import save_atomically


def draw_sigmas(count: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """Draw noise levels [count]: logit-normal, one in seven uniform, then shifted as the scheduler does.

    Logit-normal times and the shift are those of Stable Diffusion 3 (arXiv 2403.03206, sections 3.1 and 5.3.2).
    """
    uniform = torch.rand(count, generator=generator)
    logit_normal = torch.sigmoid(torch.randn(count, generator=generator))
    times = torch.where(torch.rand(count, generator=generator) < 1 / 7, uniform, logit_normal)
    return (shift * times / (1 + (shift - 1) * times)).clamp(1e-3, 1.0)


@dataclass(frozen=True)
class FlowSettings:
    """How a transformer is trained.

    Attributes:
        steps: step at which training ends, counted from the beginning of the run.
        batch: samples per step.
        learning_rate: peak rate of AdamW and of Muon, whose updates are scaled to AdamW's size.
        warm_up: steps over which the rate rises, from the beginning of the run.
        decay: last steps, over which the rate falls to a twentieth along a cosine.
        average: decay of the exponential moving average of the weights.
        empty_captions: share of samples without caption, for classifier-free guidance.
        seed: of samples and noise.
        save_every: steps between saves.
    """

    steps: int = 10_000
    batch: int = 16
    learning_rate: float = 1e-3
    warm_up: int = 150
    decay: int = 0
    average: float = 0.999
    empty_captions: float = 0.1
    seed: int = 1
    save_every: int = 200


def split_parameters(transformer: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Return the matrices inside the blocks, which Muon trains, and everything else, which AdamW trains."""
    matrices, others = [], []
    for name, parameter in transformer.named_parameters():
        inside = "transformer_blocks." in name
        (matrices if inside and parameter.ndim == 2 else others).append(parameter)
    return matrices, others


class FlowTrainer(ABC):
    """Trains a transformer; its state is one file, and resuming from it changes no bit.

    Attributes:
        worker: copy of the weights in `training_dtype`, which computes the loss.
    """

    def __init__(self, transformer: torch.nn.Module, folder: Path, settings: FlowSettings) -> None:
        self.settings = settings
        self.step = 0
        self._path = folder / "transformer.pt"
        self.master: Any = copy.deepcopy(transformer).float().train()
        self.average: Any = copy.deepcopy(self.master)
        self.worker: Any = copy.deepcopy(self.master).to(training_dtype())
        matrices, others = split_parameters(self.master)
        self._optimizers = [
            torch.optim.Muon(matrices, lr=settings.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        if self._path.exists():
            self._resume()
        self._synchronise()

    def _resume(self) -> None:
        state = torch.load(self._path)
        self.step = state["step"]
        self.master.load_state_dict(state["master"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def save(self) -> None:
        """Write the whole state of training."""
        state = {
            "step": self.step,
            "master": self.master.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        save_atomically(state, self._path)

    def _synchronise(self) -> None:
        with torch.no_grad():
            for worker, master in zip(self.worker.parameters(), self.master.parameters(), strict=True):
                worker.copy_(master)

    def learning_rate(self) -> float:
        """Return the rate of the coming step."""
        settings = self.settings
        rate = settings.learning_rate * min(1.0, (self.step + 1) / max(1, settings.warm_up))
        left = settings.steps - self.step
        if left < settings.decay:
            rate *= max(0.05, 0.5 * (1 - math.cos(math.pi * left / settings.decay)))
        return rate

    @abstractmethod
    def loss(self, generator: torch.Generator) -> torch.Tensor:
        """Return the loss of `worker` on the samples of the coming step; `generator` is the step's own."""

    def train_step(self) -> float:
        """Take one step and return its loss."""
        # A generator of its own for every step: nothing but the step has to be remembered to resume.
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_000_007 + self.step)
        loss = self.loss(generator)
        loss.backward()
        parameters = list(self.master.parameters())
        for parameter, worker in zip(parameters, self.worker.parameters(), strict=True):
            parameter.grad = None if worker.grad is None else worker.grad.float()
            worker.grad = None
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate()
            with orthogonalising():
                optimizer.step()
        self._synchronise()
        keep = min(self.settings.average, (1 + self.step) / (20 + self.step))
        with torch.no_grad():
            for average, parameter in zip(self.average.parameters(), parameters, strict=True):
                average.lerp_(parameter, 1 - keep)
        self.step += 1
        return loss.item()

    def train(self, minutes: float = math.inf, log: Callable[[str], None] = print) -> None:
        """Train up to the last step or for so many minutes, saving on the way."""
        begin, first, losses = time.monotonic(), self.step, []
        while self.step < self.settings.steps and time.monotonic() - begin < 60 * minutes:
            losses.append(self.train_step())
            if self.step % 50 == 0:
                seconds = time.monotonic() - begin
                mean = sum(losses) / len(losses)
                log(f"step {self.step} loss {mean:.4f} rate {self.learning_rate():.1e} "
                    f"{(self.step - first) / seconds:.2f} steps/s {seconds:.0f} s")  # fmt: skip
                losses.clear()
            if self.step % self.settings.save_every == 0:
                self.save()
        self.save()
