"""Records, while a model runs with full attention, how much its outputs change from step to step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from grat_cli.attention.layer import AttentionInputs, CallObserver
from grat_cli.errors import BadInput
from grat_kernels.sequence import JointSequence


@dataclass(frozen=True)
class OutputGram:
    """What a run shows.

    Attributes:
        gram: `<O_s, O_t>` of attention outputs at two steps, mean over rows, calls of a step and samples,
            `[L, H, S, S]`.
        calls: of the transformer at a step, each sample of a batch for one.
    """

    gram: np.ndarray
    calls: int


class OutputGramRecorder(CallObserver):
    """Computes some rows of every attention of a run with full attention; a `layer.CallObserver`.

    The rows are the same ones at every step: drawn once for each layer, call of a step and sample, image rows and text
    rows in proportion. They are kept until the run is over: steps x layers x rows x width numbers for each call.

    Args:
        steps: denoising steps of a run.
        layers: attention layers of the transformer.
        rows: drawn of each attention.
        seed: of the draw.
    """

    def __init__(self, steps: int, layers: int, *, rows: int = 64, seed: int = 0) -> None:
        self._steps, self._layers, self._rows, self._seed = steps, layers, rows, seed
        self._step, self._call = -1, 0
        # By call of a step with sample, and layer: `[rows, H, D]` of each step.
        self._outputs: dict[tuple[tuple[int, int], int], dict[int, torch.Tensor]] = {}

    def begin_call(self, step: int, density: float) -> None:
        """A transformer call begins."""
        self._call = self._call + 1 if step == self._step else 0
        self._step = step

    def end_call(self) -> None:
        """It ends."""

    @contextmanager
    def attention(self, inputs: AttentionInputs | None = None) -> Iterator[None]:
        """Looks at one attention; this waits for the device."""
        if inputs is not None:
            with torch.no_grad():
                for sample in range(inputs.query.shape[0]):
                    self._keep(inputs, sample)
        yield

    def record(self) -> OutputGram:
        """What has been seen.

        Raises:
            BadInput: if not all steps have been.
        """
        calls = {call for call, _ in self._outputs}
        if not calls:
            raise BadInput("no attention was recorded: the pipeline has not been called")
        if len(self._outputs) < len(calls) * self._layers or any(
            len(steps) < self._steps for steps in self._outputs.values()
        ):
            raise BadInput("attention was not recorded at every step: the pipeline has not run to its end")
        grams = [
            torch.stack(
                [
                    torch.einsum("srhd,trhd->hst", outputs, outputs)
                    for call in sorted(calls)
                    for outputs in [self._of_steps(call, layer)]
                ]
            ).mean(0)
            for layer in range(self._layers)
        ]
        return OutputGram(torch.stack(grams).numpy(), len(calls))

    def _of_steps(self, call: tuple[int, int], layer: int) -> torch.Tensor:
        """Outputs of all steps, `[S, rows, H, D]` fp64."""
        of_steps = self._outputs[call, layer]
        return torch.stack([of_steps[step] for step in range(self._steps)]).double()

    def _keep(self, inputs: AttentionInputs, sample: int) -> None:
        plan = inputs.plan
        tokens = inputs.key.shape[1]
        valid = plan.text_len if inputs.text_valid is None else int(inputs.text_valid[sample])
        image, text = self._positions(plan, valid, inputs.layer, sample)
        query, key, value = (tensor[sample].transpose(0, 1) for tensor in (inputs.query, inputs.key, inputs.value))
        attended = None
        if valid < plan.text_len:
            attended = torch.ones(1, tokens, dtype=torch.bool, device=query.device)
            attended[:, plan.text_start + valid : plan.text_start + plan.text_len] = False
        rows = torch.from_numpy(np.concatenate([image, text])).to(query.device)
        made = torch.nn.functional.scaled_dot_product_attention(
            query[None, :, rows].float(), key[None].float(), value[None].float(), attended, scale=inputs.scale
        )[0].transpose(0, 1)
        # A mean over all rows: the roots of weights that add up to 1 are in the outputs.
        text_share = valid / (plan.image_tokens + valid)
        weights = [(1 - text_share) / len(image)] * len(image) + [text_share / max(len(text), 1)] * len(text)
        made = made * torch.tensor(weights, device=made.device).sqrt()[:, None, None]
        place = (self._call, sample), inputs.layer
        self._outputs.setdefault(place, {})[self._step] = made.cpu()

    def _positions(self, plan: JointSequence, valid: int, layer: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions of image and text rows in the joint sequence, the same ones at every step."""
        draw = np.random.default_rng((self._seed, layer, self._call, sample))
        wanted = round(self._rows * valid / (plan.image_tokens + valid))
        text = min(valid, max(1, wanted))
        image = draw.permutation(plan.image_tokens)[: max(1, self._rows - text)]
        return np.sort(image) + plan.image_start, np.sort(draw.permutation(valid)[:text]) + plan.text_start
