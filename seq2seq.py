"""An encoder-decoder Transformer for translation, with a key/value cache for decoding.

Copy this file and `positional.py` into a project: they need torch and nothing else.

    model = TransformerSeq2SeqModel(vocab_size=8000, d_model=256, nhead=4)
    logits = model(input_ids, shift_right(labels))            # teacher forcing
    loss_sum, tokens = sequence_loss(logits, labels)          # pads do not count
    output_ids = greedy_decode(model, input_ids)              # stops at eos

Data flows down the page: configuration, attention, layers, model, loss, decoding.

Conventions
  Shapes: B batch, S source length, T target length, D model width, H heads, Dh = D / H, V vocabulary.
  Token ids are int64 and padded on the right. A sentence ends in `eos_id`; the decoder starts from
  `pad_id`, as in T5 and Marian.
  A mask is boolean and True means "may attend", as in `scaled_dot_product_attention`.
"""

import inspect
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from positional import POSITIONAL_KINDS

VOCAB_MULTIPLE = (
    64  # embedding rows are rounded up to this: matrix units like it, nothing sees it
)


@dataclass(frozen=True)
class Seq2SeqConfig:
    """Everything that decides the shape of the model. Defaults: the tutorial's, the paper's "base".

    Raises ValueError for sizes that do not fit together.
    """

    vocab_size: int  # `len(tokenizer)`, which is not always `tokenizer.vocab_size`
    d_model: int = 512
    nhead: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    max_length: int = 50  # positions prepared for; only "learned" ends there
    dim_feedforward: int = 2048
    dropout: float = 0.1
    positional: str = "sinusoidal"  # a key of positional.POSITIONAL_KINDS
    norm_first: bool = True  # pre-LN with final norms; False: post-LN, as in the paper
    tie_embeddings: bool = (
        True  # one matrix for source, target and output (Press & Wolf 2017)
    )
    pad_id: int = 0  # padding, and what the decoder starts from
    eos_id: int = 1

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "d_model",
            "nhead",
            "num_encoder_layers",
            "num_decoder_layers",
        )
        for name in (*sizes, "max_length", "dim_feedforward"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}"
                )
        if self.d_model % self.nhead:
            raise ValueError(
                f"nhead={self.nhead} does not divide d_model={self.d_model}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.positional not in POSITIONAL_KINDS:
            known = ", ".join(POSITIONAL_KINDS)
            raise ValueError(
                f"positional must be one of {known}; got {self.positional!r}"
            )
        for name in ("pad_id", "eos_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not below {self.vocab_size=}"
                )
        if self.pad_id == self.eos_id:
            raise ValueError(
                f"pad_id and eos_id are both {self.pad_id}: no sentence could end"
            )


# ---- attention --------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2).

    One matrix projects to queries, keys and values, in the layout of `nn.MultiheadAttention`:
    `in_proj.weight` is its `in_proj_weight`, `out_proj` its `out_proj`. Attention weights get no
    dropout: the paper (section 5.4) has none, and without it the fused kernels apply.
    """

    def __init__(self, d_model: int, nhead: int):
        super().__init__()
        self.nhead = nhead
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def project(self, x: Tensor, first: int, count: int) -> list[Tensor]:
        """`count` projections of x [B, T, D] from the `first` on (0 query, 1 key, 2 value).

        Returns: `count` tensors [B, H, T, Dh].
        """
        width = x.size(-1)
        rows = slice(first * width, (first + count) * width)
        projected = F.linear(x, self.in_proj.weight[rows], self.in_proj.bias[rows])
        return [
            part.unflatten(-1, (self.nhead, -1)).transpose(
                1, 2
            )  # [B, T, D] -> [B, H, T, Dh]
            for part in projected.chunk(
                count, dim=-1
            )  # [B, T, count * D] -> count x [B, T, D]
        ]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """query [B, H, T, Dh], key and value [B, H, S, Dh], mask broadcastable to [B, H, T, S].

        Returns: [B, T, D].
        """
        mixed = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=is_causal
        )
        return self.out_proj(
            mixed.transpose(1, 2).flatten(2)
        )  # [B, H, T, Dh] -> [B, T, D]


# ---- layers -----------------------------------------------------------------------------------


class LayerCache:
    """Keys and values that one decoder layer keeps between steps.

    Self-attention's are written in place into `keys` and `values` [B, H, capacity, Dh]; those of
    the source, `memory_keys` and `memory_values` [B, H, S, Dh], are computed once.
    """

    def __init__(self, memory_keys: Tensor, memory_values: Tensor, capacity: int):
        batch, heads, _, head_dim = memory_keys.shape
        self.memory_keys, self.memory_values = memory_keys, memory_values
        self.keys = memory_keys.new_empty(batch, heads, capacity, head_dim)
        self.values = memory_values.new_empty(batch, heads, capacity, head_dim)

    def append(self, key: Tensor, value: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """Store key and value [B, H, T, Dh] at `offset`; return all so far, [B, H, offset + T, Dh]."""
        end = offset + key.size(2)
        self.keys[:, :, offset:end] = key
        self.values[:, :, offset:end] = value
        return self.keys[:, :, :end], self.values[:, :, :end]


class _Layer(nn.Module):
    """What encoder and decoder layers share: residual branches and the feed-forward block."""

    def __init__(self, config: "Seq2SeqConfig"):
        super().__init__()
        self.norm_first = config.norm_first
        self.dropout = nn.Dropout(config.dropout)
        self.self_attention = Attention(config.d_model, config.nhead)
        self.self_attention_norm = nn.LayerNorm(config.d_model)
        self.linear1 = nn.Linear(config.d_model, config.dim_feedforward)
        self.linear2 = nn.Linear(config.dim_feedforward, config.d_model)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)

    def residual(self, x: Tensor, norm: nn.LayerNorm, branch) -> Tensor:
        """x + branch(x), normalised before the branch (pre-LN) or after the sum (post-LN)."""
        if self.norm_first:
            return x + self.dropout(branch(norm(x)))
        return norm(x + self.dropout(branch(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(
            F.relu(self.linear1(x))
        )  # [B, T, D] -> [B, T, F] -> [B, T, D]


class EncoderLayer(_Layer):
    """Self-attention and feed-forward (Vaswani et al. 2017, section 3.1)."""

    def forward(
        self, x: Tensor, source_mask: Tensor | None, positions: nn.Module
    ) -> Tensor:
        """x [B, S, D], source_mask [B, 1, 1, S] or None, `positions` of the model -> [B, S, D]."""

        def attend(h: Tensor) -> Tensor:
            query, key, value = self.self_attention.project(h, 0, 3)
            query, key = positions.rotate(query), positions.rotate(key)
            return self.self_attention(query, key, value, source_mask)

        x = self.residual(x, self.self_attention_norm, attend)
        return self.residual(x, self.feed_forward_norm, self.feed_forward)


class DecoderLayer(_Layer):
    """Causal self-attention, attention to the source, feed-forward."""

    def __init__(self, config: "Seq2SeqConfig"):
        super().__init__(config)
        self.cross_attention = Attention(config.d_model, config.nhead)
        self.cross_attention_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        x: Tensor,
        memory_keys: Tensor,
        memory_values: Tensor,
        source_mask: Tensor | None,
        causal_mask: Tensor | None,
        positions: nn.Module,
        cache: "LayerCache | None" = None,
        offset: int = 0,
    ) -> Tensor:
        """x [B, T, D] at positions `offset` on; memory_* [B, H, S, Dh] -> [B, T, D].

        Without a mask, several tokens at once (T > 1) attend causally and start at position 0.
        """

        def attend(h: Tensor) -> Tensor:
            query, key, value = self.self_attention.project(h, 0, 3)
            query, key = positions.rotate(query, offset), positions.rotate(key, offset)
            if cache is not None:
                key, value = cache.append(key, value, offset)
            is_causal = causal_mask is None and query.size(2) > 1
            return self.self_attention(query, key, value, causal_mask, is_causal)

        def attend_to_source(h: Tensor) -> Tensor:
            (query,) = self.cross_attention.project(h, 0, 1)
            return self.cross_attention(query, memory_keys, memory_values, source_mask)

        x = self.residual(x, self.self_attention_norm, attend)
        x = self.residual(x, self.cross_attention_norm, attend_to_source)
        return self.residual(x, self.feed_forward_norm, self.feed_forward)


# ---- model ------------------------------------------------------------------------------------


class TransformerSeq2SeqModel(nn.Module):
    """Encoder-decoder Transformer (Vaswani et al. 2017); takes the fields of `Seq2SeqConfig`.

        TransformerSeq2SeqModel(32100, d_model=512, nhead=8)
        TransformerSeq2SeqModel(**dataclasses.asdict(config))

    Pre-LN by default, the layout transformers calls Pegasus; post-LN (`norm_first=False`) is what
    it calls Marian.
    """

    # What help() and editors show. The defaults themselves are written once, in the configuration.
    __signature__ = inspect.signature(Seq2SeqConfig)

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.config = config = Seq2SeqConfig(*args, **kwargs)
        rows = math.ceil(config.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.embedding = nn.Embedding(rows, config.d_model)
        self.positions = POSITIONAL_KINDS[config.positional](
            config.max_length, config.d_model, config.d_model // config.nhead
        )
        self.dropout = nn.Dropout(config.dropout)
        self.encoder_layers = nn.ModuleList(
            EncoderLayer(config) for _ in range(config.num_encoder_layers)
        )
        self.decoder_layers = nn.ModuleList(
            DecoderLayer(config) for _ in range(config.num_decoder_layers)
        )
        # Post-LN layers end normalised; the sum that leaves a pre-LN stack does not.
        final_norm = nn.LayerNorm if config.norm_first else nn.Identity
        self.encoder_norm = final_norm(config.d_model)
        self.decoder_norm = final_norm(config.d_model)
        self.output = nn.Linear(config.d_model, rows, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot-uniform matrices, zero biases, embeddings with deviation 1 / sqrt(D)."""
        for name, parameter in self.named_parameters():
            if name.startswith(("embedding.", "positions.", "output.")):
                nn.init.normal_(parameter, std=self.config.d_model**-0.5)
            elif parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def embed(self, ids: Tensor, offset: int = 0) -> Tensor:
        """ids [B, T] at positions `offset` on -> [B, T, D] (section 3.4: scaled by sqrt(D))."""
        scaled = self.embedding(ids) * math.sqrt(self.config.d_model)
        return self.dropout(self.positions.embed(scaled, offset))

    def encode(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids [B, S] -> (memory [B, S, D], source_mask [B, 1, 1, S] bool, True = a token).

        A row of nothing but pads may attend to its first pad, so that no softmax is ever empty.
        """
        # Comparisons and no assignment: this must also export to ONNX for Modlee.
        first = torch.arange(input_ids.size(1), device=input_ids.device) < 1  # [S]
        source_mask = (input_ids.ne(self.config.pad_id) | first)[
            :, None, None, :
        ]  # [B, 1, 1, S]
        x = self.embed(input_ids)
        for layer in self.encoder_layers:
            x = layer(x, source_mask, self.positions)
        return self.encoder_norm(x), source_mask

    def decode(
        self, decoder_input_ids: Tensor, memory: Tensor, source_mask: Tensor
    ) -> Tensor:
        """All positions at once, for training: [B, T] -> [B, T, D]. Causal; pads need no mask,
        because they stand on the right of everything that counts."""
        x = self.embed(decoder_input_ids)
        causal_mask = None
        if torch.onnx.is_in_onnx_export():
            # `is_causal` would export as Trilu, which Modlee's converter cannot read.
            steps = torch.arange(x.size(1), device=x.device)
            causal_mask = ~(steps[None, :] > steps[:, None])  # [T, T]
        for layer in self.decoder_layers:
            keys, values = layer.cross_attention.project(memory, 1, 2)
            x = layer(x, keys, values, source_mask, causal_mask, self.positions)
        return self.decoder_norm(x)

    def start_cache(self, memory: Tensor, capacity: int) -> list[LayerCache]:
        """One `LayerCache` per decoder layer, for `capacity` target tokens over memory [B, S, D]."""
        return [
            LayerCache(*layer.cross_attention.project(memory, 1, 2), capacity)
            for layer in self.decoder_layers
        ]

    def decode_step(
        self, ids: Tensor, source_mask: Tensor, cache: list[LayerCache], offset: int
    ) -> Tensor:
        """One token per row, ids [B] at position `offset` -> logits [B, V]; `cache` grows by it."""
        x = self.embed(ids[:, None], offset)  # [B, 1, D]
        for layer, kept in zip(self.decoder_layers, cache):
            x = layer(
                x,
                kept.memory_keys,
                kept.memory_values,
                source_mask,
                None,
                self.positions,
                kept,
                offset,
            )
        return self.project(self.decoder_norm(x))[:, 0]

    def project(self, hidden: Tensor) -> Tensor:
        """hidden [B, T, D] -> logits [B, T, V]. The rows that only fill up the matrix stay out."""
        return F.linear(hidden, self.output.weight[: self.config.vocab_size])

    def forward(self, input_ids, decoder_input_ids=None):
        """Logits of the next token at every target position.

        Args:
            input_ids: [B, S] int64, padded on the right; or the list [input_ids,
                decoder_input_ids], which is how Modlee calls a model.
            decoder_input_ids: [B, T] int64, the target shifted right (`shift_right`). None: the
                start token alone, T = 1.

        Returns: [B, T, V], V = vocab_size, float (the autocast dtype where one is active).
        """
        if isinstance(input_ids, (list, tuple)):
            input_ids, decoder_input_ids = input_ids
        if decoder_input_ids is None:
            decoder_input_ids = torch.full_like(input_ids[:, :1], self.config.pad_id)
        memory, source_mask = self.encode(input_ids)
        return self.project(self.decode(decoder_input_ids, memory, source_mask))


# ---- loss -------------------------------------------------------------------------------------


def shift_right(labels: Tensor, pad_id: int = 0) -> Tensor:
    """What the decoder reads while it learns to write `labels`: the start token, then all but the last.

    labels [B, T] int64, ending in eos, padded right -> [B, T] int64. [a b eos] -> [pad a b].
    """
    start = torch.full_like(labels[:, :1], pad_id)
    return torch.cat([start, labels[:, :-1]], dim=1)


def sequence_loss(
    logits: Tensor, labels: Tensor, pad_id: int = 0, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats, summed over real tokens, and their number.

    The sum and not the mean, because a mean of means weighs a short batch like a long one; divide
    once, by the tokens of all that makes up an optimizer step.

    Args:
        logits: [B, T, V] float. labels: [B, T] int64, `pad_id` where nothing is to be predicted.
        label_smoothing: share of probability spread over the vocabulary (Szegedy et al. 2016).

    Returns: (loss_sum [] float32, tokens [] int64).
    """
    loss_sum = F.cross_entropy(
        logits.flatten(0, 1).float(),  # [B, T, V] -> [B * T, V]
        labels.flatten(),  # [B, T] -> [B * T]
        ignore_index=pad_id,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return loss_sum, labels.ne(pad_id).sum()


# ---- decoding ---------------------------------------------------------------------------------


@torch.inference_mode()
def greedy_decode(
    model: TransformerSeq2SeqModel, input_ids: Tensor, max_new_tokens: int | None = None
) -> Tensor:
    """The likeliest token at every step, until every row has written eos.

    Puts the model into eval mode for the call and back afterwards.

    Args:
        input_ids: [B, S] int64, padded on the right.
        max_new_tokens: where a sentence that does not end is cut; default twice its source
            plus 10, row by row, so that a row does not depend on its neighbours. Never past
            the table of learned positions.

    Returns: [B, T] int64; pads follow the eos of a row.
    """
    config = model.config
    if max_new_tokens is None:
        limits = 2 * input_ids.ne(config.pad_id).sum(dim=1) + 10  # [B]
    elif max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    else:
        limits = torch.full_like(input_ids[:, 0], max_new_tokens)
    if config.positional == "learned":
        limits = limits.clamp(max=config.max_length)
    steps = int(limits.max())
    was_training = model.training
    model.eval()
    try:
        memory, source_mask = model.encode(input_ids)
        cache = model.start_cache(memory, steps)
        output = torch.full_like(input_ids[:, :1], config.pad_id).repeat(1, steps)
        next_ids = output[:, 0]  # [B], the start token
        finished = torch.zeros_like(next_ids, dtype=torch.bool)
        for step in range(steps):
            logits = model.decode_step(next_ids, source_mask, cache, step)  # [B, V]
            logits[:, config.pad_id] = -torch.inf  # the start token is no translation
            next_ids = logits.argmax(dim=-1).masked_fill(finished, config.pad_id)
            output[:, step] = next_ids
            finished |= (next_ids == config.eos_id) | (step + 1 >= limits)
            if finished.all():
                break
        return output[:, : step + 1]
    finally:
        model.train(was_training)
