"""An encoder-decoder Transformer for translation, with a key/value cache for decoding.

Copy this file and `positional.py` into a project: they need torch and nothing else.

    model = TransformerSeq2SeqModel(vocab_size=8000, d_model=256, nhead=4)
    logits = model(input_ids, shift_right(labels))            # teacher forcing
    loss_sum, tokens = sequence_loss(logits, labels)          # pads do not count
    output_ids = greedy_decode(model, input_ids)              # stops at eos
    best = beam_search(model, input_ids, beam_size=4)[0][0]   # best.tokens, best.score

Data flows down the page: configuration, attention, layers, model, loss, decoding.

Conventions
  Shapes: B batch, S source length, T target length, D model width, H heads, Dh = D / H, V vocabulary,
  K hypotheses per sentence while decoding, R = B * K rows.
  Token ids are int64 and padded on the right. A sentence ends in `eos_id`; the decoder starts from
  `pad_id`, as in T5 and Marian.
  A mask is boolean and True means "may attend", as in `scaled_dot_product_attention`.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from positional import POSITIONAL_KINDS

# Embedding rows are rounded up to this: matrix units like it, and nothing sees it.
VOCAB_MULTIPLE = 64


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
    tie_embeddings: bool = True  # source, target and output (Press & Wolf 2017)
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


class Linear(nn.Linear):
    """`nn.Linear`, which can also apply a range of its rows, and which decodes fast on a CPU.

    A decoding step multiplies large matrices by few columns, where BLAS gets a fraction of what
    the machine can do. Between `prepare` and `release`, without gradients and in float32:
      up to 4 tokens and weights too large for a core's cache: W x^T, never with a single column;
        bound by reading W, two to seven times as fast as x W^T (measured with MKL: 32100 x 512
        by 4 columns, 3.0 instead of 11 ms);
      more tokens: oneDNN on a copy of the weights in its blocked layout, made at the first use.
    """

    # Elements, 1 MiB: at home in a core's cache, where F.linear is as fast.
    SMALL = 2**18

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._routes: dict | None = None  # between prepare and release
        self._kept: tuple | None = None  # (state of the weights, routes of last time)

    def prepare(self) -> None:
        """Take the fast routes from now on; the weights must not change before `release`.

        What changed since last time is noticed, but for a few elements edited through `.data`,
        which leaves no trace: of large weights only some elements are compared.
        """
        weight = self.weight
        is_large = weight.numel() >= self.SMALL
        if not is_large or weight.device.type != "cpu" or weight.dtype != torch.float32:
            return
        state, sample = [], []
        for tensor in (weight, self.bias):
            if tensor is not None:
                version = None if tensor.is_inference() else tensor._version
                state.append((version, tensor.data_ptr()))
                # Odd, to meet rows and columns alike.
                stride = tensor.numel() // 256 | 1
                sample.append(tensor.detach().flatten()[::stride])
        sample = torch.cat(sample)
        kept = self._kept
        if kept is None or kept[0] != state or not torch.equal(kept[1], sample):
            self._kept = (state, sample, {})
        self._routes = self._kept[2]

    def release(self) -> None:
        self._routes = None

    def __getstate__(self) -> dict:
        # The copies are for this process, and oneDNN's cannot be pickled.
        return {**self.__dict__, "_routes": None, "_kept": None}

    def forward(self, x: Tensor, start: int = 0, size: int | None = None) -> Tensor:
        """x [..., K] -> [..., size]: rows `start` to `start + size` of the weights; None: all."""
        if self._routes is None:
            return F.linear(x, *self._part(start, size))
        return self.route(start, size)(x)

    def route(
        self, start: int = 0, size: int | None = None
    ) -> Callable[[Tensor], Tensor]:
        """`forward` with its rows fixed, for many calls."""
        if self._routes is None:
            weight, bias = self._part(start, size)
            return partial(F.linear, weight=weight, bias=bias)
        if (start, size) not in self._routes:
            self._routes[start, size] = self._route(*self._part(start, size))
        return self._routes[start, size]

    def _part(self, start: int, size: int | None) -> tuple[Tensor, Tensor | None]:
        if size is None or size == self.out_features:
            return self.weight, self.bias
        rows = slice(start, start + size)
        return self.weight[rows], None if self.bias is None else self.bias[rows]

    def _route(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        many = partial(F.linear, weight=weight, bias=bias)
        # What torch's own compiler calls; it has no public name, so it may be missing.
        if torch.backends.mkldnn.is_available() and hasattr(
            torch.ops.mkldnn, "_linear_pointwise"
        ):
            onednn = torch.ops.mkldnn._linear_pointwise
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)

            def many(x: Tensor) -> Tensor:
                return onednn(x, packed, bias, "none", [], "")

        def route(x: Tensor) -> Tensor:
            rows = x.numel() // x.size(-1)
            if rows > 4:
                return many(x)
            flat = x.reshape(rows, -1)
            if rows == 1:
                flat = flat.repeat(2, 1)
            product = torch.mm(weight, flat.t())  # [N, max(R, 2)]
            result = product.t()[:rows].contiguous()  # [R, N]
            if bias is not None:
                result += bias
            return result.view(*x.shape[:-1], -1)

        return route


class Dropout(nn.Dropout):
    """`nn.Dropout`, which on a CPU draws 16 random bits per element and not 64: a quarter of the
    time, and `p` to the nearest 1/65536."""

    def forward(self, x: Tensor) -> Tensor:
        by_hand = self.training and self.p > 0 and x.device.type == "cpu"
        if not by_hand or torch.compiler.is_compiling():
            return super().forward(x)
        words = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64)
        draws = words.random_(-(2**63), None).view(torch.int16)[: x.numel()]
        dropped = round(self.p * 2**16)
        kept = (draws >= dropped - 2**15).view(x.shape).to(x.dtype)
        return x * kept.mul_(2**16 / (2**16 - dropped))


class Unpadded:
    """Where the tokens of a padded batch [B, T] stand. Layers see the N tokens alone, [N, D]; only
    attention needs the rectangle, and there pads cost little.

    What FlashAttention calls `unpad_input` and `pad_input`.

    Attributes: mask: [B, 1, 1, T] bool, what may be attended to; None where that is everything.
    """

    def __init__(self, real: Tensor, keep_pads: bool = False):
        """real [B, T] bool, False = pad. Finding the tokens makes the host wait for the device;
        with `keep_pads` all places are taken for tokens, but for the mask."""
        self.shape = real.shape
        self.mask = real[:, None, None, :]
        self._tokens = self._places = None
        if not keep_pads:
            self._tokens = real.flatten().nonzero()[:, 0]  # [N], in [0, B * T)
            # A pad gets the token before it, which is as good as any other and nobody looks at.
            count = real.flatten().cumsum(0).unflatten(0, real.shape)
            self._places = (count - 1).clamp_min(0)  # [B, T], in [0, N)
            if len(self._tokens) == real.numel():
                self.mask = self._tokens = self._places = None

    def drop(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [N, C]."""
        x = x.flatten(0, 1)
        return x if self._tokens is None else x.index_select(0, self._tokens)

    def restore(self, x: Tensor) -> Tensor:
        """[N, C] -> [B, T, C]."""
        if self._places is None:
            return x.unflatten(0, self.shape)
        if not len(x):  # a batch of nothing, such as a process gets past the end
            x = F.pad(x, (0, 0, 0, 1))
        # Indexed with [B, T] at once, autograd would take eight times as long to go back.
        x = x.index_select(0, self._places.flatten())
        return x.view(*self._places.shape, -1)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2).

    One matrix projects to queries, keys and values, in the layout of `nn.MultiheadAttention`:
    `in_proj.weight` is its `in_proj_weight`, `out_proj` its `out_proj`. Attention weights get no
    dropout: the paper (section 5.4) has none, and without it the fused kernels apply.
    """

    def __init__(self, d_model: int, nhead: int):
        super().__init__()
        self.nhead = nhead
        self.in_proj = Linear(d_model, 3 * d_model)
        self.out_proj = Linear(d_model, d_model)

    def project(
        self, x: Tensor, where: Unpadded, first: int, count: int
    ) -> list[Tensor]:
        """`count` projections of x [N, D] from the `first` on (0 query, 1 key, 2 value).

        Returns: `count` tensors [B, H, T, Dh].
        """
        width = x.size(-1)
        projected = self.in_proj(x, first * width, count * width)  # [N, count * D]
        projected = where.restore(projected)  # [B, T, count * D]
        return [
            part.unflatten(-1, (self.nhead, -1)).transpose(1, 2)  # -> [B, H, T, Dh]
            for part in projected.chunk(count, dim=-1)  # count x [B, T, D]
        ]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        where: Unpadded,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """query [B, H, T, Dh] of the tokens `where`, key and value [B, H, S, Dh], mask
        broadcastable to [B, H, T, S].

        Returns: [N, D].
        """
        mixed = attend(query, key, value, mask, is_causal)
        mixed = mixed.transpose(1, 2).flatten(2)  # [B, H, T, Dh] -> [B, T, D]
        return self.out_proj(where.drop(mixed))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool = False,
) -> Tensor:
    """Attention of query [B, H, T, Dh] to key and value [B, H, S, Dh], mask [B, 1, 1, S] or [T, S],
    boolean, or float and added.

    Written out on a CPU for sentences of usual length, where the fused kernel takes longer: for 20
    tokens forward and backward five times as long in bfloat16, 1.2 times in float32; for a few
    queries of a decoding step three times.
    """
    steps, seen = query.size(2), key.size(2)
    written_out = query.device.type == "cpu" and steps > 1 and steps * seen <= 2**16
    if not written_out or torch.onnx.is_in_onnx_export():
        return F.scaled_dot_product_attention(query, key, value, mask, 0.0, is_causal)
    scores = (query * key.size(-1) ** -0.5) @ key.mT  # [B, H, T, S]
    if is_causal:
        mask = torch.ones(steps, seen, dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1) @ value


# ---- layers -----------------------------------------------------------------------------------


class _Layer(nn.Module):
    """What encoder and decoder layers share: residual branches, self-attention, feed-forward."""

    def __init__(self, config: "Seq2SeqConfig"):
        super().__init__()
        self.norm_first = config.norm_first
        self.dropout = Dropout(config.dropout)
        self.self_attention = Attention(config.d_model, config.nhead)
        self.self_attention_norm = nn.LayerNorm(config.d_model)
        self.linear1 = Linear(config.d_model, config.dim_feedforward)
        self.linear2 = Linear(config.dim_feedforward, config.d_model)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)

    def residual(self, x: Tensor, norm: nn.LayerNorm, branch) -> Tensor:
        """x + branch(x), normalised before the branch (pre-LN) or after the sum (post-LN)."""
        if self.norm_first:
            return x + self.dropout(branch(norm(x)))
        return norm(x + self.dropout(branch(x)))

    def attend_to_self(
        self,
        x: Tensor,
        tokens: Unpadded,
        positions: nn.Module,
        mask: Tensor | None,
        is_causal: bool = False,
    ) -> Tensor:
        """The first branch: x [N, D], the real tokens of a batch -> [N, D]."""

        def branch(h: Tensor) -> Tensor:
            query, key, value = self.self_attention.project(h, tokens, 0, 3)
            query, key = positions.rotate(query), positions.rotate(key)
            return self.self_attention(query, key, value, tokens, mask, is_causal)

        return self.residual(x, self.self_attention_norm, branch)

    def feed_forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.linear1(x), inplace=True)  # [N, D] -> [N, F]
        return self.linear2(hidden)


class EncoderLayer(_Layer):
    """Self-attention and feed-forward (Vaswani et al. 2017, section 3.1)."""

    def forward(
        self, x: Tensor, source_tokens: Unpadded, positions: nn.Module
    ) -> Tensor:
        """x [N, D], the real ones of `source_tokens`; `positions` of the model -> [N, D]."""

        x = self.attend_to_self(x, source_tokens, positions, source_tokens.mask)
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
        target_tokens: Unpadded,
        memory: Tensor,
        source_tokens: Unpadded,
        causal_mask: Tensor | None,
        positions: nn.Module,
    ) -> Tensor:
        """All positions at once, for training: x [N, D], the real `target_tokens`, and memory
        [M, D], the real `source_tokens` -> [N, D]. Pads of the target need no mask, because they stand on the
        right of everything that counts.

        `causal_mask` None: causal by the kernel's own mask.
        """

        def attend_to_source(h: Tensor) -> Tensor:
            (query,) = self.cross_attention.project(h, target_tokens, 0, 1)
            key, value = self.cross_attention.project(memory, source_tokens, 1, 2)
            return self.cross_attention(
                query, key, value, target_tokens, source_tokens.mask
            )

        x = self.attend_to_self(
            x, target_tokens, positions, causal_mask, is_causal=causal_mask is None
        )
        x = self.residual(x, self.cross_attention_norm, attend_to_source)
        return self.residual(x, self.feed_forward_norm, self.feed_forward)

    def stepper(
        self, index: int, cache: "DecoderCache", positions: nn.Module
    ) -> Callable[[Tensor], Tensor]:
        """This layer, number `index` of the cache, for one more token of every hypothesis: a
        function x [R, D] -> [R, D], in which everything is looked up beforehand.

        Each hypothesis has a past of its own; those of a sentence read its memory together.
        """
        heads, width = self.self_attention.nhead, self.linear1.in_features
        project = self.self_attention.in_proj.route(0, 3 * width)
        project_query = self.cross_attention.in_proj.route(0, width)
        leave_self, leave_cross, widen, narrow = (
            layer.route()
            for layer in (
                self.self_attention.out_proj,
                self.cross_attention.out_proj,
                self.linear1,
                self.linear2,
            )
        )
        norms = (
            self.self_attention_norm,
            self.cross_attention_norm,
            self.feed_forward_norm,
        )
        norm_self, norm_cross, norm_forward = (
            partial(
                torch.layer_norm,
                normalized_shape=norm.normalized_shape,
                weight=norm.weight,
                bias=norm.bias,
                eps=norm.eps,
            )
            for norm in norms
        )
        pre_norm = self.norm_first

        def step(x: Tensor) -> Tensor:
            h = norm_self(x) if pre_norm else x
            rows = x.size(0)
            # [R, 3 * D] -> [R, 3, H, 1, Dh]
            projected = project(h).view(rows, 3, heads, 1, -1)
            query, key, value = projected.unbind(1)  # 3 x [R, H, 1, Dh]
            offset = cache.length
            query, key = positions.rotate(query, offset), positions.rotate(key, offset)
            keys, values = cache.append(index, key, value)  # 2 x [R, H, T, Dh]
            mixed = F.scaled_dot_product_attention(query, keys, values)
            x = x + leave_self(mixed.reshape(rows, width))  # [R, H, 1, Dh] -> [R, D]
            x = x if pre_norm else norm_self(x)

            h = norm_cross(x) if pre_norm else x
            query = project_query(h).view(-1, cache.width, heads, width // heads)
            mixed = attend(
                query.transpose(1, 2), *cache.memory[index], cache.source_mask
            )
            # [B, H, K, Dh] -> [R, D]
            mixed = mixed.transpose(1, 2).reshape(rows, width)
            x = x + leave_cross(mixed)
            x = x if pre_norm else norm_cross(x)

            h = norm_forward(x) if pre_norm else x
            x = x + narrow(widen(h).relu_())
            return x if pre_norm else norm_forward(x)

        return step


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
        # Post-LN layers end normalised; the sum that leaves a pre-LN stack does not.
        final_norm = nn.LayerNorm if config.norm_first else nn.Identity
        self.encoder_norm = final_norm(config.d_model)
        self.decoder_norm = final_norm(config.d_model)
        self.output = Linear(config.d_model, rows, bias=False)
        self.reset_parameters()
        self.tie_embeddings()

    def tie_embeddings(self) -> None:
        """Make output and embedding one parameter, if the configuration says so."""
        if self.config.tie_embeddings:
            self.output.weight = self.embedding.weight
            # The lookup leaves the row of pad alone; the output must as well.
            self.embedding.weight.register_post_accumulate_grad_hook(self._keep_pad)

    def reset_parameters(self) -> None:
        """Glorot-uniform matrices, zero biases, embeddings with deviation 1 / sqrt(D).

        That of pad is zero and stays so: the decoder starts from nothing, as in Marian.
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

    def _keep_pad(self, weight: Tensor) -> None:
        weight.grad[self.config.pad_id] = 0

    def embed(self, ids: Tensor, offset: int = 0) -> Tensor:
        """ids [B, T] at positions `offset` on -> [B, T, D] (section 3.4: scaled by sqrt(D))."""
        scaled = self.embedding(ids) * math.sqrt(self.config.d_model)
        return self.positions.embed(scaled, offset)

    def encode(self, input_ids: Tensor) -> tuple[Tensor, Unpadded]:
        """input_ids [B, S] -> (memory [M, D] of the M tokens among them, where they stand).

        In a row of nothing but pads the first counts as a token, so that no softmax is ever empty.
        """
        # Comparisons and no assignment: this must also export to ONNX for Modlee.
        first = torch.arange(input_ids.size(1), device=input_ids.device) < 1  # [S]
        real = input_ids.ne(self.config.pad_id) | first  # [B, S]
        source = Unpadded(real, keep_pads=torch.onnx.is_in_onnx_export())
        x = self.dropout(source.drop(self.embed(input_ids)))  # [M, D]
        for layer in self.encoder_layers:
            x = layer(x, source, self.positions)
        return self.encoder_norm(x), source

    def decode(
        self,
        decoder_input_ids: Tensor,
        target: Unpadded,
        memory: Tensor,
        source: Unpadded,
    ) -> Tensor:
        """All positions at once, for training: [B, T] -> [N, D] of the tokens of `target`. Causal."""
        x = self.dropout(target.drop(self.embed(decoder_input_ids)))  # [N, D]
        causal_mask = None
        if torch.onnx.is_in_onnx_export():
            # `is_causal` would export as Trilu, which Modlee's converter cannot read.
            steps = torch.arange(decoder_input_ids.size(1), device=x.device)
            causal_mask = ~(steps[None, :] > steps[:, None])  # [T, T]
        for layer in self.decoder_layers:
            x = layer(x, target, memory, source, causal_mask, self.positions)
        return self.decoder_norm(x)

    def decode_step(self, ids: Tensor, cache: "DecoderCache") -> Tensor:
        """The next token of every hypothesis: ids [R] -> logits [R, V]; `cache` grows by it."""
        x = self.embed(ids[:, None], cache.length)[:, 0]  # [R, 1, D] -> [R, D]
        cache.reserve()
        for step in cache.steps:
            x = step(x)
        cache.length += 1
        return cache.project(self.decoder_norm(x))

    def project(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V]. The rows that only fill up the matrix stay out."""
        return self.output(hidden, 0, self.config.vocab_size)

    def loss(
        self, hidden: Tensor, wanted: Tensor, label_smoothing: float = 0.0
    ) -> Tensor:
        """`sequence_loss` of `project(hidden)`, without ever holding all logits, which take
        V / D times the memory of hidden [N, D]. wanted [N] token ids -> summed loss []."""
        return _ProjectedLoss.apply(
            hidden,
            self.output.weight,
            wanted,
            self.config.vocab_size,
            label_smoothing,
            torch.is_grad_enabled(),
        )

    def forward(
        self,
        input_ids,
        decoder_input_ids=None,
        labels=None,
        label_smoothing: float = 0.0,
    ):
        """Logits of the next token at every target position, or with labels the loss.

        Args:
            input_ids: [B, S] int64, padded on the right; or the list [input_ids,
                decoder_input_ids], which is how Modlee calls a model.
            decoder_input_ids: [B, T] int64, the target shifted right (`shift_right`). None: that of
                the labels, or else the start token alone, T = 1.
            labels: [B, T] int64, ending in eos, padded on the right. label_smoothing: see
                `sequence_loss`.

        Returns: [B, T, V], V = vocab_size, float (the autocast dtype where one is active); with
            labels what `sequence_loss` makes of them, in less time and memory.
        """
        if isinstance(input_ids, (list, tuple)):
            input_ids, decoder_input_ids = input_ids
        pad_id = self.config.pad_id
        if decoder_input_ids is None:
            start = torch.full_like(input_ids[:, :1], pad_id)
            decoder_input_ids = start if labels is None else shift_right(labels, pad_id)
        memory, source = self.encode(input_ids)
        if labels is None:
            everything = torch.ones_like(decoder_input_ids, dtype=torch.bool)
            target = Unpadded(everything, keep_pads=True)
            hidden = self.decode(decoder_input_ids, target, memory, source)
            return self.project(hidden).unflatten(0, target.shape)
        real = labels.ne(pad_id)
        target = Unpadded(real)
        hidden = self.decode(decoder_input_ids, target, memory, source)
        wanted = target.drop(labels[..., None])[:, 0]  # [N]
        return self.loss(hidden, wanted, label_smoothing), real.sum()


def count_flops(
    config: Seq2SeqConfig, source_length: int, target_length: int, width: int = 1
) -> int:
    """Floating-point operations of one sentence forward, a multiply-add counted as two.

    The matrix products alone, and only what a causal mask leaves; the same for all target positions
    at once and for cached decoding with `width` hypotheses. Training takes three times as many
    (backward: one product each for inputs and weights).
    """
    size, wide = config.d_model, config.dim_feedforward
    encoder = source_length * (4 * size**2 + 2 * size * wide + 2 * size * source_length)
    memory = source_length * 2 * size**2
    seen = source_length + (target_length + 1) / 2  # keys per target token, on average
    decoder = target_length * (6 * size**2 + 2 * size * wide + 2 * size * seen)
    output = target_length * size * config.vocab_size
    products = (
        config.num_encoder_layers * encoder
        + config.num_decoder_layers * (memory + width * decoder)
        + width * output
    )
    return int(2 * products)


def count_step_weights(config: Seq2SeqConfig) -> int:
    """Elements of the matrices that one decoding step reads: the decoder's, but for the projections
    of the source, and the output's."""
    layer = 6 * config.d_model**2 + 2 * config.d_model * config.dim_feedforward
    return config.num_decoder_layers * layer + config.d_model * config.vocab_size


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


