"""A small vision transformer in timm's key names."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgecl.backbones.initialise import initialise


class _PatchEmbed(nn.Module):
    """Patches of the image as vectors, [N, patches, D]."""

    def __init__(self, patch: int, size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, size, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y.flatten(2).transpose(1, 2)


class _Attention(nn.Module):
    """Self-attention of several heads."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(size, 3 * size)
        self.proj = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, size = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, size // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, size)
        out: Tensor = self.proj(y)
        return out


class _Mlp(nn.Module):
    """Two linear layers with GELU."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, hidden)
        self.fc2 = nn.Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class _Block(nn.Module):
    """Attention and perceptron, each behind a layer norm and around a skip connection."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size, eps=1e-6)
        self.attn = _Attention(size, heads)
        self.norm2 = nn.LayerNorm(size, eps=1e-6)
        self.mlp = _Mlp(size, 4 * size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Vision transformer for small images; keys are timm's: ``cls_token``, ``pos_embed``, ``patch_embed.proj``, ``blocks.0.attn.qkv``, ...

    The width of ViT-Tiny (192 values, 3 heads) with 4 blocks and 4x4 patches: 1,803,850 parameters at 10 classes. Cut at
    ``blocks.1`` to train the last two blocks, or at ``norm`` for the tokens.

    Args:
        classes: Outputs of the classifier ``head``.
        image: Height and width, a multiple of ``patch``.
        patch: Height and width of a patch.
        size: Values of a token, a multiple of ``heads``.
        depth: Blocks.
        heads: Heads of each attention.
        generator: Source of the initial weights; by default one seeded with 0.

    Shapes:
        x: float32 [N, 3, image, image]; the result is float32 [N, classes].

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words, 2020, section 3.1; the width of Touvron et al., Training
    data-efficient image transformers, 2020, table 1.
    """

    def __init__(
        self,
        classes: int = 10,
        *,
        image: int = 32,
        patch: int = 4,
        size: int = 192,
        depth: int = 4,
        heads: int = 3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        generator = generator if generator is not None else torch.Generator().manual_seed(0)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, size))
        self.patch_embed = _PatchEmbed(patch, size)
        self.blocks = nn.Sequential(*(_Block(size, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(size, eps=1e-6)
        self.head = nn.Linear(size, classes)
        initialise(self, generator)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of ``x``."""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        scores: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return scores
