"""Positional information for a Transformer: sinusoidal, learned, rotary, none.

Copy this file next to `seq2seq.py` (or use it alone): it needs torch and nothing else.

Every kind is a module with the same two hooks, and each hook is the identity where a kind has no
use for it. Both take the position of the first token (`offset`), which is what lets a decoder with
a key/value cache hand in one token at a time:

    embed(x, offset)    added to token embeddings     x [B, T, D]     -> [B, T, D]
    rotate(x, offset)   applied to queries and keys   x [B, H, T, Dh] -> [B, H, T, Dh]

`POSITIONAL_KINDS` maps the name of a kind to its class. Computed tables are buffers, never
Parameters: they follow from their shape, must not be trained, and grow with longer sequences.
"""

import torch
from torch import Tensor, nn


def sinusoidal_positional_encoding(max_length: int, d_model: int) -> Tensor:
    """The fixed table of *Attention Is All You Need* (Vaswani et al. 2017, section 3.5).

        table[pos, 2i]     = sin(pos / 10000^(2i / d_model))
        table[pos, 2i + 1] = cos(pos / 10000^(2i / d_model))

    An odd `d_model` ends on a sine. Computed in float64, since float32 angles lose digits at
    late positions.

    Returns: [max_length, d_model] float32. Raises ValueError for a size below 1.
    """
    if max_length < 1 or d_model < 1:
        raise ValueError(
            f"need max_length >= 1 and d_model >= 1, got {max_length} and {d_model}"
        )
    table = torch.empty(max_length, d_model, dtype=torch.float64)
    angles = _angles(max_length, d_model)  # [max_length, ceil(d_model / 2)]
    table[:, 0::2] = angles.sin()
    table[:, 1::2] = angles[:, : d_model // 2].cos()
    return table.float()


def _angles(max_length: int, width: int) -> Tensor:
    """pos / 10000^(2i / width) as [max_length, ceil(width / 2)] float64."""
    positions = torch.arange(max_length, dtype=torch.float64)
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    return positions[:, None] / 10000.0 ** exponents[None, :]


class NoPositionalEncoding(nn.Module):
    """No positions at all, and the interface that the other kinds fill in.

    Without positions an encoder reads a bag of words; the decoder still knows order, from its
    causal mask.

    Args: max_length: positions to prepare for. d_model: width D. head_dim: width Dh of one head.
    """

    def __init__(self, max_length: int, d_model: int, head_dim: int):
        super().__init__()

    def embed(self, x: Tensor, offset: int = 0) -> Tensor:
        """x [B, T, D] at positions offset .. offset + T - 1 -> [B, T, D]."""
        return x

    def rotate(self, x: Tensor, offset: int = 0) -> Tensor:
        """Queries or keys x [B, H, T, Dh] at positions offset .. offset + T - 1 -> same shape."""
        return x


class _TablePositionalEncoding(NoPositionalEncoding):
    """A kind whose table is computed, not trained. Subclasses say how in `make_table`."""

    def __init__(self, max_length: int, d_model: int, head_dim: int):
        super().__init__(max_length, d_model, head_dim)
        # Persistent although it could be recomputed: exporters that drop weights (Modlee's graph
        # export) write a persistent buffer as a name, any other one number by number.
        self.register_buffer("table", self.make_table(max_length, d_model, head_dim))
        self.max_length, self.d_model, self.head_dim = max_length, d_model, head_dim

    def make_table(self, max_length: int, d_model: int, head_dim: int) -> Tensor:
        raise NotImplementedError

    def rows(self, offset: int, length: int) -> Tensor:
        """Rows offset .. offset + length - 1 of the table, which grows to hold them."""
        if offset + length > self.table.size(0):
            # A table born inside inference_mode could not be used in training afterwards.
            with torch.inference_mode(False):
                longer = max(offset + length, 2 * self.table.size(0))
                self.table = self.make_table(longer, self.d_model, self.head_dim).to(
                    self.table
                )
        return self.table[offset : offset + length]

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        # As long as it was born: what is saved must not depend on the longest sentence ever seen.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.table.size(0) > self.max_length:
            destination[prefix + "table"] = self.table[: self.max_length].clone()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # The table follows from its shape, so a checkpoint never overrules it: one of a model
        # with another `max_length` loads too.
        if self.table.is_meta:  # built without storage, to take over loaded weights
            rows, device = len(self.table), state_dict[prefix + "table"].device
            table = self.make_table(rows, self.d_model, self.head_dim).to(device)
            self.table = table
        state_dict[prefix + "table"] = self.table
        super()._load_from_state_dict(state_dict, prefix, *args)


class SinusoidalPositionalEncoding(_TablePositionalEncoding):
    """Adds `sinusoidal_positional_encoding`; defined for every length."""

    def make_table(self, max_length: int, d_model: int, head_dim: int) -> Tensor:
        return sinusoidal_positional_encoding(max_length, d_model)

    def embed(self, x: Tensor, offset: int = 0) -> Tensor:
        return x + self.rows(offset, x.size(1)).to(x.dtype)


class RotaryPositionalEncoding(_TablePositionalEncoding):
    """Rotates queries and keys, so that their product sees relative positions only.

    RoFormer (Su et al. 2021, section 3.2.2). Channel i is paired with channel i + Dh / 2, the
    layout of GPT-NeoX and Llama. Real-valued, because complex numbers do not export to ONNX.
    Defined for every length. Raises ValueError where `head_dim` is odd.
    """

    def make_table(self, max_length: int, d_model: int, head_dim: int) -> Tensor:
        if head_dim % 2:
            raise ValueError(
                f"rotary positions need an even head width, got {head_dim}"
            )
        angles = _angles(max_length, head_dim)  # [max_length, Dh / 2]
        table = torch.cat([angles.cos(), angles.sin()], dim=1)  # [max_length, Dh]
        return table.float()

    def rotate(self, x: Tensor, offset: int = 0) -> Tensor:
        cos, sin = self.rows(offset, x.size(2)).chunk(2, dim=1)  # 2 x [T, Dh / 2]
        first, second = x.chunk(2, dim=-1)  # 2 x [B, H, T, Dh / 2]
        halves = [first * cos - second * sin, second * cos + first * sin]
        # The table's float32 has decided the precision until here.
        return torch.cat(halves, dim=-1).to(x.dtype)


class LearnedPositionalEncoding(NoPositionalEncoding):
    """Adds one trained vector per position (BERT, GPT-2). Ends at `max_length`: ValueError past it."""

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
