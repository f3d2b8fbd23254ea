"""An encoder-decoder Transformer for translation, with a key/value cache for decoding.

Copy this file and `positional.py` into a project: they need torch and nothing else.

    model = TransformerSeq2SeqModel(vocab_size=8000, d_model=256, nhead=4)
    loss_sum, tokens = model(input_ids, labels=labels)        # train on loss_sum / tokens
    logits = model(input_ids, shift_right(labels))            # or compute your own loss
    output_ids = greedy_decode(model, input_ids)              # stops at eos
    best = beam_search(model, input_ids, beam_size=4)[0][0]   # best.tokens, best.score

In reading order: configuration, attention, layers, model, loss, cache, decoding, inspection.

Conventions
  Shapes: B batch, S source length, T target length, D model width, H heads, Dh = D / H, F
  feed-forward width, L layers, V vocabulary, N real tokens of a batch. In decoding: K
  hypotheses per sentence, R = B * K rows.
  Token ids are int64 and padded on the right. A sentence ends in `eos_id`; the decoder starts from
  `pad_id`, as in T5 and Marian.
  A mask is boolean and True means "may attend", as in `scaled_dot_product_attention`.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from positional import POSITIONAL_KINDS

# Embedding rows are rounded up to a multiple of this: matrix units prefer round sizes.
VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class Seq2SeqConfig:
    """Hyperparameters of the model. Defaults: the tutorial's, which are the paper's "base".

    Raises ValueError for values that are out of range or do not fit together.
    """

    vocab_size: int  # `len(tokenizer)`, which is not always `tokenizer.vocab_size`
    d_model: int = 512
    nhead: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    max_length: int = 50  # size of the position table; a limit for "learned" only
    dim_feedforward: int = 2048
    dropout: float = 0.1
    activation: str = "relu"  # or "relu2", its square (So et al. 2021), which learns faster
    positional: str = "sinusoidal"  # a key of positional.POSITIONAL_KINDS
    norm_first: bool = True  # pre-LN with final norms; False: post-LN, as in the paper
    tie_embeddings: bool = True  # source, target and output (Press & Wolf 2017)
    pad_id: int = 0  # padding; also the decoder's start token
    eos_id: int = 1

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "d_model", "nhead", "num_encoder_layers", "num_decoder_layers")
        for name in (*sizes, "max_length", "dim_feedforward"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % self.nhead:
            raise ValueError(f"nhead={self.nhead} does not divide d_model={self.d_model}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.activation not in ("relu", "relu2"):
            raise ValueError(f"activation must be relu or relu2, got {self.activation!r}")
        if self.positional not in POSITIONAL_KINDS:
            known = ", ".join(POSITIONAL_KINDS)
            raise ValueError(f"positional must be one of {known}; got {self.positional!r}")
        for name in ("pad_id", "eos_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                value, most = getattr(self, name), self.vocab_size
                raise ValueError(f"{name} must be in [0, vocab_size = {most}), got {value}")
        if self.pad_id == self.eos_id:
            raise ValueError(f"pad_id and eos_id must differ; both are {self.pad_id}")


# ---- attention -----------------------------------------------------------------------------------


class Dropout(nn.Dropout):
    """`nn.Dropout` that draws 16 random bits per element on a CPU, not 64.

    Training steps there take 8 to 10 % less time. `p` is rounded to the nearest 1/65536.
    """

    def forward(self, x: Tensor) -> Tensor:
        active = self.training and self.p > 0
        if not active or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        words = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64)
        draws = words.random_(-(2**63), None).view(torch.int16)[: x.numel()]
        dropped = round(self.p * 2**16)
        kept = (draws >= dropped - 2**15).view(x.shape).to(x.dtype)
        return x * kept.mul_(2**16 / (2**16 - dropped))


def removes_pads(device: torch.device) -> bool:
    """Whether layers skip pads. Only on a CPU: elsewhere, counting the real tokens would make the
    host wait for the device in every step. Not in ONNX export, whose shapes are fixed."""
    return device.type == "cpu" and not torch.onnx.is_in_onnx_export()


class Unpadded:
    """Where the real tokens of a padded batch [B, T] are, and what they may attend to.

    Layers work on the N real tokens only, [N, D]. Attention needs rows of equal length: it pads its
    input and unpads its output. (FlashAttention: `unpad_input`, `pad_input`.) If pads are not
    removed, N = B * T, and pads are masked in attention and in the loss.

    Attributes: is_causal, and mask, boolean, broadcastable to [B, H, T, T], or None. With
    `is_causal` pads need no mask: they lie to the right of every real token.
    """

    def __init__(self, real: Tensor, is_causal: bool = False):
        """real [B, T] bool: False for pads."""
        self.shape, self.is_causal = real.shape, is_causal
        self.mask = None if is_causal else real[:, None, None, :]
        self._tokens = self._places = None
        if removes_pads(real.device):
            tokens = real.flatten().nonzero()[:, 0]  # [N], in [0, B * T)
            if len(tokens) == real.numel():
                self.mask = None
                return
            # Pads read any valid index, here that of the token before; the result is masked.
            count = real.flatten().cumsum(0)  # [B * T]
            self._tokens, self._places = tokens, (count - 1).clamp_min(0)
        elif is_causal and torch.onnx.is_in_onnx_export():
            # `is_causal` is exported as Trilu, which Modlee's converter cannot read.
            steps = torch.arange(real.size(1), device=real.device)
            self.mask, self.is_causal = ~(steps[None, :] > steps[:, None]), False  # [T, T]

    def unpad(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [N, C]."""
        x = x.flatten(0, 1)
        return x if self._tokens is None else x.index_select(0, self._tokens)

    def pad(self, x: Tensor) -> Tensor:
        """[N, C] -> [B, T, C]."""
        if self._places is not None:
            if not len(x):  # no real token at all, but index 0 must exist
                x = F.pad(x, (0, 0, 0, 1))
            x = x.index_select(0, self._places)
        return x.unflatten(0, self.shape)


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

    def project(self, x: Tensor, first: int, count: int, tokens: Unpadded | None = None) -> Tensor:
        """`count` of the projections (0 query, 1 key, 2 value), starting at `first`.

        x [N, D] of the real `tokens`, or [B, T, D] without `tokens` -> [count, B, H, T, Dh].
        """
        weight, bias = self.in_proj.weight, self.in_proj.bias
        if count < 3:
            rows = slice(first * x.size(-1), (first + count) * x.size(-1))
            weight, bias = weight[rows], bias[rows]
        projected = F.linear(x, weight, bias)
        if tokens is not None:
            projected = tokens.pad(projected)  # [N, count * D] -> [B, T, count * D]
        batch, length, width = projected.shape
        heads = projected.view(batch, length, count, self.nhead, width // count // self.nhead)
        return heads.permute(2, 0, 3, 1, 4)  # [B, T, count, H, Dh] -> [count, B, H, T, Dh]

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal=False
    ) -> Tensor:
        """Scaled dot-product attention with concatenated heads, before `out_proj`: [B, T, D].

        query [B, H, T, Dh], key and value [B, H, S, Dh], mask boolean, broadcastable to
        [B, H, T, S].
        """
        mixed = F.scaled_dot_product_attention(query, key, value, mask, 0.0, is_causal)
        return mixed.transpose(1, 2).flatten(2)  # [B, H, T, Dh] -> [B, T, D]


