"""Context parallelism: ranks that share a transformer call have some of the tokens each, and in attention of the heads.

DeepSpeed Ulysses (arXiv 2309.14509, section 3.1): before attention tokens are exchanged for heads, so that each rank
attends over the whole sequence, and afterwards heads for tokens. Everything else acts on each token alone. Text is on
all ranks, as it is short. Plans know of none of it: tokens are in group order before they are shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput, RankLost

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from grat_kernels import HeadPlan, Plan


def shares(tokens: int, ranks: int) -> tuple[int, ...]:
    """How many of so many tokens each rank has: as evenly as can be.

    Raises:
        BadInput: if there are fewer tokens than ranks.
    """
    if tokens < ranks:
        raise BadInput(f"{tokens} tokens cannot be shared by {ranks} ranks: take fewer")
    return tuple(tokens // ranks + (rank < tokens % ranks) for rank in range(ranks))


@dataclass(frozen=True)
class Shared:
    """The tokens of a call, shared by the ranks of a group.

    Attributes:
        group: of the ranks.
        rank: this one's place in the group.
        counts: tokens besides text that each rank has, in order of their positions.
        observed: surrounds each exchange, in which this rank sends so many bytes to others; see `layer.CallObserver`.
    """

    group: ProcessGroup
    rank: int
    counts: tuple[int, ...]
    observed: Callable[[int], AbstractContextManager[Any]] = nullcontext

    @classmethod
    def of(
        cls, group: ProcessGroup, tokens: int, observed: Callable[[int], AbstractContextManager[Any]] = nullcontext
    ) -> Shared:
        """Shares of so many tokens; raises BadInput as `shares`."""
        return cls(group, group.rank(), shares(tokens, group.size()), observed)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.counts)

    @property
    def own(self) -> slice:
        """This rank's tokens, among all besides text."""
        stop = list(accumulate(self.counts))[self.rank]
        return slice(stop - self.counts[self.rank], stop)

    def gathered(self, tokens: torch.Tensor, dim: int) -> torch.Tensor:
        """All tokens, on all ranks.

        Args:
            tokens: this rank's, along `dim`.
            dim: counted from 0.

        Raises:
            RankLost: if another rank has ended.
        """
        import torch
        from torch.distributed import all_gather

        own, most = tokens.movedim(dim, 0), max(self.counts)
        sent = own.new_zeros((most, *own.shape[1:]))  # ranks have to send equally many
        sent[: len(own)] = own
        received = [torch.empty_like(sent) for _ in self.counts]
        with self.observed(sent.nbytes * (self.size - 1)), peers():
            all_gather(received, sent, group=self.group)
        kept = [part[:count] for part, count in zip(received, self.counts, strict=True)]
        return torch.cat(kept).movedim(0, dim)

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: Plan | HeadPlan,
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Plan | HeadPlan, range], torch.Tensor],
    ) -> torch.Tensor:
        """Attention of all tokens, each rank computing its share of the heads.

        Args:
            query: of the text and this rank's tokens, `[B, N, H, D]`, placed as in the joint sequence.
            key: likewise.
            value: likewise.
            plan: of the joint sequence of all tokens.
            attend: computes it for some heads: query, key and value of all tokens, `[B, tokens, heads, D]`, the plan
                of these heads, and their numbers.

        Returns:
            `[B, N, H, D]` like each input.

        Raises:
            BadInput: if ranks cannot have equally many heads.
            RankLost: if another rank has ended.
        """
        import torch

        heads = self._heads(query.shape[2])
        text_first, own = plan.text_start == 0, self.counts[self.rank]
        text_len = query.shape[1] - own
        query, key, value = self._of_heads((query, key, value), heads, text_first)
        attended = attend(query, key, value, plan.of_heads(heads), heads).transpose(0, 1)  # [N, B, heads, D]
        if text_first:
            text, tokens = attended.split([text_len, sum(self.counts)])
        else:
            tokens, text = attended.split([sum(self.counts), text_len])

        # To each rank its tokens of this rank's heads, and the text: [tokens and text of rank 0, of rank 1, ...].
        sent = torch.cat([part for of_rank in tokens.split(list(self.counts)) for part in (of_rank, text)])
        received = self._exchanged(sent, [count + text_len for count in self.counts], [own + text_len] * self.size)
        tokens, text = (
            part.permute(2, 1, 0, 3, 4).flatten(2, 3)  # [B, N, H, D]
            for part in received.unflatten(0, (self.size, own + text_len)).split([own, text_len], dim=1)
        )
        return torch.cat([text, tokens] if text_first else [tokens, text], dim=1)

    def own_plan(self, plan: Plan | HeadPlan) -> Plan:
        """Full attention of the text and this rank's tokens, placed as in the joint sequence of all.

        Args:
            plan: of the joint sequence of all.
        """
        from grat_kernels import Full, Grid, Grouping, Segments, build_plan

        def build() -> Plan:
            shape = 1, self.counts[self.rank]
            segments = Segments.of_text(plan.text_len, first=plan.text_start == 0)
            return build_plan(Grouping(Grid(shape), shape), Full(), segments=segments)

        own: Plan = plan.cached(("own plan", self.counts, self.rank), build)
        return own

    def means(self, figures: Sequence[torch.Tensor], *, text_first: bool) -> torch.Tensor:
        """Means over all tokens, `[n]` in fp32, the same to the last bit on all ranks.

        Args:
            figures: each `[B, N, ...]`, of this rank's tokens, or of the text and them.
            text_first: whether text comes first, where it is there.

        Raises:
            RankLost: if another rank has ended.
        """
        import torch

        own, parts = self.counts[self.rank], []
        for figure in figures:
            text_len = figure.shape[1] - own
            count = figure[:, :1].numel() * (sum(self.counts) + text_len)
            if self.rank:  # all have the text, and the first counts it
                figure = figure[:, text_len:] if text_first else figure[:, :own]
            parts.append(figure.sum(dtype=torch.float32) / count)
        together = torch.stack(parts)
        with self.observed(together.nbytes * (self.size - 1)):
            return sum_over_ranks(together, self.group)

    def _heads(self, count: int) -> range:
        """This rank's heads of so many."""
        if count % self.size:
            fitting = [size for size in range(1, count + 1) if count % size == 0]
            raise BadInput(
                f"{count} heads cannot be shared by {self.size} ranks: take {', '.join(map(str, fitting[:-1]))} "
                f"or {fitting[-1]}"
                if len(fitting) > 1
                else f"one head cannot be shared by {self.size} ranks: take 1"
            )
        own = count // self.size
        return range(self.rank * own, (self.rank + 1) * own)

    def _of_heads(self, joints: Sequence[torch.Tensor], heads: range, text_first: bool) -> list[torch.Tensor]:
        """Of several `[B, N, H, D]` of the text and this rank's tokens, this rank's heads of all tokens."""
        import torch

        own = self.counts[self.rank]
        batch, length, _, head_dim = joints[0].shape
        places = slice(length - own, length) if text_first else slice(own)
        of_text = slice(length - own) if text_first else slice(own, length)
        # To each rank its heads of this rank's tokens.
        sent = joints[0].new_empty((self.size, own, len(joints), batch, len(heads), head_dim))
        for number, joint in enumerate(joints):
            sent[:, :, number] = joint[:, places].unflatten(2, (self.size, len(heads))).permute(2, 1, 0, 3, 4)
        received = self._exchanged(sent.flatten(0, 1), [own] * self.size, list(self.counts))
        of_heads = []
        for joint, tokens in zip(joints, received.permute(1, 2, 0, 3, 4), strict=True):
            text = joint[:, of_text, heads.start : heads.stop]
            of_heads.append(torch.cat([text, tokens] if text_first else [tokens, text], dim=1))
        return of_heads

    def _exchanged(self, sent: torch.Tensor, to_each: list[int], from_each: list[int]) -> torch.Tensor:
        """What all ranks send this one, along the first axis."""
        from torch.distributed import all_to_all_single

        received = sent.new_empty((sum(from_each), *sent.shape[1:]))
        to_others = len(sent) - to_each[self.rank]
        with self.observed(to_others * math.prod(sent.shape[1:]) * sent.element_size()), peers():
            all_to_all_single(received, sent, from_each, to_each, group=self.group)
        return received


@contextmanager
def peers() -> Iterator[None]:
    """Surrounds what ranks do together, and nothing else.

    Raises:
        RankLost: if another rank has ended, or does not answer in time.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # all that torch raises, whatever carries the messages
        raise RankLost("another rank of the run has ended: what it said last tells why") from error


def sum_over_ranks(figures: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """The sum over ranks, in their order, so that it is the same to the last bit on all of them.

    Args:
        figures: of any shape, the same on all ranks.
        group: of the ranks.

    Raises:
        RankLost: if another rank has ended.
    """
    import torch
    from torch.distributed import all_gather

    received = [torch.empty_like(figures) for _ in range(group.size())]
    with peers():
        all_gather(received, figures, group=group)
    return torch.stack(received).sum(dim=0)


def mean_over_ranks(figures: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """The mean of each figure over the ranks that have one, which is not NaN; the same on all ranks.

    Args:
        figures: `[n]`.
        group: of the ranks.

    Raises:
        RankLost: if another rank has ended.
    """
    import torch

    there = ~figures.isnan()
    sums = sum_over_ranks(torch.stack([figures.nan_to_num(0.0), there.to(figures.dtype)]), group)
    return sums[0] / sums[1]
