"""Models as people bring them: an `nn.Module` with torch's own loss, and data to match.

Each model has five blocks or so, three heads, and sizes that divide by nothing. Each data function
makes random samples, the same at each call, and returns `(train, test)`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from tests.brought_convolutions import CLASSES, AlexNet, ResNet

VOCABULARY, WIDTH, HEADS, BLOCKS = 101, 24, 3, 5


class SelfAttention(nn.Module):
    """Attention with separate projections, as BERT has it; a float mask is added to the scores."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, causal: bool = False
    ) -> torch.Tensor:
        batch, tokens, width = x.shape
        shape = (batch, tokens, self.heads, width // self.heads)
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class BertLayer(nn.Module):
    """A post-norm block that takes the mask by keyword and returns a tuple, as transformers' do."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor]:
        x = hidden_states
        x = self.norm1(x + self.dropout(self.attention(x, attention_mask)))
        return (self.norm2(x + self.dropout(self.down(F.gelu(self.up(x))))),)


class BertClassifier(nn.Module):
    """Token ids and a mask of 0 and 1, both int64 [B, T], to logits [B, classes]."""

    def __init__(self, dropout: float = 0.1, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.word = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.position = nn.Embedding(32, WIDTH)
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(dropout)
        self.layer = nn.ModuleList(BertLayer(WIDTH, HEADS, dropout) for _ in range(blocks))
        self.pooler, self.classifier = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.register_buffer("position_ids", torch.arange(32), persistent=False)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        x = self.word(input_ids) + self.position(self.position_ids[: input_ids.shape[1]])
        x = self.dropout(self.norm(x))
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.layer:
            x = layer(x, attention_mask=mask)[0]
        return self.classifier(self.dropout(torch.tanh(self.pooler(x[:, 0]))))


class PreNormBlock(nn.Module):
    """A pre-norm block, bidirectional (ViT) or causal (GPT)."""

    def __init__(self, width: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.dropout = SelfAttention(width, heads), nn.Dropout(dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x), causal=self.causal))
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    """The part of torchvision's ViT behind the patches: positions, blocks, a last norm."""

    def __init__(self, tokens: int, blocks: int, dropout: float) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, tokens, WIDTH).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        named = ((f"block_{i}", PreNormBlock(WIDTH, HEADS, dropout, False)) for i in range(blocks))
        self.layers = nn.Sequential(OrderedDict(named))
        self.ln = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ln(self.layers(self.dropout(x + self.pos_embedding)))


class VisionTransformer(nn.Module):
    """Images [B, 3, 15, 15] to logits [B, classes], laid out as torchvision's."""

    def __init__(self, dropout: float = 0.1, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, WIDTH, kernel_size=5, stride=5)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.encoder = Encoder(10, blocks, dropout)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(WIDTH, CLASSES)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.heads(self.encoder(x)[:, 0])


class NanoGPT(nn.Module):
    """Token ids [B, T] to logits [B, vocabulary, T], laid out as nanoGPT, with a tied head."""

    def __init__(self, dropout: float = 0.0, blocks: int = BLOCKS, tied: bool = True) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, WIDTH),
                "wpe": nn.Embedding(32, WIDTH),
                "drop": nn.Dropout(dropout),
                "h": nn.ModuleList(
                    PreNormBlock(WIDTH, HEADS, dropout, causal=True) for _ in range(blocks)
                ),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        parts: Any = self.transformer
        pos = torch.arange(idx.shape[1], device=idx.device)
        x = parts.drop(parts.wte(idx) + parts.wpe(pos))
        for block in parts.h:
            x = block(x)
        return self.lm_head(parts.ln_f(x)).transpose(1, 2)  # classes on axis 1, for torch's loss


def bert(dropout: float = 0.1, blocks: int = BLOCKS) -> tuple[nn.Module, nn.Module]:
    """A classifier of sentences, with a mask; its data are `masked_sentences`."""
    return BertClassifier(dropout, blocks), nn.CrossEntropyLoss()


def vit(dropout: float = 0.1, blocks: int = BLOCKS) -> tuple[nn.Module, nn.Module]:
    """A classifier of images; its data are `images`."""
    return VisionTransformer(dropout, blocks), nn.CrossEntropyLoss()


def nanogpt(
    dropout: float = 0.0, blocks: int = BLOCKS, tied: bool = True
) -> tuple[nn.Module, nn.Module]:
    """A language model; its data are `tokens`."""
    return NanoGPT(dropout, blocks, tied), nn.CrossEntropyLoss()


def alexnet(dropout: float = 0.5) -> tuple[nn.Module, nn.Module]:
    """A classifier of images; its data are `images` with `side = 35`."""
    return AlexNet(dropout), nn.CrossEntropyLoss()


def resnet() -> tuple[nn.Module, nn.Module]:
    """A classifier of images with batch norm; its data are `images`."""
    return ResNet(), nn.CrossEntropyLoss()


class MaskedSentences(Dataset[Any]):
    """Sentences of 3 to 11 token ids, padded to 11 with 0, each with its mask and its class."""

    def __init__(self, size: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, VOCABULARY, (size, 11), generator=draw)
        lengths = torch.randint(3, 12, (size, 1), generator=draw)
        self.mask = (torch.arange(11) < lengths).long()
        self.ids = self.ids * self.mask
        self.labels = self.ids.sum(1) % CLASSES

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return {"input_ids": self.ids[i], "attention_mask": self.mask[i]}, self.labels[i]


def masked_sentences(size: int = 90, test_size: int = 17) -> tuple[Dataset[Any], Dataset[Any]]:
    """Dicts of `input_ids` and `attention_mask`, int64 [11] each, with a class."""
    return MaskedSentences(size, 1), MaskedSentences(test_size, 2)


def images(
    size: int = 90, test_size: int = 17, side: int = 15
) -> tuple[TensorDataset, TensorDataset]:
    """Images float32 [3, side, side] with a class that depends on them."""

    def make(count: int, seed: int) -> TensorDataset:
        draw = torch.Generator().manual_seed(seed)
        pixels = torch.randn(count, 3, side, side, generator=draw)
        return TensorDataset(pixels, (pixels.sum((1, 2, 3)).abs().long()) % CLASSES)

    return make(size, 1), make(test_size, 2)


def tokens(
    size: int = 90, test_size: int = 17, length: int = 13
) -> tuple[TensorDataset, TensorDataset]:
    """Token ids int64 [length] with the next ones."""

    def make(count: int, seed: int) -> TensorDataset:
        draw = torch.Generator().manual_seed(seed)
        steps = torch.randint(1, 5, (count, length + 1), generator=draw)
        ids = steps.cumsum(1) % VOCABULARY
        return TensorDataset(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    return make(size, 1), make(test_size, 2)