# ---- layers --------------------------------------------------------------------------------------


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward (Vaswani et al. 2017, section 3.1)."""

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        self.norm_first = config.norm_first
        self.squares = config.activation == "relu2"
        self.dropout = Dropout(config.dropout)
        self.self_attention = Attention(config.d_model, config.nhead)
        self.self_attention_norm = nn.LayerNorm(config.d_model)
        self.linear1 = nn.Linear(config.d_model, config.dim_feedforward)
        self.linear2 = nn.Linear(config.dim_feedforward, config.d_model)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, source: Unpadded, positions: nn.Module) -> Tensor:
        """x [N, D], the real tokens of `source`; `positions` of the model -> [N, D]."""
        x = self.attend_to_self(x, source, positions)
        return self.residual(x, self.feed_forward_norm, self.feed_forward)

    def residual(self, x: Tensor, norm: nn.LayerNorm, branch: Callable) -> Tensor:
        """x + branch(x), normalised before the branch (pre-LN) or after the sum (post-LN)."""
        y = branch(norm(x) if self.norm_first else x)
        x = x + self.dropout(y)
        return x if self.norm_first else norm(x)

    def attend_to_self(self, x: Tensor, tokens: Unpadded, positions: nn.Module) -> Tensor:
        """The first branch: x [N, D], the real `tokens` of a batch -> [N, D]."""
        attention = self.self_attention

        def branch(h: Tensor) -> Tensor:
            heads = attention.project(h, 0, 3, tokens)  # [3, B, H, T, Dh]
            query, key = positions.rotate(heads[:2])
            mixed = attention(query, key, heads[2], tokens.mask, tokens.is_causal)
            return attention.out_proj(tokens.unpad(mixed))

        return self.residual(x, self.self_attention_norm, branch)

    def feed_forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.linear1(x), inplace=True)  # [N, D] -> [N, F]
        return self.linear2(x.square() if self.squares else x)  # [N, F] -> [N, D]


class DecoderLayer(EncoderLayer):
    """Causal self-attention, attention to the source, feed-forward."""

    def __init__(self, config: Seq2SeqConfig):
        super().__init__(config)
        self.cross_attention = Attention(config.d_model, config.nhead)
        self.cross_attention_norm = nn.LayerNorm(config.d_model)

    def forward(
        self, x: Tensor, target: Unpadded, memory: Tensor, source: Unpadded, positions: nn.Module
    ) -> Tensor:
        """All positions at once, as in training.

        x [N, D], the real tokens of `target`, and memory [M, D], those of `source` -> [N, D].
        """
        attention = self.cross_attention

        def attend_to_source(h: Tensor) -> Tensor:
            (query,) = attention.project(h, 0, 1, target)
            key, value = attention.project(memory, 1, 2, source)
            mixed = attention(query, key, value, source.mask)
            return attention.out_proj(target.unpad(mixed))

        x = self.attend_to_self(x, target, positions)
        x = self.residual(x, self.cross_attention_norm, attend_to_source)
        return self.residual(x, self.feed_forward_norm, self.feed_forward)

    def step(self, x: Tensor, index: int, cache: "KeyValueCache", positions: nn.Module) -> Tensor:
        """One more token of every hypothesis: x [R, D] -> [R, D].

        Each hypothesis has its own keys and values, in layer `index` of the cache. The K hypotheses
        of a sentence share its memory.
        """
        attention = self.self_attention
        h = self.self_attention_norm(x) if self.norm_first else x
        heads = attention.project(h[:, None], 0, 3)  # [R, 1, D] -> [3, R, H, 1, Dh]
        heads[:2] = positions.rotate(heads[:2], cache.length)
        mixed = attention(heads[0], *cache.append(index, heads[1:]), None)  # [R, 1, D]
        x = x + attention.out_proj(mixed[:, 0])
        x = x if self.norm_first else self.self_attention_norm(x)

        attention = self.cross_attention
        h = self.cross_attention_norm(x) if self.norm_first else x
        (query,) = attention.project(h.unflatten(0, (-1, cache.width)), 0, 1)  # [B, H, K, Dh]
        mixed = attention(query, *cache.memory[index], cache.source_mask)  # [B, K, D]
        x = x + attention.out_proj(mixed.flatten(0, 1))
        x = x if self.norm_first else self.cross_attention_norm(x)

        h = self.feed_forward_norm(x) if self.norm_first else x
        x = x + self.feed_forward(h)
        return x if self.norm_first else self.feed_forward_norm(x)


# ---- model ---------------------------------------------------------------------------------------


class TransformerSeq2SeqModel(nn.Module):
    """Encoder-decoder Transformer (Vaswani et al. 2017); takes the fields of `Seq2SeqConfig`.

        TransformerSeq2SeqModel(32100, d_model=512, nhead=8)
        TransformerSeq2SeqModel(**dataclasses.asdict(config))

    Pre-LN by default, the layout that transformers calls Pegasus; post-LN (`norm_first=False`) is
    what it calls Marian.
    """

    # For help() and editors; the defaults are written once, in the configuration.
    __signature__ = inspect.signature(Seq2SeqConfig)

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.config = config = Seq2SeqConfig(*args, **kwargs)
        rows = math.ceil(config.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.embedding = nn.Embedding(rows, config.d_model, config.pad_id)
        self.positions = POSITIONAL_KINDS[config.positional](
            config.max_length, config.d_model, config.d_model // config.nhead
        )
        self.dropout = Dropout(config.dropout)
        self.encoder_layers = nn.ModuleList(
            EncoderLayer(config) for _ in range(config.num_encoder_layers)
        )
        self.decoder_layers = nn.ModuleList(
            DecoderLayer(config) for _ in range(config.num_decoder_layers)
        )
        # Post-LN layers end in a norm; a pre-LN stack needs one more.
        final_norm = nn.LayerNorm if config.norm_first else nn.Identity
        self.encoder_norm = final_norm(config.d_model)
        self.decoder_norm = final_norm(config.d_model)
        self.output = nn.Linear(config.d_model, rows, bias=False)
        self.reset_parameters()
        self.tie_embeddings()

    def tie_embeddings(self) -> None:
        """Share one parameter between embedding and output, if configured.

        Call it again after `copy.deepcopy` and after `load_state_dict(weights, assign=True)`.
        """
        if self.config.tie_embeddings:
            self.output.weight = self.embedding.weight
            # The lookup gives the pad row no gradient; the output layer must not either.
            self.embedding.weight.register_post_accumulate_grad_hook(self._keep_pad)

    def _keep_pad(self, weight: Tensor) -> None:
        weight.grad[self.config.pad_id] = 0

    def reset_parameters(self) -> None:
        """Glorot-uniform matrices, zero biases, embeddings with standard deviation 1 / sqrt(D).

        The pad embedding is zero and stays zero: the decoder starts from it, as in Marian.
        """
        for name, parameter in self.named_parameters():
            if name.startswith(("embedding.", "positions.", "output.")):
                nn.init.normal_(parameter, std=self.config.d_model**-0.5)
            elif parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        with torch.no_grad():
            self.embedding.weight[self.config.pad_id] = 0

    def embed(self, ids: Tensor, offset: int = 0) -> Tensor:
        """ids [B, T], from position `offset` on -> [B, T, D], scaled by sqrt(D) (section 3.4)."""
        scaled = self.embedding(ids) * math.sqrt(self.config.d_model)
        return self.positions.embed(scaled, offset)

    def encode(self, input_ids: Tensor) -> tuple[Tensor, Unpadded]:
        """input_ids [B, S] -> (memory [M, D] of the M real tokens, their `Unpadded`).

        In a row of only pads the first one counts as real, so that no softmax is empty.
        """
        # Uses `<` and no assignment, so that Modlee's graph export can convert it.
        first = torch.arange(input_ids.size(1), device=input_ids.device) < 1  # [S]
        source = Unpadded(input_ids.ne(self.config.pad_id) | first)
        x = self.dropout(source.unpad(self.embed(input_ids)))  # [M, D]
        for layer in self.encoder_layers:
            x = layer(x, source, self.positions)
        return self.encoder_norm(x), source

    def decode(
        self, decoder_input_ids: Tensor, target: Unpadded, memory: Tensor, source: Unpadded
    ) -> Tensor:
        """All positions at once: [B, T] -> [N, D] of the real tokens of `target`."""
        x = self.dropout(target.unpad(self.embed(decoder_input_ids)))  # [N, D]
        for layer in self.decoder_layers:
            x = layer(x, target, memory, source, self.positions)
        return self.decoder_norm(x)

    def decode_step(self, ids: Tensor, cache: "KeyValueCache") -> Tensor:
        """The next token of every hypothesis: ids [R] -> logits [R, V]; `cache` grows by one."""
        x = self.embed(ids[:, None], cache.length)[:, 0]  # [R, 1, D] -> [R, D]
        for index, layer in enumerate(self.decoder_layers):
            x = layer.step(x, index, cache, self.positions)
        cache.length += 1
        return self.project(self.decoder_norm(x))

    def project(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V], without the rows added by `VOCAB_MULTIPLE`."""
        return F.linear(hidden, self.output.weight[: self.config.vocab_size])

    def loss(self, hidden: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """`sequence_loss` of `project(hidden)` in less time and memory.

        hidden [N, D], labels [N] token ids, of which pads are ignored -> summed loss [].
        """
        # Pads contribute no gradient, neither to hidden states nor to the output weights.
        hidden = hidden.masked_fill(labels.eq(self.config.pad_id)[:, None], 0)
        weight, needs_grad = self.output.weight, torch.is_grad_enabled()
        return _ProjectedLoss.apply(
            hidden, weight, labels, self.config, label_smoothing, needs_grad
        )

    def forward(
        self,
        input_ids: Tensor | list[Tensor],
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of the next token at every target position, or, with `labels`, the loss.

        Args:
            input_ids: [B, S] int64, padded on the right; or the list [input_ids,
                decoder_input_ids], which is how Modlee calls a model.
            decoder_input_ids: [B, T] int64, the target shifted right (`shift_right`). None: the
                shifted labels, or without labels only the start token (T = 1).
            labels: [B, T] int64, ending in eos, padded on the right. label_smoothing: see
                `sequence_loss`.

        Returns: [B, T, V], V = vocab_size, float (the autocast dtype if one is active). With
            `labels`: what `sequence_loss` returns, in less time and memory.
        """
        if isinstance(input_ids, (list, tuple)):
            input_ids, decoder_input_ids = input_ids
        pad_id = self.config.pad_id
        if decoder_input_ids is None:
            start = torch.full_like(input_ids[:, :1], pad_id)
            decoder_input_ids = start if labels is None else shift_right(labels, pad_id)
        real = torch.ones_like(decoder_input_ids, dtype=torch.bool)  # [B, T]
        if labels is not None:
            real = labels.ne(pad_id)
        memory, source = self.encode(input_ids)
        target = Unpadded(real, is_causal=True)
        hidden = self.decode(decoder_input_ids, target, memory, source)  # [N, D]
        if labels is None:
            return self.project(target.pad(hidden))  # [B, T, V]
        labels = target.unpad(labels[..., None])[:, 0]  # [B, T] -> [N]
        return self.loss(hidden, labels, label_smoothing), real.sum()


# ---- loss ----------------------------------------------------------------------------------------


def shift_right(labels: Tensor, pad_id: int = 0) -> Tensor:
    """What the decoder reads while it learns to write `labels`: [a b eos] -> [pad a b].

    labels [B, T] int64, ending in eos, padded on the right -> [B, T] int64.
    """
    start = torch.full_like(labels[:, :1], pad_id)
    return torch.cat([start, labels[:, :-1]], dim=1)


def sequence_loss(
    logits: Tensor, labels: Tensor, pad_id: int = 0, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats, summed over real tokens, and their number.

    The sum and not the mean, because a mean of means gives a short batch the weight of a long one.
    Divide once, by all tokens of an optimizer step.

    Args:
        logits: [B, T, V] float. labels: [B, T] int64, `pad_id` where there is no target.
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


class _ProjectedLoss(torch.autograd.Function):
    """Vocabulary projection and `sequence_loss` fused, one piece of the tokens at a time.

    The gradients of a piece are computed while its logits exist. The logits of all tokens, by far
    the largest tensor of a training step (V / D times the hidden states), never exist at once.
    """

    PIECE = 2**26  # logits of a piece, in the dtype of the products: 128 MiB in bfloat16
    BLOCK, BLOCK_CPU = 2**24, 2**20  # logits in float32 at once; 4 MiB fit into a CPU's cache

    @staticmethod
    def forward(ctx, hidden, weight, labels, config, smoothing: float, needs_grad: bool) -> Tensor:
        """hidden [N, D], zero for pads; weight [V or more, D]; labels [N] -> loss [], float32.
        needs_grad: torch.is_grad_enabled() of the caller; inside `forward` it is always False."""
        vocab_size, labels = config.vocab_size, labels[:, None]
        # The dtype that autocast would use, except float16: these gradients come before loss
        # scaling, so small ones would underflow.
        dtype = F.linear(hidden[:1], weight[:1]).dtype
        dtype = torch.float32 if dtype == torch.float16 else dtype
        x, w = hidden.to(dtype), weight[:vocab_size].to(dtype)
        elements = _ProjectedLoss.BLOCK_CPU if x.device.type == "cpu" else _ProjectedLoss.BLOCK
        size = max(1, _ProjectedLoss.PIECE // vocab_size)  # tokens of a piece
        rows = max(1, elements // vocab_size)  # tokens of a block of it
        losses, grad_x, grad_w = [], torch.empty_like(x), None
        pieces = zip(x.split(size), labels.split(size), grad_x.split(size))
        for part, part_labels, part_grad in pieces:
            # Products are written to `out=`, which autocast leaves alone.
            logits = torch.mm(part, w.t(), out=part.new_empty(len(part), vocab_size))  # [n, V]
            for block, targets in zip(logits.split(rows), part_labels.split(rows)):
                log_probs = block.log_softmax(dim=-1, dtype=torch.float32)
                loss = log_probs.gather(1, targets) * (smoothing - 1)
                if smoothing:
                    loss -= log_probs.mean(dim=1, keepdim=True) * smoothing
                losses.append(loss)
                gradient = log_probs.exp_()
                if smoothing:
                    gradient -= smoothing / vocab_size
                gradient.scatter_add_(1, targets, torch.full_like(loss, smoothing - 1))
                block.copy_(gradient)
            if needs_grad:  # `logits` holds their gradient now
                torch.mm(logits, w, out=part_grad)
                more = torch.mm(logits.t(), part, out=torch.empty_like(w))  # [V, D]
                # Converted to float32 first: adding mixed dtypes is slow on a CPU.
                grad_w = more if grad_w is None else grad_w.float().add_(more.float())
        ctx.rows = len(weight)
        ctx.save_for_backward(grad_x, grad_w)
        return torch.cat(losses).masked_fill_(labels == config.pad_id, 0).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        grad_x, grad_w = ctx.saved_tensors
        full = grad.new_zeros(ctx.rows, grad_w.size(1))  # with the rows of `VOCAB_MULTIPLE`
        full[: len(grad_w)] = grad_w
        return grad_x * grad, full.mul_(grad), None, None, None, None


# ---- key/value cache -----------------------------------------------------------------------------


class KeyValueCache:
    """Keys and values that the decoder keeps between steps, for R = B * K hypotheses.

    Attributes:
        width: K. length: tokens decoded so far, T.
        memory: keys and values of the source, per layer: [2, B, H, S, Dh].
        source_mask: [B, 1, 1, S] bool; may be None where there are no pads.

    Keys and values of the hypotheses are written in place, into a buffer [2, R, H, capacity, Dh]
    per layer, whose capacity doubles when it is used up.
    """

    def __init__(self, model: TransformerSeq2SeqModel, input_ids: Tensor, width: int = 1):
        """Encode input_ids [B, S]."""
        self.width, self.length = width, 0
        memory, source = model.encode(input_ids)
        self.source_mask = source.mask
        attentions = [layer.cross_attention for layer in model.decoder_layers]
        self.memory = [x.project(memory, 1, 2, source).contiguous() for x in attentions]
        _, sentences, heads, _, head_dim = self.memory[0].shape
        shape = (2, sentences * width, heads, 16, head_dim)
        self._past = [keys.new_empty(shape) for keys in self.memory]

    def append(self, layer: int, newest: Tensor) -> tuple[Tensor, Tensor]:
        """Append key and value of the newest token, [2, R, H, 1, Dh] -> all, 2 x [R, H, T, Dh]."""
        past, end = self._past[layer], self.length + 1
        if end > past.size(3):
            past = self._past[layer] = torch.cat([past, torch.empty_like(past)], dim=3)
        past[:, :, :, self.length : end] = newest
        return past[:, :, :, :end].unbind()

    def reorder(self, rows: list[int]) -> None:
        """Row i continues from the keys and values of row `rows[i]`."""
        changed = [row for row, parent in enumerate(rows) if row != parent]
        if changed:
            parents = [rows[row] for row in changed]
            for past in self._past:
                written = past[:, :, :, : self.length]
                written[:, changed] = written[:, parents]

    def keep(self, sentences: list[int]) -> None:
        """Keep only these of the B sentences, in this order."""
        self.memory = [memory[:, sentences] for memory in self.memory]
        for layer, past in enumerate(self._past):
            past = past.unflatten(1, (-1, self.width))  # [2, B, K, H, capacity, Dh]
            self._past[layer] = past[:, sentences].flatten(1, 2)
        if self.source_mask is not None:
            self.source_mask = self.source_mask[sentences]


# ---- decoding ------------------------------------------------------------------------------------


def output_limits(
    config: Seq2SeqConfig, source_lengths: list[int], max_new_tokens: int | None = None
) -> list[int]:
    """Token limit of each translation: `max_new_tokens`, else twice its source plus 10; at most
    `max_length` with learned positions. Raises ValueError for max_new_tokens < 1."""
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    limits = [max_new_tokens or 2 * length + 10 for length in source_lengths]
    if config.positional == "learned":
        limits = [min(limit, config.max_length) for limit in limits]
    return limits


def _limits(
    model: TransformerSeq2SeqModel, input_ids: Tensor, max_new_tokens: int | None
) -> list[int]:
    if not input_ids.numel():
        raise ValueError(f"nothing to decode: input_ids is {list(input_ids.shape)}")
    lengths = input_ids.ne(model.config.pad_id).sum(dim=1).tolist()
    return output_limits(model.config, lengths, max_new_tokens)


@contextlib.contextmanager
def _decoding(model: TransformerSeq2SeqModel) -> Iterator[None]:
    """Eval mode, without gradients and autocast; restores the mode afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        no_autocast = torch.autocast(model.embedding.weight.device.type, enabled=False)
    except RuntimeError:  # torch 2.3 has none on MPS
        no_autocast = contextlib.nullcontext()
    try:
        for module in training:
            module.training = False
        with torch.inference_mode(), no_autocast:
            yield
    finally:
        for module in training:
            module.training = True


def _decode_rows(
    model: TransformerSeq2SeqModel,
    input_ids: Tensor,
    limits: list[int],
    choose: Callable[[Tensor, list[int], int], Tensor],
) -> Tensor:
    """One hypothesis per sentence, of at most `limits` tokens.

    `choose` (logits [B', V], which sentences, step) picks the next tokens [B'] of the B' sentences
    that are still running.

    Returns: [B, T] int64.
    """
    pad_id, eos_id = model.config.pad_id, model.config.eos_id
    outputs: list[list[int]] = [[] for _ in limits]
    running = list(range(len(limits)))
    next_ids = torch.full_like(input_ids[:, 0], pad_id)  # the start token
    with _decoding(model):
        cache = KeyValueCache(model, input_ids)
        while running:
            logits = model.decode_step(next_ids, cache)  # [B', V]
            logits[:, pad_id] = -math.inf  # never write the start token
            next_ids = choose(logits, running, cache.length - 1)
            going_on = []
            for row, token in enumerate(next_ids.tolist()):
                outputs[running[row]].append(token)
                if token != eos_id and cache.length < limits[running[row]]:
                    going_on.append(row)
            if len(going_on) < len(running):
                cache.keep(going_on)
                running = [running[row] for row in going_on]
                next_ids = next_ids[going_on]
    rows = [torch.tensor(output, device=input_ids.device) for output in outputs]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)


def greedy_decode(
    model: TransformerSeq2SeqModel, input_ids: Tensor, max_new_tokens: int | None = None
) -> Tensor:
    """The likeliest token at every step, until every row has written eos or reached its limit.

    Args:
        input_ids: [B, S] int64, padded on the right.
        max_new_tokens: length limit; default: twice the source plus 10, so that a row does not
            depend on its neighbours. Learned positions limit it further.

    Returns: [B, T] int64; pads follow the end of a row. The model is in eval mode for the call.
    """
    limits = _limits(model, input_ids, max_new_tokens)
    # Not argmax, which is twice as slow on a CPU.
    return _decode_rows(model, input_ids, limits, lambda logits, *_: logits.max(dim=-1).indices)


def sample_decode(
    model: TransformerSeq2SeqModel,
    input_ids: Tensor,
    seeds: list[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int | None = None,
) -> Tensor:
    """Tokens drawn from the model's distribution, by nucleus sampling (Holtzman et al. 2020).

    Args:
        input_ids, max_new_tokens: as in `greedy_decode`.
        seeds: one per row. A row is a function of its seed, whatever else is in the batch.
        temperature: logits are divided by it; towards 0 this becomes greedy.
        top_p: draw from the smallest set of tokens that holds this share of the probability.

    Returns: [B, T] int64, as `greedy_decode`. Raises ValueError for values out of range.
    """
    if not (0 < temperature < math.inf and 0 < top_p <= 1):
        raise ValueError(f"need temperature > 0 and 0 < top_p <= 1, got {temperature} and {top_p}")
    if len(seeds) != len(input_ids):
        raise ValueError(f"{len(seeds)} seeds for {len(input_ids)} sentences")
    limits = _limits(model, input_ids, max_new_tokens)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    draws = torch.stack([torch.rand(max(limits), generator=g) for g in generators])  # [B, T]
    draws = draws.to(input_ids.device)

    def draw(logits: Tensor, rows: list[int], step: int) -> Tensor:
        logits = logits.float()
        scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
        share, ids = scaled.softmax(dim=-1).sort(dim=-1, descending=True)
        total = share.cumsum(dim=-1)  # [B', V]
        kept = (total - share < top_p).sum(dim=-1, keepdim=True)  # at least one
        point = draws[rows, step, None] * total.gather(1, kept - 1)
        place = torch.searchsorted(total, point, right=True)
        return ids.gather(1, torch.minimum(place, kept - 1))[:, 0]

    return _decode_rows(model, input_ids, limits, draw)


@dataclass(frozen=True)
class Hypothesis:
    """A translation found by `beam_search`."""

    tokens: list[int]  # ends in eos, unless the limit cut it off
    log_probs: list[float]  # of each token, in nats
    # Sum of log_probs / number of tokens ** length_penalty; None: not computed.
    score: float | None


class _Beam:
    """The search for one sentence.

    Attributes: running: by row of the cache, a hypothesis whose score is the sum of its
    log-probabilities, or None. ended: the best finished hypotheses, best first.
    """

    def __init__(self, width: int, length_penalty: float, limit: int):
        self.width, self.length_penalty, self.limit = width, length_penalty, limit
        self.running: list[Hypothesis | None] = [Hypothesis([], [], 0.0)] + [None] * (width - 1)
        self.ended: list[Hypothesis] = []
        self.finished = False

    def advance(self, candidates: list[tuple[float, float, int, int]], eos_id: int) -> list[int]:
        """Extend by the best continuations: (sum, log-probability, row, token), best first.

        There are 2 * width of them, because up to `width` may end at once.
        Returns: the parent row of every row.
        """
        heirs = []  # (row, hypothesis)
        for rank, (total, log_prob, row, token) in enumerate(candidates):
            if total == -math.inf or len(heirs) == self.width:
                break
            past = self.running[row]
            longer = Hypothesis(past.tokens + [token], past.log_probs + [log_prob], total)
            if token != eos_id:
                heirs.append((row, longer))
            elif rank < self.width:
                self._end(longer)
        length = 1 + max(len(hypothesis.tokens) for hypothesis in self.running if hypothesis)
        if length == self.limit:
            for _, hypothesis in heirs:
                self._end(hypothesis)
        # If the best continuation ended now, would it still enter the list?
        best = candidates[0][0] / length**self.length_penalty
        hopeless = len(self.ended) == self.width and self.ended[-1].score >= best
        self.finished = length == self.limit or hopeless or not heirs
        heirs += [(row, None) for row in range(len(heirs), self.width)]
        self.running = [hypothesis for _, hypothesis in heirs]
        return [row for row, _ in heirs]

    def _end(self, found: Hypothesis) -> None:
        score = found.score / len(found.tokens) ** self.length_penalty
        self.ended.append(Hypothesis(found.tokens, found.log_probs, score))
        self.ended.sort(key=lambda hypothesis: -hypothesis.score)
        del self.ended[self.width :]


def beam_search(
    model: TransformerSeq2SeqModel,
    input_ids: Tensor,
    beam_size: int = 4,
    length_penalty: float = 1.0,
    num_return: int = 1,
    max_new_tokens: int | None = None,
) -> list[list[Hypothesis]]:
    """The best translations found by keeping `beam_size` hypotheses at every step.

    A hypothesis that ends enters a list of the `beam_size` best. A sentence is finished, and leaves
    the batch, when no running hypothesis could enter the list by ending now. Follows `generate` of
    transformers (early_stopping=False). `beam_size` 1 is greedy decoding.

    Args:
        input_ids, max_new_tokens: as in `greedy_decode`; hypotheses are cut at the limit.
        length_penalty: exponent a in score = sum of log-probabilities / length^a. 0: the plain sum,
            which prefers short translations; 1: the mean.
        num_return: hypotheses per sentence, at most `beam_size`.

    Returns: for every sentence its hypotheses, best first. Raises ValueError for values out of
    range.
    """
    if beam_size < 1 or not 1 <= num_return <= beam_size:
        raise ValueError(f"need 1 <= num_return <= beam_size, got {num_return} and {beam_size}")
    if not -10 <= length_penalty <= 10:
        raise ValueError(f"length_penalty must be in [-10, 10], got {length_penalty}")
    config = model.config
    limits = _limits(model, input_ids, max_new_tokens)
    beams = [_Beam(beam_size, length_penalty, limit) for limit in limits]
    searching = list(beams)
    device, per_row = input_ids.device, min(2 * beam_size + 1, config.vocab_size)
    with _decoding(model):
        cache = KeyValueCache(model, input_ids, beam_size)
        while searching:
            running = [hypothesis for beam in searching for hypothesis in beam.running]
            ids = [h.tokens[-1] if h and h.tokens else config.pad_id for h in running]
            ids = torch.tensor(ids, device=device)  # [R]
            sums = torch.tensor([h.score if h else -math.inf for h in running], device=device)
            log_probs = model.decode_step(ids, cache).float().log_softmax(dim=-1)  # [R, V]
            # The best of all continuations are among the best of each hypothesis.
            best, tokens = log_probs.topk(per_row, dim=-1)  # [R, 2K + 1]
            best.masked_fill_(tokens == config.pad_id, -math.inf)  # never the start token
            shape = (len(searching), -1)  # [R, 2K + 1] -> [B, K * (2K + 1)]
            totals = (best + sums[:, None]).view(shape)
            totals, order = totals.topk(min(2 * beam_size, totals.size(1)), dim=-1)
            best = best.view(shape).gather(1, order)
            tokens = tokens.view(shape).gather(1, order)
            # The bookkeeping of beams is on the host: two small copies per step.
            numbers = torch.stack([totals, best]).tolist()
            places = torch.stack([order // per_row, tokens]).tolist()
            rows = []  # the parent of each row of the cache
            for index, beam in enumerate(searching):
                candidates = list(zip(*(column[index] for column in (*numbers, *places))))
                parents = beam.advance(candidates, config.eos_id)
                rows += [index * beam_size + parent for parent in parents]
            cache.reorder(rows)
            going_on = [index for index, beam in enumerate(searching) if not beam.finished]
            if len(going_on) < len(searching):
                cache.keep(going_on)
                searching = [searching[index] for index in going_on]
    return [beam.ended[:num_return] for beam in beams]


# ---- inspection ----------------------------------------------------------------------------------


def cross_attention_weights(
    model: TransformerSeq2SeqModel, input_ids: Tensor, labels: Tensor
) -> Tensor:
    """Cross-attention weights of every target position under teacher forcing.

    input_ids [B, S], labels [B, T] int64 -> [L, B, H, T, S], rows that sum to 1; position t is the
    one that predicts labels[:, t].
    """
    found = []

    def keep(module: Attention, inputs: tuple) -> None:
        query, key, _, mask = inputs
        scores = (query @ key.mT) * key.size(-1) ** -0.5  # [B, H, T, S]
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        found.append(scores.softmax(dim=-1))

    hooks = [x.cross_attention.register_forward_pre_hook(keep) for x in model.decoder_layers]
    try:
        with _decoding(model):
            model(input_ids, shift_right(labels, model.config.pad_id))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def count_flops(config: Seq2SeqConfig, source_length: int, target_length: int) -> int:
    """Floating-point operations of a forward pass over one pair; a multiply-add counts as two.

    Only matrix products, and only the unmasked part of causal attention. Training takes three times
    as many (backward: one product each for inputs and weights).
    """
    size, wide = config.d_model, config.dim_feedforward
    layer = 4 * size**2 + 2 * size * wide + 2 * size * source_length  # of one source token
    encoder = config.num_encoder_layers * source_length * layer
    memory = source_length * 2 * size**2
    seen = source_length + (target_length + 1) / 2  # keys per target token, on average
    layer = 6 * size**2 + 2 * size * wide + 2 * size * seen  # of one target token
    decoder = config.num_decoder_layers * (memory + target_length * layer)
    output = target_length * size * config.vocab_size
    return int(2 * (encoder + decoder + output))
