"""Shapes of a pipeline's parts, and what follows from them: weights, operations, bytes at the moments of a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self

    from grat_cli.families.autoencoders import AutoencoderShape
    from grat_kernels import Plan


@dataclass(frozen=True)
class TransformerCall:
    """A transformer call: bytes of hidden states, and what follows from the way it is run.

    Attributes:
        image: bytes of a hidden state of the image tokens, and of those of references behind them.
        text: likewise of the text tokens.
        chunk: likewise of the tokens that a block takes at once, but for attention.
        chunked: whether that is not all of them.
        rotated: bytes while queries or keys are rotated by torch, per byte of them: what is stacked, and in fp32 two
            products and their sum.
        fused: whether one kernel prepares attention.
        summaries: bytes of the far field's keys, and of its values.
        attending: bytes of attention besides its inputs, output included.
    """

    image: float
    text: float
    chunk: float
    chunked: bool
    rotated: float
    fused: bool
    summaries: float
    attending: float

    @property
    def joint(self) -> float:
        """Bytes of a hidden state of all tokens."""
        return self.image + self.text


@dataclass(frozen=True)
class TransformerShape(ABC):
    """A transformer, by the fields of its configuration.

    Attributes:
        heads: attention heads.
        head_dim: channels per head.
        in_channels: as its configuration has it; see `token_channels`.
        text_channels: of a text token as the text encoder makes it.
        joins_text: whether text tokens attend and are attended with the image tokens, in one joint sequence.
        rotates_text: whether text tokens are rotated with the image tokens, after they are joined.
    """

    heads: int
    head_dim: int
    in_channels: int
    text_channels: int

    joins_text: ClassVar[bool] = True
    rotates_text: ClassVar[bool]

    @property
    def width(self) -> int:
        """Channels of a hidden state."""
        return self.heads * self.head_dim

    @property
    @abstractmethod
    def blocks(self) -> Mapping[str, int]:
        """Numbers of blocks with attention over image tokens, by kind, in order: `double_blocks` and the like."""

    @property
    def layers(self) -> int:
        """Blocks with attention over image tokens."""
        return sum(self.blocks.values())

    @property
    @abstractmethod
    def token_channels(self) -> int:
        """Numbers that a token of latents holds."""

    @property
    def predicted_channels(self) -> int:
        """Numbers that a token of the prediction holds."""
        return self.token_channels

    def joint_text(self, text_tokens: int) -> int:
        """How many of so many text tokens are in the joint sequence."""
        return text_tokens if self.joins_text else 0

    # ---- Weights

    @property
    @abstractmethod
    def parameters(self) -> int:
        """All weights."""

    @property
    @abstractmethod
    def other_parameters(self) -> int:
        """Weights outside the blocks: of inputs, time, guidance, text and output."""

    @property
    def cast_parameters(self) -> int:
        """Weights that diffusers' layerwise casting turns to fewer bits: matrices, but for those whose names have to do
        with norms, and all outside of blocks, which is little."""
        return self.parameters - self.other_parameters

    @property
    @abstractmethod
    def largest_block(self) -> int:
        """Weights of the largest block."""

    @property
    @abstractmethod
    def largest_matrix(self) -> int:
        """Weights of the largest matrix of a block."""

    # ---- Operations

    @abstractmethod
    def linear_flop(self, image: int, text: int) -> float:
        """Floating-point operations of one transformer call besides attention over image tokens.

        Args:
            image: image tokens.
            text: text tokens, wherever they are attended.
        """

    @property
    def carried_matrices(self) -> Mapping[str, int]:
        """Of each kind of block, the matrices of width by width that a token does not meet where its attention module
        is carried over steps; 0 where that computes more, so that the attention alone is carried."""
        return dict.fromkeys(self.blocks, 4)  # of query, key, value and output

    # ---- Memory

    @abstractmethod
    def pipeline_bytes(self, plan: Plan, element: int) -> float:
        """What the pipeline holds all through a call besides latents, text and rotary frequencies."""

    @abstractmethod
    def moments(self, call: TransformerCall) -> dict[str, float]:
        """Bytes of the tensors of a block at the moments that may be a call's peak."""


