"""The memory that a text-to-image pipeline works in, from the shapes in its configuration files.

A lower bound: tensors that are certainly alive at the same moment in the source of diffusers 0.42, and nothing of what
kernels and allocators add. On a CPU (torch 2.13) the peak was 1.0 to 2.2 times what is counted here, and 3.6 times
with tiles (docs/engines/diffusion.md).

Glossary
    side        of a square, in pixels of the image or in cells of the latents, eight times fewer
    level       the layers that work at one side; each further level halves it
    matrix      attention scores, every cell against every other one: only sliced attention ever stores it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NORMALISED = 3
"""A residual block holds its input, the normalised one and the activated one (`ResnetBlock2D.forward`)."""

COMPILED = 2
"""The same where a compiler fuses normalisation and activation into one pass. A compiled graph also frees what its
callers would hold, so that nothing else is certain."""

GATED = 19
"""Widths alive in the gated feed-forward of a U-Net's transformer (`BasicTransformerBlock`, `GEGLU`): two residuals,
the normalised input, both halves of the projection (8), the gate (4) and its product (4)."""

GATED_COMPILED = 12
"""Projection (8) and product (4)."""

PLAIN = 10
"""Widths alive in the feed-forward of a diffusion transformer (`FeedForward`, `GELU`): residual, normalised input,
projection (4) and its activation (4)."""

PLAIN_COMPILED = 4
"""The activation takes the place of the projection."""

MATRICES = 2
"""Scores and their softmax (`Attention.get_attention_scores`)."""


@dataclass(frozen=True)
class Unet:
    """A U-Net: what its `config.json` says, level by level from the full side down."""

    channels: tuple[int, ...]
    layers: tuple[int, ...]
    """Residual blocks on the way down."""
    heads: tuple[int, ...]
    """Of attention; 0 where a level has none."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Unet | None:
        """None where the file does not say enough."""
        channels = _numbers(config.get("block_out_channels"))
        if not channels:
            return None
        count = len(channels)
        layers = _each(config.get("layers_per_block", 2), count)
        # The key of the heads' width holds their number, as in every published U-Net of this class.
        heads = _each(config.get("num_attention_heads") or config.get("attention_head_dim", 8), count)
        kinds = config.get("down_block_types")
        kinds = kinds if isinstance(kinds, Sequence) and len(kinds) == count else ["DownBlock2D"] * count
        if layers is None or heads is None:
            return None
        attends = ["Attn" in str(kind) for kind in kinds]
        return cls(channels, layers, tuple(n if on else 0 for n, on in zip(heads, attends, strict=True)))

    def numbers(self, cells: int, *, compiled: bool) -> float:
        """Numbers alive at the worst moment of one evaluation of one image, on its way up.

        Args:
            cells: side of the latents.
            compiled: normalisation and activation are fused.
        """
        skips, worst = 0.0, 0.0
        for level, width in enumerate(self.channels):
            area = (cells / 2.0**level) ** 2
            before, below = self.channels[max(level - 1, 0)], self.channels[min(level + 1, len(self.channels) - 1)]
            # What the way down left here and above; what comes from below is held by the caller.
            skips += (self.layers[level] * width + before) * area
            alive = (COMPILED if compiled else NORMALISED) * (width + below) * area
            if self.heads[level]:
                alive = max(alive, (GATED_COMPILED if compiled else GATED) * width * area)
            worst = max(worst, alive + (0.0 if compiled else skips + below * area))
        return worst

    def matrix(self, cells: int) -> float:
        """Numbers that sliced attention stores for half the heads of one image at a time (`set_attention_slice`)."""
        levels = [(n // 2) * (cells / 2.0**level) ** 4 for level, n in enumerate(self.heads)]
        return MATRICES * max(levels, default=0.0)


@dataclass(frozen=True)
class Transformer:
    """A diffusion transformer."""

    width: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Transformer | None:
        heads, each = config.get("num_attention_heads"), config.get("attention_head_dim")
        return cls(heads * each) if isinstance(heads, int) and isinstance(each, int) else None

    def numbers(self, cells: int, *, compiled: bool) -> float:
        """Numbers alive in one evaluation of one image; a token is two by two cells."""
        return (PLAIN_COMPILED if compiled else PLAIN) * self.width * (cells / 2) ** 2


@dataclass(frozen=True)
class Vae:
    """The decoder: channels by level, from the full side down."""

    channels: tuple[int, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Vae | None:
        channels = _numbers(config.get("block_out_channels"))
        return cls(channels) if channels else None

    @property
    def scale(self) -> int:
        """How many times fewer cells than pixels a side has."""
        return 1 << (len(self.channels) - 1)

    def numbers(self, side: int) -> float:
        """Numbers alive at the worst moment of decoding one image: each level begins with what comes from below it."""
        below = (*self.channels[1:], self.channels[-1])
        return max(NORMALISED * width * (side / 2.0**level) ** 2 for level, width in enumerate(below))


def _numbers(value: Any) -> tuple[int, ...]:
    if isinstance(value, Sequence) and value and all(isinstance(n, int) and n > 0 for n in value):
        return tuple(value)
    return ()


def _each(value: Any, count: int) -> tuple[int, ...] | None:
    """One number for each level, where the file gives one for all."""
    if isinstance(value, int):
        return (value,) * count
    found = _numbers(value)
    return found if len(found) == count else None


@dataclass(frozen=True)
class Shapes:
    """The networks of a pipeline whose working memory is counted; None where the files do not say enough."""

    unet: Unet | None = None
    transformer: Transformer | None = None
    vae: Vae | None = None

    def denoising(self, pixels: int, evaluated: int, *, sliced: bool = False, compiled: bool = False) -> float:
        """Numbers alive while a step is evaluated for so many images at a time; guidance evaluates each one twice."""
        cells = pixels // (self.vae.scale if self.vae else 8)
        if self.unet:
            alone = self.unet.numbers(cells, compiled=compiled) * evaluated
            return max(alone, self.unet.matrix(cells)) if sliced else alone
        return self.transformer.numbers(cells, compiled=compiled) * evaluated if self.transformer else 0.0

    def decoding(self, pixels: int, together: int, *, tile: int | None = None) -> float:
        """Numbers alive while latents become images.

        Args:
            pixels: side of an image.
            together: images decoded at a time.
            tile: side of a tile where it is done in tiles, which are all kept.
        """
        if self.vae is None:
            return 0.0
        done = 3.0 * pixels**2 if tile else 0.0
        return together * (self.vae.numbers(min(tile or pixels, pixels)) + done)
