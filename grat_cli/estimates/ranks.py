"""What ranks that share an output send each other, by arithmetic alone: what `attention.context_parallel` does."""

from __future__ import annotations

from dataclasses import dataclass

from grat_cli.attention.context_parallel import shares
from grat_cli.attention.schedule import AttentionSchedule
from grat_cli.estimates.planning import Forecast
from grat_cli.families.shapes import TransformerShape
from grat_cli.models.parallel import Parallel


@dataclass(frozen=True)
class Exchange:
    """What ranks that share a transformer call send each other.

    Attributes:
        counts: tokens that each rank has besides text, those of references included.
        text: text tokens in the joint sequence, which all ranks have.
        row: bytes of a token's query, of all heads.
        predicted: bytes of a token's prediction.
    """

    counts: tuple[int, ...]
    text: int
    row: int
    predicted: int

    @classmethod
    def of(
        cls, shape: TransformerShape, tokens: int, text: int, ranks: int, element: int, samples: int = 1
    ) -> Exchange:
        """Of a call.

        Args:
            shape: of the transformer.
            tokens: besides text.
            text: tokens of it in the joint sequence.
            ranks: that share the call.
            element: bytes of a number.
            samples: of the call.

        Raises:
            BadInput: if there are fewer tokens than ranks.
        """
        of_number = element * samples
        return cls(shares(tokens, ranks), text, shape.width * of_number, shape.predicted_channels * of_number)

    def of_call(self, attentions: int) -> tuple[int, ...]:
        """Bytes that each rank sends to others in a call with so many attentions."""
        return tuple(attentions * self._of_attention(own) + self._of_prediction for own in self.counts)

    @property
    def of_guidance(self) -> int:
        """Bytes that each rank sends where it makes one of the two calls of a step: the whole prediction, to that which
        makes the other."""
        return sum(self.counts) * self.predicted

    def _of_attention(self, own: int) -> int:
        """Bytes that a rank with so many tokens sends in an attention."""
        others = len(self.counts) - 1
        row_of_rank = self.row // len(self.counts)  # of the heads that a rank has
        # Query, key and value of its own tokens, to each rank of that one's heads; then what its own heads put out for
        # the tokens of others, and to each of them for the text.
        return row_of_rank * (3 * own * others + sum(self.counts) - own + self.text * others)

    @property
    def _of_prediction(self) -> int:
        """Bytes that each rank sends while all come to have the prediction of all tokens: equally many."""
        return max(self.counts) * self.predicted * (len(self.counts) - 1)


def exchange_of(forecast: Forecast, parallel: Parallel) -> Exchange:
    """What the ranks of each of a run's calls send each other.

    Raises:
        BadInput: if there are fewer tokens than ranks.
    """
    shape, tokens = forecast.architecture.transformer, forecast.tokens_besides_text
    return Exchange.of(shape, tokens, forecast.main_plan.text_len, parallel.cp, forecast.element)


def bytes_of_step(forecast: Forecast, parallel: Parallel, step: int) -> tuple[int, ...]:
    """Bytes that each of the ranks that share a call sends to others in a step; the other half sends as much.

    What a step cache saves is not known beforehand, and counted as if it were computed.
    """
    exchange = exchange_of(forecast, parallel)
    schedule = forecast.schedule
    attentions = sum(len(schedule.computed(step, layer)) for layer in range(schedule.layers))
    guidance = exchange.of_guidance if parallel.cfg == 2 else 0
    calls = forecast.calls_per_step // parallel.cfg
    return tuple(calls * sent + guidance for sent in exchange.of_call(attentions))


def density_on_ranks(schedule: AttentionSchedule, step: int, ranks: int) -> float:
    """Attended pairs over all pairs of a rank's heads, mean over the layers of a step: in each layer of the rank that
    has most to do, for which the others wait.

    Args:
        schedule: of the run.
        step: which.
        ranks: that share its heads.
    """
    own = schedule.heads // ranks
    heads = [range(rank * own, (rank + 1) * own) for rank in range(ranks)]
    plans = [plan for layer in range(schedule.layers) for plan in schedule.computed(step, layer)]
    return sum(max(one.density for one in set(map(plan.of_heads, heads))) for plan in plans) / schedule.layers
