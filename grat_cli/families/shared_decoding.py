"""Tiles of an autoencoder that ranks share: each decodes some of them, and all have all.

Tiles are put together by all ranks alike, so that each has the whole, as one rank alone makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from grat_cli.attention.context_parallel import peers

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    _Call = tuple[torch.Tensor, dict[str, Any]]
    """Latents and options."""


def decoded_over_ranks(
    count: int, decode: Callable[[int], torch.Tensor], like: torch.Tensor, ranks: ProcessGroup
) -> Iterator[torch.Tensor]:
    """What `decode` makes of each of so many tiles, in order.

    They are made in rounds of a tile a rank, so that no more than that have to be held at once.

    Args:
        count: of tiles.
        decode: makes the tile of a number; its sides are known to no other rank.
        like: has as many axes, the dtype and the device of what is made.
        ranks: that share them; all have to take all tiles.

    Raises:
        RankLost: if another rank has ended.
    """
    import torch
    from torch.distributed import all_gather, broadcast

    rank, size = ranks.rank(), ranks.size()
    for first in range(0, count, size):
        own = decode(first + rank).contiguous() if first + rank < count else None
        assert own is None or (own.dtype, own.dim()) == (like.dtype, like.dim())
        sides = torch.tensor([0] * like.dim() if own is None else own.shape, device=like.device)
        every = [torch.empty_like(sides) for _ in range(size)]
        with peers():
            all_gather(every, sides, group=ranks)
        for owner in range(min(size, count - first)):
            made = own if owner == rank and own is not None else like.new_empty(every[owner].tolist())
            with peers():
                broadcast(made, group=ranks, group_src=owner)
            yield made


@contextmanager
def tiles_over_ranks(autoencoder: Any, ranks: ProcessGroup | None) -> Iterator[None]:
    """While inside, ranks share the tiles of each tiled decoding; leaving restores the autoencoder exactly.

    What is decoded as a whole, because it is no larger than a tile or tiling is off, is decoded by every rank.

    Args:
        autoencoder: of diffusers, with tiles of its own; all ranks have to give it the same latents.
        ranks: None changes nothing.
    """
    if ranks is None:
        yield
        return
    stock = autoencoder.tiled_decode

    def tiled_decode(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        tiles = _calls_of_tiles(autoencoder, lambda: stock(latents, *args, **kwargs))
        like, frames = tiles[0][0][0], [len(calls) for calls in tiles]
        # Those at edges are smaller, and the ranks of a round wait for its largest: rounds of tiles that are alike.
        order = sorted(range(len(tiles)), key=lambda number: -tiles[number][0][0].numel())
        decoder = autoencoder.decoder.forward

        def decode(place: int) -> torch.Tensor:
            import torch

            calls, tiles[order[place]] = tiles[order[place]], []
            return torch.cat([decoder(window, **options) for window, options in calls], dim=2)

        decoded = dict(zip(order, decoded_over_ranks(len(tiles), decode, like, ranks), strict=True))

        def by_call() -> Iterator[torch.Tensor]:
            for number, calls in enumerate(frames):
                # Frames of a tile are joined: its first call has them all, and none are left for the others.
                tile = decoded.pop(number)
                yield tile
                yield from [tile[:, :, :0]] * (calls - 1)

        made = by_call()
        with _replaced(autoencoder.decoder, forward=lambda latents, **options: next(made)):
            return stock(latents, *args, **kwargs)

    with _replaced(autoencoder, tiled_decode=tiled_decode):
        yield


class _AllNoted(Exception):
    """All tiles are known."""


def _calls_of_tiles(autoencoder: Any, tiled_decode: Callable[[], Any]) -> list[list[_Call]]:
    """The calls of the decoder that make each tile: one, or where frames are decoded one by one that many.

    Args:
        autoencoder: decodes all tiles before it blends the first two.
        tiled_decode: calls it.
    """
    tiles: list[list[_Call]] = []

    def noted(latents: torch.Tensor, **options: Any) -> torch.Tensor:
        # What is remembered of earlier frames is of one tile.
        remembered = options.get("feat_cache")
        if remembered is None or not tiles or tiles[-1][0][1]["feat_cache"] is not remembered:
            tiles.append([])
        tiles[-1].append((latents, options))
        return latents

    def end(*args: Any) -> None:
        raise _AllNoted

    with (
        suppress(_AllNoted),
        _replaced(autoencoder.decoder, forward=noted),
        _replaced(autoencoder, blend_v=end, blend_h=end),
    ):
        tiled_decode()
    return tiles


@contextmanager
def _replaced(module: Any, **methods: Callable[..., Any]) -> Iterator[None]:
    """While inside, a module has other methods."""
    before = {name: vars(module)[name] for name in methods if name in vars(module)}
    try:
        for name, method in methods.items():
            setattr(module, name, method)
        yield
    finally:
        for name in methods:
            if name in before:
                setattr(module, name, before[name])
            else:
                delattr(module, name)