@dataclass(frozen=True)
class JointShape(TransformerShape):
    """A transformer of double and single blocks.

    Attributes:
        double_blocks: blocks where text and image have weights of their own.
        single_blocks: blocks where they share them.
        pooled_channels: of the pooled text.
        guidance_embeds: whether guidance is an input.
        joins_in_single: whether single blocks project text and image apart, and join query, key and value.
    """

    double_blocks: int
    single_blocks: int
    pooled_channels: int
    guidance_embeds: bool

    joins_in_single: ClassVar[bool]

    @classmethod
    def of(cls, config: Mapping[str, Any], text_channels: str, **more: int) -> Self:
        """From a configuration of diffusers, in which the channels of a text token go by a name of the family's own."""
        return cls(
            heads=int(config["num_attention_heads"]),
            head_dim=int(config["attention_head_dim"]),
            double_blocks=int(config["num_layers"]),
            single_blocks=int(config["num_single_layers"]),
            in_channels=int(config["in_channels"]),
            text_channels=int(config[text_channels]),
            pooled_channels=int(config["pooled_projection_dim"]),
            guidance_embeds=bool(config["guidance_embeds"]),
            **more,
        )

    @property
    def blocks(self) -> Mapping[str, int]:
        """See `TransformerShape`, as for all below."""
        return {"double_blocks": self.double_blocks, "single_blocks": self.single_blocks}

    # ---- Weights

    @property
    def double_parameters(self) -> int:
        """Weights of a double block: for text and image each 12 matrices, modulation by 6 vectors, norms of heads."""
        return 2 * (18 * self.width**2 + 15 * self.width + 2 * self.head_dim)

    @property
    def single_parameters(self) -> int:
        """Weights of a single block: 12 matrices, modulation by 3 vectors, norms of heads."""
        return 15 * self.width**2 + 11 * self.width + 2 * self.head_dim

    @property
    def parameters(self) -> int:
        doubles, singles = self.double_blocks * self.double_parameters, self.single_blocks * self.single_parameters
        return doubles + singles + self.other_parameters

    @property
    def cast_parameters(self) -> int:
        # Modulation is a part of norms: `norm1.linear`, `norm1_context.linear` and `norm.linear`.
        modulation = self.double_blocks * 12 * self.width**2 + self.single_blocks * 3 * self.width**2
        return super().cast_parameters - modulation

    @property
    def embedder_parameters(self) -> int:
        """Weights of what takes timesteps, or guidance, as 256 sines and cosines."""
        return 256 * self.width + self.width + self.width**2 + self.width

    @property
    def other_parameters(self) -> int:
        width, token = self.width, self.token_channels
        pooled = self.pooled_channels * width + width + width**2 + width
        total = (1 + self.guidance_embeds) * self.embedder_parameters + pooled
        total += (token * width + width) + (2 * width**2 + 2 * width) + (width * token + token)
        return total + self.text_channels * width + width

    # ---- Operations

    @property
    def largest_block(self) -> int:
        double = self.double_parameters if self.double_blocks else 0
        return max(double, self.single_parameters if self.single_blocks else 0)

    @property
    def largest_matrix(self) -> int:
        """Of modulation, which makes six vectors of one; single blocks have none so large."""
        return 6 * self.width**2

    def linear_flop(self, image: int, text: int) -> float:
        """A block of either kind has 12 weights per pair of channels: query, key, value and output, and a feed-forward
        four times as wide. Each takes a multiplication and an addition per token."""
        return 24.0 * self.width**2 * self.layers * (image + text)

    @property
    def carried_matrices(self) -> Mapping[str, int]:
        """In single blocks what attention put out is projected together with the feed-forward's."""
        return {"double_blocks": 4, "single_blocks": 3}

    # ---- Memory

    @abstractmethod
    def feed_forward_bytes(self, call: TransformerCall) -> float:
        """At the feed-forward of a double block that takes all tokens at once."""

    @abstractmethod
    def projection_bytes(self, call: TransformerCall) -> float:
        """At the output of a single block that takes all tokens at once, besides what it held during attention."""

    def moments(self, call: TransformerCall) -> dict[str, float]:
        blocks = {"double": (self.double_blocks, self._double), "single": (self.single_blocks, self._single)}
        return {
            f"{moment} of a {name} block": size
            for name, (count, of_block) in blocks.items()
            if count
            for moment, size in of_block(call).items()
        }

    def _double(self, call: TransformerCall) -> dict[str, float]:
        held = 2 * call.joint  # hidden states and their norms
        moments = {name: held + size for name, size in self._attention(call, apart=True).items()}
        if not call.chunked:
            return moments | {"feed-forward": self.feed_forward_bytes(call)}
        # In chunks (`attention.chunking`): hidden states, what attention put out, the result; of a chunk the sum, its
        # norm, and twice the inner layer.
        return moments | {"feed-forward": 3 * call.joint + (1 + 1 + 8) * call.chunk}

    def _single(self, call: TransformerCall) -> dict[str, float]:
        # Hidden states, those of text and image joined, their norms, and the inner layer; in chunks that is made after
        # attention.
        held = (1 + 1 + 1 + (0 if call.chunked else 4)) * call.joint
        moments = {name: held + size for name, size in self._attention(call, self.joins_in_single).items()}
        if not call.chunked:
            return moments | {"projection": held + self.projection_bytes(call)}
        # In place of norms the result, and what attention put out; of a chunk the inner layer, it and attention's side
        # by side, and their projection.
        return moments | {"projection": held + call.joint + (4 + 5 + 1) * call.chunk}

    def _attention(self, call: TransformerCall, apart: bool) -> dict[str, float]:
        """Moments of attention, besides what the block holds.

        Args:
            call: the transformer call.
            apart: whether text and image are projected apart, so that joining copies query, key and value.
        """
        n, i = call.joint, call.image
        # Projections are let go of when attention begins; joint ones lend it their value.
        attention = {"attention": 3 * n + 2 * call.summaries * call.fused + call.attending}
        joined = 3 if apart else 2
        if call.fused:
            return attention | {"preparation": (3 + joined) * n + 2 * call.summaries}
        if not self.rotates_text:
            # The rotated query, the normalised key, and what its rotation takes; then both, and all three joined.
            return attention | {
                "rotation of keys": 3 * n + (2 + call.rotated) * i,
                "joining of video and text": 3 * n + 2 * i + 3 * n,
            }
        # Queries and keys before rotation, the rotated query, and what the key's rotation takes.
        return attention | {"rotation of keys": (3 + joined + 1 + call.rotated) * n}


