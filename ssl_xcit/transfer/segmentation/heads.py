"""Heads that turn a pyramid of maps (strides 4, 8, 16, 32) into class logits of stride 4.

Semantic FPN (Panoptic FPN, arXiv:1901.02446, section 3.1) and UperNet (arXiv:1807.10221) with the
settings that XCiT was published with (those of mmseg 0.11): BatchNorm, bilinear upsampling without
aligned corners, dropout of whole channels before the classifier.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

POOL_SCALES = (1, 2, 3, 6)
STRIDES = (4, 8, 16, 32)


def resized(
    image: Float[Tensor, "B C _ _"], size: Sequence[int], mode: str = "bilinear"
) -> Float[Tensor, "B C _ _"]:
    """An image at another (height, width)."""
    exporting = torch.compiler.is_exporting()  # one program for any size
    if not exporting and image.shape[-2:] == tuple(size):
        return image
    corners = False if mode == "bilinear" else None
    return interpolate(image, size=tuple(size), mode=mode, align_corners=corners)


def conv_norm_relu(channels_in: int, channels_out: int, kernel: int) -> nn.Sequential:
    """Convolution without a bias, BatchNorm, ReLU; the size stays."""
    conv = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


class Classifier(nn.Module):
    """Dropout of channels, then logits by a 1 x 1 convolution."""

    def __init__(self, channels: int, num_classes: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B K h w"]:
        """Logits of each position."""
        return self.conv(self.dropout(x))


class FPN(nn.Module):
    """Feature pyramid network (arXiv:1612.03144): 1 x 1 convolutions, each map plus the coarser
    one upsampled to the nearest, 3 x 3 convolutions; no norms.
    """

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(channels_in, channels, 1) for _ in STRIDES)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in STRIDES)
        for conv in (*self.lateral, *self.output):
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[Float[Tensor, "B _ _ _"]]) -> list[Float[Tensor, "B C _ _"]]:
        """Four maps of the same sizes."""
        merged = [conv(image) for conv, image in zip(self.lateral, maps, strict=True)]
        for i in (2, 1, 0):
            merged[i] = merged[i] + resized(merged[i + 1], merged[i].shape[-2:], "nearest")
        return [conv(image) for conv, image in zip(self.output, merged, strict=True)]


class SemanticFPN(nn.Module):
    """FPN, then each map by 3 x 3 convolutions and doublings to stride 4; their sum is classified.

    Args:
        channels_in: of the maps.
        num_classes: K.
        channels: of the head.
        dropout: share of channels that are dropped in training.
        neck_channels: of the FPN; None: those of the maps.
    """

    def __init__(
        self,
        channels_in: int,
        num_classes: int,
        channels: int = 128,
        dropout: float = 0,
        neck_channels: int | None = None,
    ):
        super().__init__()
        neck_channels = neck_channels or channels_in
        self.neck = FPN(channels_in, neck_channels)
        self.levels = nn.ModuleList()
        for level in range(len(STRIDES)):
            layers: list[nn.Module] = []
            for step in range(max(1, level)):  # as many as doublings, and one at stride 4
                layers.append(conv_norm_relu(channels if step else neck_channels, channels, 3))
                if level:
                    up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
                    layers.append(up)
            self.levels.append(nn.Sequential(*layers))
        self.classifier = Classifier(channels, num_classes, dropout)

    def forward(self, maps: Sequence[Float[Tensor, "B C _ _"]]) -> Float[Tensor, "B K h w"]:
        """Logits at the size of the first map."""
        first, *others = (
            level(image) for level, image in zip(self.levels, self.neck(maps), strict=True)
        )
        for other in others:
            first = first + resized(other, first.shape[-2:])
        return self.classifier(first)


class UperNet(nn.Module):
    """Pyramid pooling (arXiv:1612.01105) of the coarsest map, a top-down path, all maps together.

    Args:
        channels_in: of the maps.
        num_classes: K.
        channels: of the head.
        dropout: share of channels that are dropped in training.
    """

    def __init__(self, channels_in: int, num_classes: int, channels: int = 512, dropout: float = 0):
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), conv_norm_relu(channels_in, channels, 1))
            for scale in POOL_SCALES
        )
        pooled = channels_in + len(POOL_SCALES) * channels
        self.pooled = conv_norm_relu(pooled, channels, 3)
        finer = STRIDES[:-1]
        self.lateral = nn.ModuleList(conv_norm_relu(channels_in, channels, 1) for _ in finer)
        self.output = nn.ModuleList(conv_norm_relu(channels, channels, 3) for _ in finer)
        self.fuse = conv_norm_relu(len(STRIDES) * channels, channels, 3)
        self.classifier = Classifier(channels, num_classes, dropout)

    def forward(self, maps: Sequence[Float[Tensor, "B C _ _"]]) -> Float[Tensor, "B K h w"]:
        """Logits at the size of the first map."""
        *finer, coarsest = maps
        pools = [resized(pool(coarsest), coarsest.shape[-2:]) for pool in self.pools]
        merged = [lateral(image) for lateral, image in zip(self.lateral, finer, strict=True)]
        merged.append(self.pooled(torch.cat((coarsest, *pools), dim=1)))
        for i in (2, 1, 0):
            merged[i] = merged[i] + resized(merged[i + 1], merged[i].shape[-2:])
        outputs = [conv(image) for conv, image in zip(self.output, merged[:-1], strict=True)]
        size = merged[0].shape[-2:]
        together = torch.cat([resized(image, size) for image in (*outputs, merged[-1])], dim=1)
        return self.classifier(self.fuse(together))


class FCN(nn.Module):
    """One 3 x 3 convolution and a classifier, for an auxiliary loss on a single map."""

    def __init__(self, channels_in: int, num_classes: int, channels: int = 256, dropout: float = 0):
        super().__init__()
        self.conv = conv_norm_relu(channels_in, channels, 3)
        self.classifier = Classifier(channels, num_classes, dropout)

    def forward(self, image: Float[Tensor, "B C h w"]) -> Float[Tensor, "B K h w"]:
        """Logits at the size of the map."""
        return self.classifier(self.conv(image))
