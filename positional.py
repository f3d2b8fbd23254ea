"""Positional information for a Transformer: sinusoidal, learned, rotary, none.

Copy this file next to `seq2seq.py`, or use it alone: it needs torch and nothing else.

Every kind is a module with the same two methods. A method that a kind does not need returns its
input. Both take the position of the first token (`offset`), so that a decoder with a key/value
cache can pass one token at a time:

    embed(x, offset)    added to token embeddings     x [B, T, D]     -> [B, T, D]
    rotate(x, offset)   applied to queries and keys   x [..., T, Dh]  -> [..., T, Dh]

`POSITIONAL_KINDS` maps the name of a kind to its class. Computed tables are non-persistent buffers:
not trained, not saved, and extended for longer sequences.
"""

import torch
from torch import Tensor, nn


def sinusoidal_positional_encoding(max_length: int, d_model: int) -> Tensor:
    """The fixed table of *Attention Is All You Need* (Vaswani et al. 2017, section 3.5).

        table[pos, 2i]     = sin(pos / 10000^(2i / d_model))
        table[pos, 2i + 1] = cos(pos / 10000^(2i / d_model))

    With an odd `d_model` the last column is a sine. Computed in float64, because float32 angles
    lose digits at late positions.

    Returns: [max_length, d_model] float32. Raises ValueError for a size below 1.
    """
    if max_length < 1 or d_model < 1:
        raise ValueError(f"need max_length >= 1 and d_model >= 1, got {max_length} and {d_model}")
    angles = _angles(max_length, d_model)  # [max_length, ceil(d_model / 2)]
    table = torch.empty(max_length, d_model, dtype=torch.float64)
    table[:, 0::2] = angles.sin()
    table[:, 1::2] = angles[:, : d_model // 2].cos()
    return table.float()


def _angles(max_length: int, width: int) -> Tensor:
    """pos / 10000^(2i / width) as [max_length, ceil(width / 2)] float64."""
    positions = torch.arange(max_length, dtype=torch.float64)
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    return positions[:, None] / 10000.0 ** exponents[None, :]


class NoPositionalEncoding(nn.Module):
    """No positional information. Also the base class of the other kinds.

    An encoder without positions reads a bag of words. The decoder still sees the order, through its
    causal mask.

    Args: max_length: size of the position table. d_model: width D. head_dim: width Dh of one head.
    """

    def __init__(self, max_length: int, d_model: int, head_dim: int):
        super().__init__()

    def embed(self, x: Tensor, offset: int = 0) -> Tensor:
        """x [B, T, D] at positions offset .. offset + T - 1 -> [B, T, D]."""
        return x

    def rotate(self, x: Tensor, offset: int = 0) -> Tensor:
        """Queries or keys x [..., T, Dh] at positions offset .. offset + T - 1 -> same shape."""
        return x


class _TablePositionalEncoding(NoPositionalEncoding):
    """Base of the kinds with a computed table. Subclasses implement `make_table`."""

    def __init__(self, max_length: int, d_model: int, head_dim: int):
        super().__init__(max_length, d_model, head_dim)
        self.d_model, self.head_dim = d_model, head_dim
        self.register_buffer("table", self.make_table(max_length), persistent=False)

    def make_table(self, length: int) -> Tensor:
        """[length, D or Dh] float32."""
        raise NotImplementedError

    def rows(self, x: Tensor, offset: int) -> Tensor:
        """The rows of the table for x [..., T, C] at positions offset .. offset + T - 1."""
        end, length = offset + x.size(-2), len(self.table)
        # The device differs if the model was built on "meta" and got its weights by
        # `load_state_dict(weights, assign=True)`. `to_empty` would leave the table uninitialised.
        if end > length or self.table.device != x.device:
            longer = length if end <= length else max(end, 2 * length)
            # A table made in inference mode could not be used in training afterwards.
            with torch.inference_mode(False):
                self.table = self.make_table(longer).to(x.device, self.table.dtype)
        return self.table[offset:end]


class SinusoidalPositionalEncoding(_TablePositionalEncoding):
    """Adds `sinusoidal_positional_encoding`; defined for every length."""

    def make_table(self, length: int) -> Tensor:
        return sinusoidal_positional_encoding(length, self.d_model)

    def embed(self, x: Tensor, offset: int = 0) -> Tensor:
        return x + self.rows(x, offset).to(x.dtype)


class RotaryPositionalEncoding(_TablePositionalEncoding):
    """Rotates queries and keys, so that their product depends on relative positions only.

    RoFormer (Su et al. 2021, section 3.2.2). Channel i is paired with channel i + Dh / 2, the
    layout of GPT-NeoX and Llama. Real-valued, because complex numbers do not export to ONNX.
    Defined for every length. Raises ValueError for an odd `head_dim`.
    """

    def make_table(self, length: int) -> Tensor:
        if self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, got {self.head_dim}")
        angles = _angles(length, self.head_dim)  # [length, Dh / 2]
        return torch.cat([angles.cos(), angles.sin()], dim=1).float()  # [length, Dh]

    def rotate(self, x: Tensor, offset: int = 0) -> Tensor:
        cos, sin = self.rows(x, offset).chunk(2, dim=1)  # 2 x [T, Dh / 2]
        first, second = x.chunk(2, dim=-1)  # 2 x [..., T, Dh / 2]
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return rotated.to(x.dtype)  # under autocast 16-bit inputs are rotated in float32


class LearnedPositionalEncoding(NoPositionalEncoding):
    """Adds one trained vector per position (BERT, GPT-2). ValueError past `max_length`."""

    def __init__(self, max_length: int, d_model: int, head_dim: int):
        super().__init__(max_length, d_model, head_dim)
        self.embedding = nn.Embedding(max_length, d_model)

    def embed(self, x: Tensor, offset: int = 0) -> Tensor:
        end, limit = offset + x.size(1), self.embedding.num_embeddings
        if end > limit:
            raise ValueError(
                f"a sequence of {end} tokens is longer than the {limit} learned positions; "
                "use shorter input, a larger max_length, or sinusoidal or rotary positions"
            )
        return x + self.embedding.weight[offset:end].to(x.dtype)


POSITIONAL_KINDS: dict[str, type[NoPositionalEncoding]] = {
    "sinusoidal": SinusoidalPositionalEncoding,
    "learned": LearnedPositionalEncoding,
    "rotary": RotaryPositionalEncoding,
    "none": NoPositionalEncoding,
}