class _ProjectedLoss(torch.autograd.Function):
    """The vocabulary projection and `sequence_loss` in one, a piece of the tokens at a time.

    A piece's gradients are computed while its logits are there, so the logits of all tokens, by far
    the largest tensor of a training step, never exist, and in float32 those of a few rows alone.
    """

    PIECE = 2**26  # logits in the dtype of the products: 128 MiB in bfloat16
    ROWS, ROWS_CPU = 2**24, 2**20  # in float32; 4 MiB are at home in a CPU's cache

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocab_size: int,
        smoothing: float,
        learns: bool,
    ) -> Tensor:
        """hidden [N, D], weight [V and more, D], labels [N] -> summed loss [] float32. learns:
        whether gradients will be wanted, which in here is not known."""
        # In the dtype in which autocast, where it is on, would multiply. Not in float16: these
        # gradients do not know the loss scale that keeps small ones from vanishing.
        dtype = F.linear(hidden[:1], weight[:1]).dtype
        dtype = torch.float32 if dtype == torch.float16 else dtype
        x, w, labels = hidden.to(dtype), weight[:vocab_size].to(dtype), labels[:, None]
        on_cpu = x.device.type == "cpu"
        elements = _ProjectedLoss.ROWS_CPU if on_cpu else _ProjectedLoss.ROWS
        size = min(max(1, _ProjectedLoss.PIECE // vocab_size), max(1, len(x)))
        rows = min(max(1, elements // vocab_size), size)
        # Made once: a CPU takes longer to find new memory than to do the work in it.
        logits = x.new_empty(size, vocab_size)
        work = x.new_empty(rows, vocab_size, dtype=torch.float32)
        losses = x.new_empty(len(x), 1, dtype=torch.float32)
        grad_x = grad_w = grad_before = None
        if learns:
            grad_x = torch.empty_like(x)
            grad_w = torch.empty_like(w) if len(x) else torch.zeros_like(w)
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(x), size):
                piece = slice(start, start + size)
                part = logits[: len(x[piece])]  # [C, V]
                torch.mm(x[piece], w.t(), out=part)
                for few, wanted, loss in zip(
                    part.split(rows),
                    labels[piece].split(rows),
                    losses[piece].split(rows),
                ):
                    _cross_entropy(few, wanted, loss, smoothing, work)
                if learns:  # the logits have become their gradient
                    if start:
                        # Not added as it is: a CPU is slow with two dtypes at once.
                        before = grad_w.to(torch.float32, copy=True)
                        grad_before = before if start == size else grad_before + before
                    torch.mm(part, w, out=grad_x[piece])
                    torch.mm(part.t(), x[piece], out=grad_w)
        ctx.rows = len(weight)
        ctx.save_for_backward(grad_x, grad_w, grad_before)
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        grad_x, grad_w, grad_before = ctx.saved_tensors
        vocab_size = len(grad_w)
        full = grad.new_empty(ctx.rows, grad_w.size(1))
        full[vocab_size:] = 0  # the rows that only fill up the matrix
        full[:vocab_size] = grad_w
        if grad_before is not None:
            full[:vocab_size] += grad_before
        return grad_x * grad, full.mul_(grad), *[None] * 4


def _cross_entropy(
    logits: Tensor, wanted: Tensor, loss: Tensor, smoothing: float, work: Tensor
) -> None:
    """Write the cross-entropy of logits [C, V] with tokens wanted [C, 1] into `loss` [C, 1], and its
    gradient over the logits. work: [C or more, V] float32, overwritten."""
    vocab_size = logits.size(1)
    log_probs = work[: len(logits)]
    torch.log_softmax(logits, dim=-1, dtype=torch.float32, out=log_probs)
    torch.mul(log_probs.gather(1, wanted), smoothing - 1, out=loss)
    if smoothing:
        loss -= log_probs.mean(dim=1, keepdim=True) * smoothing
    gradient = log_probs.exp_()
    if smoothing:
        gradient -= smoothing / vocab_size
    gradient.scatter_add_(1, wanted, torch.full_like(loss, smoothing - 1))
    logits.copy_(gradient)


# ---- decoding ---------------------------------------------------------------------------------


class DecoderCache:
    """What the decoder keeps between steps, for B sentences of K hypotheses each, R = B * K rows.

    Attributes:
        memory: per layer, keys and values of the source, computed once: 2 x [B, H, S, Dh].
        source_mask: [B, 1, 1, S] float, what to add to attention scores; None without pads.
        width: K. length: tokens decoded so far, T.
        steps, project: the layers, in order, and the output as functions of the newest token.

    The hypotheses' own keys and values are written in place, at position T of a buffer
    [L, 2, R, H, capacity, Dh] for L layers. Capacity doubles when it is used up.
    """

    def __init__(
        self, model: TransformerSeq2SeqModel, input_ids: Tensor, width: int = 1
    ):
        """Encode input_ids [B, S]."""
        self.width, self.length = width, 0
        layers, config = model.decoder_layers, model.config
        heads, head_dim = config.nhead, config.d_model // config.nhead
        dtype = model.embedding.weight.dtype
        memory, source = model.encode(input_ids)
        projected = [
            torch.stack(layer.cross_attention.project(memory, source, 1, 2))
            for layer in layers
        ]
        self._memory = torch.stack(projected).to(dtype)  # [L, 2, B, H, S, Dh]
        self.source_mask = None
        if source.mask is not None:
            self.source_mask = torch.zeros_like(source.mask, dtype=dtype)
            self.source_mask.masked_fill_(~source.mask, -torch.inf)
        shape = (len(layers), 2, len(input_ids) * width, heads, 16, head_dim)
        self._past = self._memory.new_empty(shape)
        self.memory = [layer.unbind() for layer in self._memory]
        self.steps = [
            layer.stepper(index, self, model.positions)
            for index, layer in enumerate(layers)
        ]
        self.project = model.output.route(0, config.vocab_size)

    def reserve(self) -> None:
        """Make room for one more token, at the end of all keys and values so far."""
        length = self.length
        if length == self._past.size(4):
            self._past = torch.cat([self._past, torch.empty_like(self._past)], dim=4)
        past = self._past.flatten(0, 1)  # [2L, R, H, capacity, Dh]
        self._newest = past.narrow(3, length, 1).unbind()  # 2L x [R, H, 1, Dh]
        self._so_far = past.narrow(3, 0, length + 1).unbind()  # 2L x [R, H, T + 1, Dh]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep key and value [R, H, 1, Dh] of the newest token; all so far: 2 x [R, H, T + 1, Dh]."""
        keys, values = 2 * layer, 2 * layer + 1
        self._newest[keys].copy_(key)
        self._newest[values].copy_(value)
        return self._so_far[keys], self._so_far[values]

    def copy(self, source: list[int], destination: list[int]) -> None:
        """Row `destination[i]` goes on from the past of row `source[i]`. No row may be both."""
        past = self._past[..., : self.length, :]
        past[:, :, destination] = past[:, :, source]

    def drop(self, finished: list[bool]) -> list[int]:
        """Finished sentences, B flags, leave the batch. The last ones move into their places, so
        that nothing else is copied.

        Returns: which sentence stands where now.
        """
        count = finished.count(False)
        order = list(range(count))
        holes = [row for row in order if finished[row]]
        movers = [row for row in range(count, len(finished)) if not finished[row]]
        for hole, mover in zip(holes, movers):  # as many of either
            order[hole] = mover
        sentences = self._past.unflatten(2, (-1, self.width))  # [L, 2, B, K, ...]
        if holes:
            self._memory[:, :, holes] = self._memory[:, :, movers]
            past = sentences[..., : self.length, :]
            past[:, :, holes] = past[:, :, movers]
            if self.source_mask is not None:
                self.source_mask[holes] = self.source_mask[movers]
        self._memory = self._memory[:, :, :count]
        self._past = sentences[:, :, :count].flatten(2, 3)
        if self.source_mask is not None:
            self.source_mask = self.source_mask[:count]
        self.memory = [layer.unbind() for layer in self._memory]
        return order


def _limits(
    model: TransformerSeq2SeqModel, input_ids: Tensor, max_new_tokens: int | None
) -> list[int]:
    """How many tokens each row may write."""
    config = model.config
    if not input_ids.numel():
        raise ValueError(f"nothing to decode: input_ids is {list(input_ids.shape)}")
    if max_new_tokens is None:
        lengths = input_ids.ne(config.pad_id).sum(dim=1).tolist()
        limits = [2 * length + 10 for length in lengths]
    elif max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    else:
        limits = [max_new_tokens] * len(input_ids)
    if config.positional == "learned":
        limits = [min(limit, config.max_length) for limit in limits]
    return limits


@contextlib.contextmanager
def _decoding(model: TransformerSeq2SeqModel) -> Iterator[None]:
    """Eval mode without gradients on the fast routes, and the former state afterwards."""
    modules, threads = list(model.modules()), torch.get_num_threads()
    training = [module for module in modules if module.training]
    layers = [module for module in modules if isinstance(module, Linear)]
    for module in training:
        module.training = False
    try:
        # Autocast knows nothing of oneDNN's own products.
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            for layer in layers:
                layer.prepare()
            yield
    finally:
        torch.set_num_threads(threads)
        for layer in layers:
            layer.release()
        for module in training:
            module.training = True


def _choose_threads(model: TransformerSeq2SeqModel, rows: int, threads: int) -> None:
    """One CPU thread for small steps, which are done before a second one has woken up."""
    weights = count_step_weights(model.config)
    is_small = weights < 2**22 and rows * weights < 2**24
    torch.set_num_threads(1 if is_small else threads)


def _start(
    model: TransformerSeq2SeqModel, input_ids: Tensor, width: int
) -> DecoderCache:
    """Encode input_ids [B, S] and make ready for steps of B * width rows; inside `_decoding`."""
    if input_ids.device.type != "cpu":
        return DecoderCache(model, input_ids, width)
    threads = torch.get_num_threads()
    tokens = int(input_ids.ne(model.config.pad_id).sum())
    _choose_threads(model, tokens, threads)
    cache = DecoderCache(model, input_ids, width)
    _choose_threads(model, width * len(input_ids), threads)
    return cache


def _decode_rows(
    model: TransformerSeq2SeqModel,
    input_ids: Tensor,
    limits: list[int],
    choose: Callable[[Tensor, Tensor, int], Tensor],
) -> Tensor:
    """One hypothesis per sentence, of at most `limits` tokens. `choose` (logits [B', V], which
    sentences [B'], step) picks the next tokens [B'] of those still running.

    Returns: [B, T] int64.
    """
    config = model.config
    output = input_ids.new_full((len(input_ids), max(limits)), config.pad_id)
    rows = torch.arange(len(input_ids), device=input_ids.device)  # still running
    next_ids = torch.full_like(rows, config.pad_id)  # the start token
    written: list[Tensor] = []  # tokens of `rows` that are not in `output` yet
    with _decoding(model):
        cache = _start(model, input_ids, width=1)
        while limits:
            logits = model.decode_step(next_ids, cache)  # [B', V]
            # The start token is no translation.
            logits.select(1, config.pad_id).fill_(-torch.inf)
            next_ids = choose(logits, rows, cache.length - 1)
            written.append(next_ids)
            chosen = next_ids.tolist()
            length = cache.length
            if config.eos_id in chosen or length in limits:
                output[rows, length - len(written) : length] = torch.stack(written, 1)
                written = []
                finished = [
                    token == config.eos_id or length >= limit
                    for token, limit in zip(chosen, limits)
                ]
                order = cache.drop(finished)
                limits = [limits[row] for row in order]
                order = torch.tensor(order, dtype=torch.int64, device=rows.device)
                rows, next_ids = rows[order], next_ids[order]
    return output[:, : cache.length]


def greedy_decode(
    model: TransformerSeq2SeqModel, input_ids: Tensor, max_new_tokens: int | None = None
) -> Tensor:
    """The likeliest token at every step, until every row has written eos.

    Finished rows leave the batch. Puts the model into eval mode for the call and back afterwards.

    Args:
        input_ids: [B, S] int64, padded on the right.
        max_new_tokens: where a sentence that does not end is cut; default twice its source
            plus 10, row by row, so that a row does not depend on its neighbours. Never past
            the table of learned positions.

    Returns: [B, T] int64; pads follow the eos of a row.
    """

    def likeliest(logits: Tensor, rows: Tensor, step: int) -> Tensor:
        return logits.max(dim=-1).indices  # argmax, which takes twice as long on a CPU

    limits = _limits(model, input_ids, max_new_tokens)
    return _decode_rows(model, input_ids, limits, likeliest)


def sample_decode(
    model: TransformerSeq2SeqModel,
    input_ids: Tensor,
    seeds: list[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int | None = None,
) -> Tensor:
    """Tokens drawn from the model's distribution, sharpened and cut off (Holtzman et al. 2020).

    Args:
        input_ids, max_new_tokens: as in `greedy_decode`.
        seeds: one per row. A row is a function of its seed, whatever else is in the batch.
        temperature: logits are divided by it; towards 0 this becomes greedy.
        top_p: draw from the smallest set of tokens that holds this share of the probability.

    Returns: [B, T] int64, as `greedy_decode`. Raises ValueError for values out of range.
    """
    if not (0 < temperature < math.inf and 0 < top_p <= 1):
        raise ValueError(
            f"need temperature > 0 and 0 < top_p <= 1, got {temperature} and {top_p}"
        )
    if len(seeds) != len(input_ids):
        raise ValueError(f"{len(seeds)} seeds for {len(input_ids)} sentences")
    limits = _limits(model, input_ids, max_new_tokens)
    steps = max(limits)
    draws = torch.stack(
        [torch.rand(steps, generator=torch.Generator().manual_seed(s)) for s in seeds]
    ).to(input_ids.device)  # [B, T]

    def draw(logits: Tensor, rows: Tensor, step: int) -> Tensor:
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
    score: float | None  # sum of log_probs / number of tokens ** length_penalty


_NOWHERE = (0, 0.0, -math.inf, None)  # where no hypothesis runs


class _Beam:
    """The search for one sentence.

    A running hypothesis is a chain (token, log-probability, sum, previous link), so that branches
    share their past. Its place in `chains` is its row in the cache; None: nothing runs there.
    """

    def __init__(self, width: int, length_penalty: float, limit: int, start_id: int):
        self.width, self.length_penalty, self.limit = width, length_penalty, limit
        start = (start_id, 0.0, 0.0, None)
        self.chains: list[tuple | None] = [start] + [None] * (width - 1)
        self.ended: list[tuple[float, tuple]] = []  # (score, chain), best first
        self.finished = False

    def advance(self, candidates: list[tuple], length: int, eos_id: int) -> list[tuple]:
        """Take the best continuations, (sum, log-probability, place, token) in falling order,
        of which there are twice the width: so many may end at once. They are `length` long.

        Returns: (from, to) for every place that goes on from another place's past.
        """
        running = []
        for rank, (total, log_prob, place, token) in enumerate(candidates):
            if total == -math.inf or len(running) == self.width:
                break
            chain = (token, log_prob, total, self.chains[place])
            if token != eos_id:
                running.append((place, chain))
            elif rank < self.width:
                self._end(chain, length)
        if length == self.limit:
            for _, chain in running:
                self._end(chain, length)
        # Were the best continuation to end now, could it still get onto the list?
        full = len(self.ended) == self.width
        hopeless = (
            full and self.ended[-1][0] >= candidates[0][0] / length**self.length_penalty
        )
        self.finished = length == self.limit or hopeless or not running
        # The first heir of a place stays there; only further ones are moved, into empty places.
        self.chains, moves, later = [None] * self.width, [], []
        for place, chain in running:
            if self.chains[place] is None:
                self.chains[place] = chain
            else:
                later.append((place, chain))
        empty = [place for place in range(self.width) if self.chains[place] is None]
        for (place, chain), target in zip(later, empty):
            self.chains[target] = chain
            moves.append((place, target))
        return moves

    def _end(self, chain: tuple, length: int) -> None:
        self.ended.append((chain[2] / length**self.length_penalty, chain))
        self.ended.sort(key=lambda pair: -pair[0])
        del self.ended[self.width :]

    def hypotheses(self, count: int) -> list[Hypothesis]:
        found = []
        for score, chain in self.ended[:count]:
            tokens, log_probs = [], []
            while chain[3] is not None:
                token, log_prob, _, chain = chain
                tokens.append(token)
                log_probs.append(log_prob)
            found.append(Hypothesis(tokens[::-1], log_probs[::-1], score))
        return found


def beam_search(
    model: TransformerSeq2SeqModel,
    input_ids: Tensor,
    beam_size: int = 4,
    length_penalty: float = 1.0,
    num_return: int = 1,
    max_new_tokens: int | None = None,
) -> list[list[Hypothesis]]:
    """The best translations found by keeping `beam_size` hypotheses at every step.

    A hypothesis that ends is put on a list of the `beam_size` best; a sentence is finished, and
    leaves the batch, when no running hypothesis would get onto it. Agrees with `generate` of
    transformers (early_stopping=False). `beam_size` 1 is greedy decoding.

    Args:
        input_ids: [B, S] int64, padded on the right.
        length_penalty: exponent a in score = sum of log-probabilities / length^a. 0: the plain sum,
            which prefers short translations; 1: the mean.
        num_return: hypotheses per sentence, at most `beam_size`.
        max_new_tokens: as in `greedy_decode`; what still runs there is taken as it is.

    Returns: for every sentence its hypotheses, best first. Raises ValueError for sizes below 1.
    """
    if beam_size < 1 or not 1 <= num_return <= beam_size:
        raise ValueError(
            f"need 1 <= num_return <= beam_size, got {num_return} and {beam_size}"
        )
    if not -10 <= length_penalty <= 10:
        raise ValueError(f"length_penalty must be in [-10, 10], got {length_penalty}")
    config = model.config
    limits = _limits(model, input_ids, max_new_tokens)
    beams = [_Beam(beam_size, length_penalty, limit, config.pad_id) for limit in limits]
    running = list(beams)
    device, spare = input_ids.device, min(2 * beam_size + 1, config.vocab_size)
    with _decoding(model):
        cache = _start(model, input_ids, beam_size)
        while running:
            chains = [chain or _NOWHERE for beam in running for chain in beam.chains]
            ids, _, sums, _ = zip(*chains)
            sums = torch.tensor(sums, device=device)  # [R]
            logits = model.decode_step(torch.tensor(ids, device=device), cache).float()
            # The best of all continuations are among the best of each hypothesis.
            log_probs = logits.log_softmax(dim=-1)  # [R, V]
            best, tokens = log_probs.topk(spare, dim=-1)  # [R, 2K + 1]
            best.masked_fill_(tokens == config.pad_id, -torch.inf)
            shape = (len(running), -1)  # [R, 2K + 1] -> [B, K * (2K + 1)]
            totals = (best + sums[:, None]).view(shape)
            totals, order = totals.topk(min(2 * beam_size, totals.size(1)), dim=-1)
            best = best.view(shape).gather(1, order)
            tokens = tokens.view(shape).gather(1, order)
            # To Python, where a sentence is a small affair: two transfers a step.
            numbers = torch.stack([totals, best]).tolist()
            places = torch.stack([order // spare, tokens]).tolist()
            source, destination = [], []
            for row, beam in enumerate(running):
                columns = (column[row] for column in (*numbers, *places))
                moves = beam.advance(list(zip(*columns)), cache.length, config.eos_id)
                for place, target in moves:
                    source.append(row * beam_size + place)
                    destination.append(row * beam_size + target)
            if source:
                cache.copy(source, destination)
            finished = [beam.finished for beam in running]
            if any(finished):
                running = [running[row] for row in cache.drop(finished)]
    return [beam.hypotheses(num_return) for beam in beams]


# ---- looking inside ---------------------------------------------------------------------------


def cross_attention_weights(
    model: TransformerSeq2SeqModel, input_ids: Tensor, labels: Tensor
) -> Tensor:
    """Where each target position looks in the source, while the model reads `labels`.

    input_ids [B, S], labels [B, T] int64 -> [L, B, H, T, S], rows that sum to 1; position t is the
    one that writes labels[:, t].
    """
    found = []

    def keep(module: Attention, inputs: tuple) -> None:
        query, key, _, _, mask = inputs
        scores = (query @ key.mT) * key.size(-1) ** -0.5  # [B, H, T, S]
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        found.append(scores.softmax(dim=-1))

    hooks = [
        layer.cross_attention.register_forward_pre_hook(keep)
        for layer in model.decoder_layers
    ]
    try:
        with _decoding(model):
            model(input_ids, shift_right(labels, model.config.pad_id))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)