@dataclass(frozen=True)
class TextEncoderShape:
    """A text encoder.

    Attributes:
        parameters: all weights.
        layers: blocks of attention and feed-forward.
        width: channels of a token.
        feed_forward: channels inside its feed-forward layers.
        heads: attention heads.
        tokens: length that prompts are padded to.
        vocabulary: tokens that it knows.
        of_pictures: whether it encodes pictures, which it does when denoising begins.
    """

    parameters: int
    layers: int
    width: int
    feed_forward: int
    heads: int
    tokens: int
    vocabulary: int = 32_128  # of T5
    of_pictures: bool = False


# openai/clip-vit-large-patch14, as several families have it; the number of weights is that of CLIPTextModel.
CLIP_L = TextEncoderShape(123_060_480, 12, 768, 3072, 12, 77)


@dataclass(frozen=True)
class Components:
    """The parts of a pipeline that hold weights.

    Attributes:
        text_encoders: with what encodes pictures beside text.
        transformer: each of those that take turns.
        autoencoder: for pixels.
        transformers: how many take turns.
        transformer_bytes: of each, where its weights stay as a file has them; None where the run decides.
        added: numbers in LoRAs beside the weights of all of these.
    """

    text_encoders: tuple[TextEncoderShape, ...]
    transformer: TransformerShape
    autoencoder: AutoencoderShape
    transformers: int = 1
    transformer_bytes: int | None = None
    added: int = 0

    @property
    def text_parameters(self) -> int:
        """Weights of all text encoders."""
        return sum(encoder.parameters for encoder in self.text_encoders)

    @property
    def parameters(self) -> int:
        """All weights."""
        denoising = self.transformers * self.transformer.parameters + self.added
        return self.text_parameters + denoising + self.autoencoder.parameters
