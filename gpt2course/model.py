"""GPT: embeddings, blocks, head, loss. Knows nothing of files, devices or processes.

Legend: B batch, T new positions, S key positions, C model width, V vocabulary.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt2course.attention import CAUSAL, Attention, Mask
from gpt2course.config import GPTConfig
from gpt2course.kv_cache import KVCache
from gpt2course.loss import IGNORE, chunked_cross_entropy
from gpt2course.masks import Causal, visible
from gpt2course.rope import Rotation, angles

INIT_STD = 0.02


class GELU(nn.Module):
    """GPT-2's GELU, the tanh approximation (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2).

    A class of its own, since torch's default is the exact GELU, which looks the same and gives other logits.
    """

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x, approximate="tanh")


class MLP(nn.Module):
    """Each position for itself: widen to 4 C, GELU, back to C. (B, T, C) to (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x_BTC))))


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)). (B, T, C) to (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.mlp = MLP(config)

    def forward(
        self, x_BTC: Tensor, mask: Mask = CAUSAL, rotation: Rotation | None = None, cache: KVCache | None = None
    ) -> Tensor:
        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC), mask, rotation, cache)
        return x_BTC + self.mlp(self.ln_2(x_BTC))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019), with the changes that the config names. Parameters have the published names.

    With rotary positions there is no `wpe`. The head has no weight of its own: it is the token embedding,
    `lm_head.weight is wte.weight`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.pos == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    def tie_weights(self) -> None:
        """Make head and embedding one tensor again; `to_empty` and `assign=True` both untie them."""
        self.lm_head.weight = self.wte.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's start: normal 0.02, and the layers that write to the residual stream scaled by 1/sqrt(2 n_layer).

        Radford et al. 2019, section 2.3; there are two such writes a block. Harmless on the meta device. After
        `to_empty` it also makes the tie again, or the head would keep whatever was in memory.
        """
        self.tie_weights()
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding | nn.Linear) and name != "lm_head":
                writes_residual = name.endswith("c_proj")
                std = INIT_STD / math.sqrt(2 * self.config.n_layer) if writes_residual else INIT_STD
                nn.init.normal_(module.weight, mean=0.0, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, source: str | Path, device: torch.device | str = "cpu", **changes: Any) -> "GPT":
        """The model of a checkpoint; see `gpt2course.pretrained.load_checkpoint`, which this calls."""
        from gpt2course.pretrained import load_checkpoint  # the one look upwards, so that files stay out of this module

        return load_checkpoint(source, device=device, **changes)

    def num_params(self) -> int:
        """Number of trainable numbers; the shared embedding and head count once."""
        return sum(p.numel() for p in self.parameters())

    def hidden(self, idx_BT: Tensor, pos_BT: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Everything up to the head: (B, T) token ids to (B, T, C) final hidden states.

        Args:
            idx_BT: token ids, int64.
            pos_BT: absolute positions, -1 on left padding; by default 0, 1, 2 …, or on from where the cache ends.
            cache: keys and values of the past; extended in place.

        Raises:
            ValueError: if a position lies outside the learned table (rotary positions have no end); on a CPU also for
                a token id outside the vocabulary (a GPU, which would have to be waited for, stops with its own assert).
        """
        B, T = idx_BT.shape
        if cache is not None:
            cache.check_batch(B)
        past = 0 if cache is None else cache.length
        plain = pos_BT is None and (cache is None or cache.plain)
        if pos_BT is None:
            pos_BT = torch.arange(T, device=idx_BT.device).expand(B, T) if cache is None else cache.next_positions(T)
        elif pos_BT.shape != idx_BT.shape:
            raise ValueError(f"positions {tuple(pos_BT.shape)} and token ids {tuple(idx_BT.shape)} differ in shape")
        if self.config.pos == "learned" and T:
            self._check_positions(past + T if plain else int(pos_BT.max()) + 1)

        try:
            x_BTC = self.wte(idx_BT)
        except IndexError:
            raise ValueError(self._id_problem(idx_BT)) from None

        # Only now, when nothing can be refused any more: an error must leave the cache as it was.
        if cache is not None:
            cache.extend(pos_BT, plain)
        rotation = None
        if self.config.pos == "learned":
            x_BTC = x_BTC + self.wpe(pos_BT.clamp(min=0))
        else:
            # Without padding all rows have the same positions, so one row's angles do.
            rotation = angles(pos_BT[:1, None] if plain else pos_BT[:, None], self.config, x_BTC.dtype)
        masks: dict[int | None, Mask] = {}
        x_BTC = self.drop(x_BTC)
        for layer, block in enumerate(self.h):
            window = self.config.layer_window(layer)
            if window not in masks:
                k_pos_BS = pos_BT if cache is None else cache.key_positions(layer)
                masks[window] = self._mask(pos_BT, k_pos_BS, window, plain, past)
            x_BTC = block(x_BTC, masks[window], rotation, cache)
        out: Tensor = self.ln_f(x_BTC)
        return out

    def forward(
        self,
        idx_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        pos_BT: Tensor | None = None,
        cache: KVCache | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Logits, or, given targets, the loss.

        Args:
            idx_BT: (B, T) token ids, int64.
            targets_BT: (B, T) next tokens, -100 where there is none to predict.
            pos_BT, cache: as in `hidden`.
            reduction: "mean" over the valid tokens, or "sum", for losses that are averaged over many processes.

        Returns:
            logits (B, T, V), or a scalar loss in nats per token, float32 at least; the loss never holds all B x T x V
            logits. Where every target is -100 the mean is 0 with zero gradients, not 0/0: a batch without anything to
            predict must not turn the weights into NaN.

        Raises:
            ValueError: for another reduction, targets of another shape than idx, or a position outside the table.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}; it must be mean or sum")
        if targets_BT is not None and targets_BT.shape != idx_BT.shape:
            raise ValueError(f"targets {tuple(targets_BT.shape)} and token ids {tuple(idx_BT.shape)} differ in shape")
        h_BTC = self.hidden(idx_BT, pos_BT, cache)
        if targets_BT is None:
            logits: Tensor = self.lm_head(h_BTC)
            return logits
        targets_N = targets_BT.reshape(-1)
        total = chunked_cross_entropy(h_BTC.reshape(-1, h_BTC.shape[-1]), self.lm_head.weight, targets_N)
        return total / (targets_N != IGNORE).sum().clamp(min=1) if reduction == "mean" else total

    def _mask(self, pos_BT: Tensor, k_pos_BS: Tensor, window: int | None, plain: bool, past: int) -> Mask:
        """What the queries of this pass see in layers of one window."""
        if plain and past == 0:
            return Causal(window, self.config.sinks)
        if plain and pos_BT.shape[1] == 1:
            return None  # a single new position sees all that a cache keeps: the past, or the window
        return visible(pos_BT, k_pos_BS, window, self.config.sinks)[:, None]

    def _id_problem(self, idx_BT: Tensor) -> str:
        V = self.config.vocab_size
        outside = idx_BT[(idx_BT < 0) | (idx_BT >= V)]
        return (
            f"token id {outside[0].item()} is outside the vocabulary, whose ids go from 0 to {V - 1}; "
            "encode the text with this model's tokenizer"
        )

    def _check_positions(self, needed: int) -> None:
        if needed > self.config.block_size:
            raise ValueError(
                f"{needed} positions, but the learned table has block_size {self.config.block_size} rows and none for "
                "the others; shorten the input, let generation slide its context, or use pos='rope', which has no table"
            )
