"""The proofs: statements about the model, the data, the loops and the commands.

    python -m pytest              offline, on the CPU, in a few minutes; no file is needed

Tests that need Modlee are skipped where it is not installed.
"""

import argparse
import contextlib
import csv
import dataclasses
import http.server
import inspect
import io
import itertools
import json
import logging
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings

import data
import run
import seq2seq
from data import InputError
from positional import POSITIONAL_KINDS, sinusoidal_positional_encoding
from seq2seq import (
    Attention,
    Dropout,
    Hypothesis,
    KeyValueCache,
    TransformerSeq2SeqModel,
    _Beam,
    _ProjectedLoss,
    beam_search,
    count_flops,
    cross_attention_weights,
    greedy_decode,
    sample_decode,
    sequence_loss,
    shift_right,
)

HERE = Path(__file__).parent
KINDS = list(POSITIONAL_KINDS)
ROMANIAN = "aăâbcdefghiîjklmnopqrsștțuvwxyzAĂÂBCDEFGHIÎJKLMNOPQRSȘTȚUVWXYZ„”«»–"
# The long versions of some tests: these many, where the environment says so.
EXAMPLES = int(os.environ.get("EXAMPLES", "0"))  # of hostile data, new ones every time
KILLS = int(os.environ.get("KILLS", "3"))
STEPS = int(os.environ.get("STEPS", "400"))
LINES = int(os.environ.get("LINES", "500"))
HAS_MODLEE = run.versions()["modlee"] is not None
needs_modlee = pytest.mark.skipif(not HAS_MODLEE, reason="Modlee is not installed")


def tiny_model(seed: int = 0, **changes) -> TransformerSeq2SeqModel:
    sizes = {"vocab_size": 50, "d_model": 32, "nhead": 4, "num_encoder_layers": 2}
    sizes |= {"num_decoder_layers": 2, "max_length": 40, "dim_feedforward": 64}
    torch.manual_seed(seed)
    return TransformerSeq2SeqModel(**(sizes | changes))


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Sentences without pads: [rows, length], the last token eos."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 50, (rows, length), generator=generator)
    ids[:, -1] = 1
    return ids


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(a, b, atol=tolerance, rtol=0)


# ---- positions --------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 7, 16, 33])
def test_sinusoidal_table_is_the_formula(width):
    table = sinusoidal_positional_encoding(300, width)
    assert table.dtype == torch.float32 and table.shape == (300, width)
    for position in (0, 1, 17, 299):
        for channel in range(width):
            angle = position / 10000 ** (2 * (channel // 2) / width)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert abs(table[position, channel].item() - expected) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [0, 1, 9, 30])
def test_an_offset_continues_the_sequence(kind, offset):
    positions = POSITIONAL_KINDS[kind](40, 16, 4)
    x, heads = torch.randn(2, 40, 16), torch.randn(2, 4, 40, 4)
    part = positions.embed(x[:, offset:], offset)
    assert close(part, positions.embed(x)[:, offset:])
    part = positions.rotate(heads[:, :, offset:], offset)
    assert close(part, positions.rotate(heads)[:, :, offset:])


@pytest.mark.parametrize("kind", ["sinusoidal", "rotary"])
def test_tables_grow_and_are_no_parameters(kind):
    short, long = (POSITIONAL_KINDS[kind](length, 16, 4) for length in (4, 64))
    assert not list(short.parameters())
    x, heads = torch.randn(1, 50, 16), torch.randn(1, 4, 50, 4)
    with torch.inference_mode():
        assert torch.equal(short.embed(x), long.embed(x))
        assert torch.equal(short.rotate(heads), long.rotate(heads))
    heads.requires_grad_()
    short.rotate(heads).sum().backward()  # grown under inference_mode, used in training
    assert short.table.size(0) >= 50 and not short.state_dict(), "computed, not saved"
    meta = POSITIONAL_KINDS[kind](4, 16, 4).to("meta")  # to load weights into
    assert torch.equal(meta.embed(x), long.embed(x))
    assert torch.equal(meta.rotate(heads), long.rotate(heads))


def test_rotary_scores_depend_on_relative_position_alone():
    rotary = POSITIONAL_KINDS["rotary"](64, 16, 8)
    query, key = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)

    def scores(offset: int) -> torch.Tensor:
        return rotary.rotate(query, offset) @ rotary.rotate(key, offset).mT

    assert close(scores(0), scores(23))
    assert not close(scores(0), rotary.rotate(query, 3) @ rotary.rotate(key, 0).mT, 1e-2)


def test_positional_limits_are_clear():
    with pytest.raises(ValueError, match="41 tokens is longer than the 40 learned"):
        tiny_model(positional="learned").encode(random_ids(1, 41))
    with pytest.raises(ValueError, match="even head width"):
        tiny_model(positional="rotary", d_model=36, nhead=4)
    with pytest.raises(ValueError, match="max_length >= 1"):
        sinusoidal_positional_encoding(0, 8)


# ---- model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_future_token_cannot_change_the_past(kind, norm_first):
    model = tiny_model(positional=kind, norm_first=norm_first).eval()
    source, target = random_ids(3, 9), random_ids(3, 12, seed=1)
    before = model(source, target)
    for position in range(1, 12):
        changed = target.clone()
        changed[:, position] = (changed[:, position] + 1) % 50
        after = model(source, changed)
        assert torch.equal(before[:, :position], after[:, :position])
        assert not close(before[:, position:], after[:, position:], 1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_first", [True, False])
def test_padding_cannot_change_a_sentence(kind, norm_first):
    model = tiny_model(positional=kind, norm_first=norm_first).eval()
    source, target = random_ids(1, 6), random_ids(1, 5, seed=1)
    alone = model(source, target)
    padded_source = torch.zeros(2, 13, dtype=torch.long)
    padded_source[0, :6], padded_source[1] = source[0], random_ids(1, 13, seed=2)[0]
    padded_target = torch.zeros(2, 9, dtype=torch.long)
    padded_target[0, :5], padded_target[1] = target[0], random_ids(1, 9, seed=3)[0]
    together = model(padded_source, padded_target)
    assert close(together[0, :5], alone[0])
    assert torch.isfinite(model(torch.zeros_like(source), target)).all()


def test_forward_takes_what_the_tutorial_and_modlee_hand_in():
    model = tiny_model().eval()
    source, target = random_ids(2, 6), random_ids(2, 5)
    logits = model(source, target)
    assert logits.shape == (2, 5, 50) and logits.is_contiguous()
    assert torch.equal(model([source, target]), logits)
    first = model(source, torch.zeros(2, 1, dtype=torch.long))
    assert torch.equal(model(source), first)


def test_embeddings_are_scaled_by_the_root_of_the_width():
    model, ids = tiny_model(positional="none").eval(), random_ids(2, 5)
    assert torch.equal(model.embed(ids), model.embedding(ids) * math.sqrt(32))


def test_decoding_never_writes_the_start_token():
    model = tiny_model()
    torch.nn.init.zeros_(model.embedding.weight)  # all logits alike: argmax would take pad
    assert (greedy_decode(model, random_ids(2, 5), max_new_tokens=4) != 0).any()
    with pytest.raises(ValueError, match="at least 1"):
        greedy_decode(model, random_ids(2, 5), max_new_tokens=0)


def test_embedding_rows_are_rounded_up_and_tied():
    tied, untied = tiny_model(), tiny_model(tie_embeddings=False)
    assert tied.embedding.weight.shape == (64, 32)
    assert tied.output.weight is tied.embedding.weight
    extra = sum(p.numel() for p in untied.parameters()) - 64 * 32
    assert extra == sum(p.numel() for p in tied.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nhead": 5}, "nhead=5 does not divide d_model=32"),
        ({"positional": "absolute"}, "sinusoidal, learned, rotary, none"),
        ({"dropout": 1.0}, "dropout"),
        ({"num_decoder_layers": 0}, "num_decoder_layers must be at least 1"),
        ({"eos_id": 0}, "no sentence could end"),
        ({"pad_id": 50}, "pad_id must be in"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**changes)


def test_labels_are_shifted_right_behind_the_start_token():
    labels = torch.tensor([[7, 8, 9, 1], [5, 1, 0, 0]])
    assert shift_right(labels).tolist() == [[0, 7, 8, 9], [0, 5, 1, 0]]
    assert shift_right(labels, pad_id=3)[:, 0].tolist() == [3, 3]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_ignores_pads_and_counts_tokens(smoothing):
    logits, labels = torch.randn(2, 5, 50), random_ids(2, 5)
    labels[1, 3:] = 0
    loss, tokens = sequence_loss(logits, labels, label_smoothing=smoothing)
    assert tokens == 8
    log_p = logits.log_softmax(-1)
    expected = 0.0
    for row, column in ((0, c) for c in range(5)):
        expected -= (1 - smoothing) * log_p[row, column, labels[row, column]]
        expected -= smoothing * log_p[row, column].mean()
    for column in range(3):
        expected -= (1 - smoothing) * log_p[1, column, labels[1, column]]
        expected -= smoothing * log_p[1, column].mean()
    assert close(loss, expected, 1e-3)
    logits[1, 3:] = 1e4
    assert close(sequence_loss(logits, labels, label_smoothing=smoothing)[0], loss)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned", "rotary"])
def test_thirty_two_pairs_are_learnt_by_heart(kind):
    """Decoding gives back exactly what teacher forcing taught."""
    source, target = random_ids(32, 8), random_ids(32, 10, seed=1)
    model = tiny_model(positional=kind, d_model=64, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(250):
        logits = model(source, shift_right(target))
        loss, tokens = sequence_loss(logits, target)
        optimizer.zero_grad()
        (loss / tokens).backward()
        optimizer.step()
    model.train()
    assert torch.equal(greedy_decode(model, source), target)
    assert model.training, "decoding leaves the mode of the model as it was"
    one_by_one = [greedy_decode(model, row[None])[0] for row in source]
    assert torch.equal(torch.stack(one_by_one), target)


def test_decoding_ends_at_its_limit():
    model = tiny_model()
    assert greedy_decode(model, random_ids(3, 5), max_new_tokens=7).size(1) <= 7
    learned = tiny_model(positional="learned")
    assert greedy_decode(learned, random_ids(1, 40)).size(1) <= 40


def test_model_files_need_torch_alone():
    """The two files of a copy-paste user import torch and the standard library."""
    for name in ("positional.py", "seq2seq.py"):
        for line in (HERE / name).read_text().splitlines():
            if line.startswith(("import ", "from ")):
                module = line.split()[1].split(".")[0]
                own = module in ("torch", "positional")
                assert own or module in sys.stdlib_module_names, line


# ---- the model against the references ---------------------------------------------------------


def as_torch(model: TransformerSeq2SeqModel):
    """(`nn.Transformer` with the weights of `model`, its names -> the parameters of `model`)."""
    config = model.config
    reference = torch.nn.Transformer(
        config.d_model,
        config.nhead,
        config.num_encoder_layers,
        config.num_decoder_layers,
        config.dim_feedforward,
        dropout=0.0,
        batch_first=True,
        norm_first=config.norm_first,
    )
    state = {}
    for side in ("encoder", "decoder"):
        norms = ["self_attention_norm", "feed_forward_norm"]
        if side == "decoder":
            norms.insert(1, "cross_attention_norm")
        for index, layer in enumerate(getattr(model, f"{side}_layers")):
            parts = {"self_attn": layer.self_attention}
            if side == "decoder":
                parts["multihead_attn"] = layer.cross_attention
            place = f"{side}.layers.{index}"
            for name, attention in parts.items():
                for kind in ("weight", "bias"):
                    state[f"{place}.{name}.in_proj_{kind}"] = getattr(attention.in_proj, kind)
                    state[f"{place}.{name}.out_proj.{kind}"] = getattr(attention.out_proj, kind)
            parts = {f"norm{i}": getattr(layer, name) for i, name in enumerate(norms, 1)}
            parts |= {"linear1": layer.linear1, "linear2": layer.linear2}
            if config.norm_first:
                state[f"{side}.norm.weight"] = getattr(model, f"{side}_norm").weight
                state[f"{side}.norm.bias"] = getattr(model, f"{side}_norm").bias
            for name, part in parts.items():
                state[f"{place}.{name}.weight"] = part.weight
                state[f"{place}.{name}.bias"] = part.bias
    if not config.norm_first:
        reference.encoder.norm = reference.decoder.norm = None
    reference.load_state_dict(state)
    return reference, state


def ragged(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Sentences of different lengths, padded on the right."""
    ids = random_ids(rows, length, seed)
    for row in range(1, rows):
        end = max(1, length - 2 * row)
        ids[row, end - 1 :] = 0
        ids[row, end - 1] = 1
    return ids


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(
    ("rows", "d_model", "nhead", "encoder", "decoder"),
    [(4, 32, 4, 2, 2), (1, 24, 3, 1, 3), (5, 40, 1, 3, 1), (2, 64, 64, 1, 1)],
)
def test_the_same_weights_in_nn_transformer_give_the_same_logits(
    norm_first, rows, d_model, nhead, encoder, decoder
):
    sizes = {"d_model": d_model, "nhead": nhead, "num_encoder_layers": encoder}
    sizes |= {"num_decoder_layers": decoder, "norm_first": norm_first, "dropout": 0.0}
    model = tiny_model(**sizes)
    for name, parameter in model.named_parameters():  # biases and norms that matter
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.3)
    reference, weights = as_torch(model)
    source, target = ragged(rows, 11), ragged(rows, 9, seed=1)
    decoder_input, pads = shift_right(target), source == 0
    hidden = reference(
        model.embed(source),
        model.embed(decoder_input),
        tgt_mask=torch.ones(9, 9, dtype=torch.bool).triu(1),
        src_key_padding_mask=pads,
        memory_key_padding_mask=pads,
    )
    expected = hidden @ model.output.weight[:50].T
    logits = model(source, decoder_input)
    real = target != 0  # what stands right of a sentence counts nowhere
    assert close(logits[real], expected[real])

    direction = torch.randn(int(real.sum()), 50)
    ours = torch.autograd.grad((logits[real] * direction).sum(), list(weights.values()))
    theirs = [dict(reference.named_parameters())[name] for name in weights]
    theirs = torch.autograd.grad((expected[real] * direction).sum(), theirs)
    for name, a, b in zip(weights, ours, theirs):
        assert close(a, b, 1e-5 * max(1.0, b.abs().max().item())), name


def learn_by_heart(**changes):
    """(model, sources, targets): 32 pairs of different lengths, learnt until they are known."""
    source, target = random_ids(32, 12), random_ids(32, 14, seed=1)
    for row in range(32):
        for ids, end in ((source, 5 + row % 7), (target, 4 + row % 10)):
            ids[row, end] = 1
            ids[row, end + 1 :] = 0
    model = tiny_model(d_model=64, dropout=0.0, **changes)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(150):
        loss, tokens = sequence_loss(model(source, shift_right(target)), target)
        optimizer.zero_grad()
        (loss / tokens).backward()
        optimizer.step()
    return model.eval(), source, target


@pytest.fixture(scope="module", params=["pre-LN", "post-LN", "untied"])
def learnt(request):
    changes = {"norm_first": request.param != "post-LN"}
    return learn_by_heart(**changes, tie_embeddings=request.param != "untied")


def numbered_tokenizer(vocab_size: int):
    """Token i is the word "i", but for <pad> 0, </s> 1, <unk> 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), *map(str, range(3, vocab_size))]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_exported(model, folder: Path) -> Path:
    """A folder as `python run.py export` writes it, for a model without a tokenizer."""
    tokenizer = numbered_tokenizer(50)
    run.complete_tokenizer(tokenizer, 1024)
    run.to_transformers(model).save_pretrained(folder)
    run.save_tokenizer(tokenizer, folder)
    return folder


def without_pads(rows: torch.Tensor) -> list[list[int]]:
    """Up to the first eos: transformers 5 fills up with eos where pad is 0."""
    rows = [[i for i in row if i != 0] for row in rows.tolist()]
    return [row[: row.index(1) + 1] if 1 in row else row for row in rows]


def test_transformers_gives_the_same_logits_and_the_same_translations(learnt, tmp_path):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model, source, _ = learnt
    folder = save_exported(model, tmp_path / "hf")
    reference = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    assert AutoTokenizer.from_pretrained(folder)("7 8")["input_ids"] == [7, 8, 1]
    # Unlearnt sentences too, where the model is in doubt.
    source = torch.cat([source, ragged(8, 12, seed=5), ragged(8, 12, seed=6)])
    mask = source.ne(0).long()
    decoder_input = shift_right(ragged(48, 10, seed=7))
    with torch.no_grad():
        logits = reference(
            input_ids=source, attention_mask=mask, decoder_input_ids=decoder_input
        ).logits
    assert close(logits[..., :50], model(source, decoder_input), 1e-4)
    reference.generation_config.max_length = None
    for width in (1, 4):
        theirs = reference.generate(
            input_ids=source, attention_mask=mask, max_new_tokens=20, num_beams=width
        )
        theirs = without_pads(theirs[:, 1:])
        ours = beam_search(model, source, width, max_new_tokens=20)
        for row, (best, *_) in enumerate(ours):
            if best.tokens != theirs[row]:
                # From 4.50 on transformers may stop a step earlier; it must not find better.
                assert width > 1 and run.versions()["transformers"] >= "4.5"
                _, score = teacher_forced(model, source[row], theirs[row])
                assert best.score > score
    assert without_pads(greedy_decode(model, source, 20)) == [
        best.tokens for best, *_ in beam_search(model, source, 1, max_new_tokens=20)
    ]


def teacher_forced(model, source: torch.Tensor, tokens: list[int]):
    """(log-probability of each token, their mean) of a translation."""
    target = torch.tensor([tokens])
    logits = model(source[source != 0][None], shift_right(target))
    log_probs = logits.log_softmax(-1)[0].gather(1, target.T)[:, 0]
    return log_probs.tolist(), log_probs.mean().item()


def test_positions_unknown_to_transformers_are_refused():
    for kind in ("learned", "rotary", "none"):
        with pytest.raises(InputError, match=f"{kind} positions"):
            run.to_transformers(tiny_model(positional=kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_ctranslate2_translates_alike(kind, norm_first, tied, tmp_path):
    """Greedy token by token, with random weights, in which every sentence is in doubt."""
    pytest.importorskip("ctranslate2")
    model = tiny_model(positional=kind, norm_first=norm_first, tie_embeddings=tied).eval()
    tokens = [f"t{i}" for i in range(50)]
    run.to_ctranslate2(model, tokens, tmp_path)
    engine = run.Engine(tmp_path, model.config, tokens, "cpu")
    source = torch.cat([ragged(8, 12, seed=seed) for seed in range(4)])
    source = source[source.ne(0).sum(1) > 1]  # a source that is eos alone it does not translate
    found = engine.decode(without_pads(source), run.DecodeOptions())
    expected = without_pads(greedy_decode(model, source))
    assert [best.tokens for (best,) in found] == expected
    assert len({tuple(row) for row in expected}) > 4


def test_ctranslate2_finds_what_our_beams_find(learnt, tmp_path):
    """Mostly: it ends its search at another time. Where it does, with the same score."""
    pytest.importorskip("ctranslate2")
    model, source, _ = learnt
    tokens = [f"t{i}" for i in range(50)]
    rows = without_pads(source)
    for quantization, share in ((None, 0.8), ("int8", 0.7)):
        run.to_ctranslate2(model, tokens, tmp_path, quantization)
        engine = run.Engine(tmp_path, model.config, tokens, "cpu")
        for beam in (1, 4):
            options = SimpleNamespace(beam=beam, num_return=beam, length_penalty=1.0, scores=True)
            found = engine.decode(rows, options)
            batch = data.pad_side(map(torch.tensor, rows))
            expected = beam_search(model, batch, beam)
            same = [a.tokens == b.tokens for (a, *_), (b, *_) in zip(found, expected)]
            assert sum(same) >= share * len(rows)
            for is_same, (ours, *_), (theirs, *_) in zip(same, expected, found):
                if is_same and quantization is None:  # ours counts the pad, which neither writes
                    assert theirs.score == pytest.approx(ours.score, rel=0.05, abs=1e-3)
                    assert sum(theirs.log_probs) / len(theirs.tokens) == pytest.approx(theirs.score)


def test_rotary_logits_depend_on_relative_positions_alone(monkeypatch):
    source, target = ragged(3, 9), ragged(3, 7, seed=1)
    for kind, hook in (("rotary", "rotate"), ("sinusoidal", "embed")):
        model = tiny_model(positional=kind).eval()
        before, original = model(source, target), getattr(model.positions, hook)
        monkeypatch.setattr(
            model.positions, hook, lambda x, offset=0, f=original: f(x, offset + 23)
        )
        assert close(model(source, target), before) == (kind == "rotary")


def test_the_embedding_of_pad_is_zero_and_stays_zero(learnt):
    model, *_ = learnt
    assert (model.embedding.weight[0] == 0).all() and model.embedding.weight[1].any()


# ---- decoding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_first", [True, False])
def test_cached_decoding_equals_the_whole_sequence_at_once(kind, norm_first):
    """Also with two hypotheses per sentence, and longer than the first buffer holds."""
    model = tiny_model(positional=kind, norm_first=norm_first).eval()
    source, target = ragged(4, 9), random_ids(8, 20, seed=1)
    expected = model(source.repeat_interleave(2, dim=0), target)
    with torch.no_grad():
        cache = KeyValueCache(model, source, width=2)
        steps = [model.decode_step(target[:, step], cache) for step in range(20)]
    assert close(torch.stack(steps, 1), expected)


def test_finished_rows_leave_the_batch():
    model, source = tiny_model().eval(), ragged(5, 9)
    target = random_ids(10, 12, seed=1)
    expected = model(source.repeat_interleave(2, dim=0), target)
    with torch.no_grad():
        cache = KeyValueCache(model, source, width=2)
        for step in range(6):
            model.decode_step(target[:, step], cache)
        cache.keep([1, 4, 3])
        order = torch.tensor([1, 4, 3])
        rows = torch.stack([2 * order, 2 * order + 1], 1).flatten()
        for step in range(6, 12):
            logits = model.decode_step(target[rows, step], cache)
            assert close(logits, expected[rows, step])


def test_a_hypothesis_goes_on_from_the_past_of_another():
    model, source = tiny_model().eval(), ragged(1, 9)
    target = random_ids(2, 12, seed=1)
    target[1, 6:] = target[0, 6:]
    with torch.no_grad():
        cache = KeyValueCache(model, source, width=2)
        for step in range(6):
            model.decode_step(target[:, step], cache)
        cache.reorder([0, 0])
        first, second = model.decode_step(target[:, 6], cache)
    assert torch.equal(first, second) or close(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_decodes_like_its_sentences_one_by_one(kind):
    model, source = tiny_model(positional=kind), ragged(5, 12)
    seeds = [3, 1, 4, 1, 5]
    together = (
        without_pads(greedy_decode(model, source)),
        without_pads(sample_decode(model, source, seeds, top_p=0.9)),
        [best.tokens for best, *_ in beam_search(model, source, 3)],
    )
    for row in range(5):
        one = source[row][source[row] != 0][None]
        assert without_pads(greedy_decode(model, one)) == [together[0][row]]
        sampled = sample_decode(model, one, [seeds[row]], top_p=0.9)
        assert without_pads(sampled) == [together[1][row]]
        assert beam_search(model, one, 3)[0][0].tokens == together[2][row]
    assert [best.tokens for best, *_ in beam_search(model, source, 1)] == together[0]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_a_wide_beam_finds_the_best_of_all_translations(length_penalty):
    """Every translation of up to three tokens, enumerated."""
    from itertools import product

    model, source = tiny_model(vocab_size=6, seed=4).eval(), torch.tensor([[3, 5, 1]])
    model.embedding.weight.data *= 3  # opinions
    best = (-math.inf, [])
    for length in (1, 2, 3):
        for tokens in product(range(1, 6), repeat=length):
            whole = tokens[-1] == 1 or length == 3
            if whole and 1 not in tokens[:-1]:
                log_probs, _ = teacher_forced(model, source[0], list(tokens))
                score = sum(log_probs) / length**length_penalty
                best = max(best, (score, list(tokens)))
    found = beam_search(model, source, 40, length_penalty, 40, max_new_tokens=3)[0]
    assert found[0].tokens == best[1] and abs(found[0].score - best[0]) < 1e-4


def test_hypotheses_come_sorted_with_their_scores():
    model, source = tiny_model(), ragged(3, 9)
    for row, hypotheses in enumerate(beam_search(model, source, 5, 0.7, 5)):
        scores = [hypothesis.score for hypothesis in hypotheses]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(hypothesis.tokens) for hypothesis in hypotheses}) == 5
        for hypothesis in hypotheses:
            length, total = len(hypothesis.tokens), sum(hypothesis.log_probs)
            assert abs(hypothesis.score - total / length**0.7) < 1e-5
            model.eval()
            log_probs, _ = teacher_forced(model, source[row], hypothesis.tokens)
            assert np.allclose(hypothesis.log_probs, log_probs, atol=1e-4)
    assert [len(found) for found in beam_search(model, source, 4, num_return=2)] == [2] * 3
    for beam_size, num_return in ((0, 1), (2, 3), (2, 0)):
        with pytest.raises(ValueError, match="num_return <= beam_size"):
            beam_search(model, source, beam_size, num_return=num_return)


def test_samples_follow_the_distribution():
    model, source = tiny_model().eval(), ragged(1, 6)
    count = 4000
    drawn = sample_decode(model, source.repeat(count, 1), list(range(count)), 0.7, max_new_tokens=1)
    logits = model(source)[0, 0]
    logits[0] = -torch.inf
    expected = (logits / 0.7).softmax(-1)
    observed = torch.bincount(drawn[:, 0], minlength=50) / count
    assert (observed - expected).abs().max() < 4 * (0.25 / count) ** 0.5
    kept = expected.sort(descending=True)
    few = (kept.values.cumsum(0) - kept.values < 0.3).sum()
    nucleus = sample_decode(
        model, source.repeat(count, 1), list(range(count)), 0.7, 0.3, max_new_tokens=1
    )
    assert set(nucleus[:, 0].tolist()) == set(kept.indices[:few].tolist())
    likeliest = greedy_decode(model, source)
    assert torch.equal(sample_decode(model, source, [9], 1e-4), likeliest)
    assert torch.equal(sample_decode(model, source, [9], 1.0, 1e-6), likeliest)
    assert torch.equal(sample_decode(model, source, [9], 1e-39), likeliest)
    for temperature, top_p in ((0.0, 1.0), (math.inf, 1.0), (1.0, 0.0), (1.0, 1.5)):
        with pytest.raises(ValueError, match="temperature > 0"):
            sample_decode(model, source, [0], temperature, top_p)


@pytest.mark.parametrize("kind", KINDS)
def test_sentences_longer_than_any_in_training_decode(kind):
    model, source = tiny_model(positional=kind), random_ids(2, 90)
    if kind == "learned":
        with pytest.raises(ValueError, match="longer than the 40 learned positions"):
            greedy_decode(model, source)
    else:
        assert greedy_decode(model, source, 100).size(1) <= 100


def test_decoding_leaves_the_model_as_it_was():
    model = tiny_model().train()
    for decode in (greedy_decode, beam_search):
        decode(model, ragged(2, 5))
        with pytest.raises((RuntimeError, IndexError)):
            decode(model, torch.full((1, 3), 99))
        assert model.training
    model(ragged(2, 5), ragged(2, 5)).sum().backward()
    model.encoder_layers.eval()
    greedy_decode(model, ragged(2, 5))
    assert model.training and not model.encoder_layers[0].training
    with pytest.raises(ValueError, match="nothing to decode"):
        greedy_decode(model, torch.zeros(0, 3, dtype=torch.long))


def test_decoding_works_inside_autocast():
    model, source = tiny_model(d_model=256), ragged(8, 9)
    expected = greedy_decode(model, source)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(greedy_decode(model, source), expected)


def test_only_the_best_candidates_may_end():
    """Twice the beam are looked at, so that enough go on; of those that end, only the ones within
    the beam count. By hand: a beam of two, eos is 1."""
    beam = _Beam(width=2, length_penalty=1.0, limit=9)
    first = [(-0.1, -0.1, 0, 5), (-0.2, -0.2, 0, 6), (-0.3, -0.3, 0, 1), (-9, -9, 0, 7)]
    assert beam.advance(first, eos_id=1) == [0, 0], "the second goes on from the first's past"
    assert not beam.ended, "the end of rank three is dropped"
    second = [(-0.4, -0.3, 1, 1), (-0.5, -0.4, 0, 8), (-0.6, -0.5, 0, 9), (-9, -9, 1, 7)]
    assert beam.advance(second, eos_id=1) == [0, 0]
    assert [ended.score for ended in beam.ended] == [-0.2] and not beam.finished
    third = [(-0.7, -0.2, 0, 1), (-0.8, -0.2, 1, 5), (-9, -9, 0, 6), (-9, -9, 1, 7)]
    assert beam.advance(third, eos_id=1) == [1, 0]
    # Both places of the list are taken, by -0.2 and -0.7 / 3; nothing that runs beats the worse.
    assert beam.finished
    assert beam.ended[0] == Hypothesis([6, 1], [-0.2, -0.3], -0.2)
    assert beam.ended[1].tokens == [5, 8, 1] and round(beam.ended[1].score, 4) == -0.2333


def test_flops_are_those_that_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model(num_encoder_layers=3).eval()
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(random_ids(1, 7), random_ids(1, 1))
    assert count_flops(model.config, 7, 1) == counter.get_total_flops()
    one, two, three = (count_flops(model.config, 7, t) for t in (1, 2, 3))
    # A token later means one key more in each of two layers, to be scored and mixed.
    assert (three - two) - (two - one) == 2 * 2 * 2 * 32


def test_attention_weights_are_a_distribution_over_the_source():
    model, source, labels = tiny_model().eval(), ragged(3, 9), ragged(3, 6, seed=1)
    weights = cross_attention_weights(model, source, labels)
    assert weights.shape == (2, 3, 4, 6, 9)
    assert close(weights.sum(-1), torch.ones(2, 3, 4, 6))
    assert (weights[:, source[:, None, None, :].expand(3, 4, 6, 9) == 0] == 0).all()


# ---- work not done ----------------------------------------------------------------------------


def padded_batch(lengths: list[tuple[int, int]], seed: int = 0):
    """(input_ids, labels) of pairs of these lengths."""
    rows = [
        (random_ids(1, source, seed + i)[0], random_ids(1, target, seed - i - 1)[0])
        for i, (source, target) in enumerate(lengths)
    ]
    return data.pad_batch(rows)


def loss_and_gradients(model, input_ids, labels, smoothing=0.0, fused=True):
    model.zero_grad()
    if fused:
        loss, tokens = model(input_ids, labels=labels, label_smoothing=smoothing)
    else:
        logits = model(input_ids, shift_right(labels))
        loss, tokens = sequence_loss(logits, labels, 0, smoothing)
    (loss / tokens).backward()
    return loss, tokens, [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("pieces", [(2**26, 2**20), (50 * 7, 50 * 3)])
def test_the_loss_without_pads_and_logits_is_the_plain_one(kind, smoothing, pieces, monkeypatch):
    """Value and gradients, tied and untied, in one piece and in many."""
    monkeypatch.setattr(_ProjectedLoss, "PIECE", pieces[0])
    monkeypatch.setattr(_ProjectedLoss, "BLOCK_CPU", pieces[1])
    batch = padded_batch([(3, 9), (12, 2), (7, 7), (1, 1)])
    for tied in (True, False):
        model = tiny_model(positional=kind, tie_embeddings=tied, dropout=0.0)
        loss, tokens, gradients = loss_and_gradients(model, *batch, smoothing)
        plain, count, expected = loss_and_gradients(model, *batch, smoothing, False)
        assert tokens == count == 19
        torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
        for name, a, b in zip(model.state_dict(), gradients, expected):
            assert close(a, b, 5e-6), name


def test_an_improbable_token_costs_what_it_should():
    """Its probability is below what float32 holds, its loss is not."""
    model = tiny_model(num_encoder_layers=1, num_decoder_layers=1)
    hidden = torch.zeros(1, 32, requires_grad=True)
    with torch.no_grad():
        hidden[0, 0] = 1.0
        model.output.weight.zero_()
        model.output.weight[7, 0] = 200.0
    loss = model.loss(hidden, torch.tensor([3]))
    assert loss.item() == pytest.approx(200.0)
    loss.backward()
    assert hidden.grad[0, 0].item() == pytest.approx(200.0)


def test_the_loss_in_bfloat16_is_near_that_in_float32():
    model = tiny_model(dropout=0.0)
    batch = padded_batch([(3, 9), (12, 2), (7, 7)])
    exact, _, expected = loss_and_gradients(model, *batch, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _, gradients = loss_and_gradients(model, *batch, 0.1)
    assert loss.dtype == torch.float32 and abs(loss - exact) / exact < 1e-2
    found, wanted = (torch.cat([g.flatten() for g in x]) for x in (gradients, expected))
    assert (found - wanted).norm() / wanted.norm() < 3e-2


def test_the_loss_never_holds_all_logits(monkeypatch):
    """Every tensor made on the way is looked at, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(_ProjectedLoss, "PIECE", 50 * 20)
    monkeypatch.setattr(_ProjectedLoss, "BLOCK_CPU", 50 * 4)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            for tensor in found if isinstance(found, (tuple, list)) else [found]:
                if isinstance(tensor, torch.Tensor) and 50 in tensor.shape:
                    largest = max(largest, tensor.numel())
            return found

    model, hidden = tiny_model(), torch.randn(400, 32, requires_grad=True)
    with Watch():
        model.loss(hidden, torch.randint(1, 50, (400,)), 0.1).backward()
    assert hidden.grad is not None
    assert largest == max(50 * 20, 50 * 32), "a piece, or a matrix of the weights' size"


def test_gradients_can_be_asked_for_twice_and_a_batch_of_nothing_has_some(
    monkeypatch,
):
    model = tiny_model(dropout=0.0)
    loss, _ = model(*padded_batch([(3, 9), (5, 2)])[:1], labels=random_ids(2, 9))
    weights = list(model.parameters())
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    again = torch.autograd.grad(loss, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    monkeypatch.setattr(torch, "empty_like", partial(torch.full_like, fill_value=1.0))
    loss, tokens = model(*data.pad_batch([])[:1], labels=data.pad_batch([])[1])
    loss.backward()
    assert loss == 0 == tokens
    # All of them, or processes that share gradients would wait for each other.
    assert all(p.grad is not None and not p.grad.any() for p in weights)


def test_layers_see_tokens_and_no_pads():
    """The rows that the feed-forward blocks are given are those of real tokens, and a batch without
    pads needs no mask."""
    model, seen = tiny_model(), []
    for layer in (*model.encoder_layers, *model.decoder_layers):
        layer.linear1.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    model(*padded_batch([(3, 9), (12, 2)])[:1], labels=padded_batch([(3, 9), (12, 2)])[1])
    assert seen == [15, 15, 11, 11]
    assert model.encode(random_ids(3, 5))[1].mask is None
    assert model.encode(padded_batch([(3, 9), (12, 2)])[0])[1].mask is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_first", [True, False])
def test_pads_that_are_kept_change_no_loss_and_no_gradient(kind, norm_first, monkeypatch):
    """As off the CPU: one sentence of nothing but pads among them, on either side."""
    model = tiny_model(positional=kind, norm_first=norm_first, dropout=0.0)
    input_ids, labels = padded_batch([(3, 9), (12, 2), (7, 7)])
    input_ids[2], labels[0] = 0, 0
    loss, tokens, gradients = loss_and_gradients(model, input_ids, labels, 0.1)
    monkeypatch.setattr(seq2seq, "removes_pads", lambda device: False)
    kept, count, kept_gradients = loss_and_gradients(model, input_ids, labels, 0.1)
    assert tokens == count == 9
    torch.testing.assert_close(kept, loss, rtol=1e-6, atol=0)
    for a, b in zip(gradients, kept_gradients):
        assert (a - b).norm() <= 1e-5 * a.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_training_step_off_the_cpu_never_waits_for_the_device(kind, smoothing):
    """On the device "meta", whose tensors have no values: nothing can depend on them, and nothing
    can be copied to the host. The mode says which operator tried."""
    from torch.utils._python_dispatch import TorchDispatchMode

    waiting = "nonzero masked_select _local_scalar_dense item unique is_nonzero equal"

    class Watch(TorchDispatchMode):
        steps = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            tensors = [x for x in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(x)]
            on_device = any(x.device.type == "meta" for x in tensors)
            assert not (on_device and name in waiting.split()), name
            if name == "index" and on_device:
                assert all(x.dtype != torch.bool for x in tensors[1:]), "indexing with booleans"
            found = function(*args, **(kwargs or {}))
            if on_device and name in ("_to_copy", "copy_", "clone"):
                assert found.device.type == "meta", "a copy to the host"
            self.steps += 1
            return found

    with torch.device("meta"):
        model = tiny_model(positional=kind).train()
    optimizer = torch.optim.Adam(model.parameters())
    input_ids, labels = (ids.to("meta") for ids in padded_batch([(3, 9), (12, 2), (7, 7)]))
    with Watch() as watch:
        for _ in range(2):
            loss, tokens = model(input_ids, labels=labels, label_smoothing=smoothing)
            (loss / tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert watch.steps > 100 and loss.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_written_out_is_the_kernels(dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, n, 8, dtype=dtype) for n in (5, 7, 7))
    mask = torch.rand(3, 1, 1, 7) < 0.7
    mask[..., 0] = True
    attention, tolerance = Attention(16, 2), 1e-6 if dtype == torch.float32 else 2e-2

    def kernel(query, mask, is_causal=False) -> torch.Tensor:
        plain = torch.nn.functional.scaled_dot_product_attention
        mixed = plain(query, key, value, mask, is_causal=is_causal)
        return mixed.transpose(1, 2).flatten(2)

    for known in (None, mask):
        assert close(attention(query, key, value, known), kernel(query, known), tolerance)
    assert close(attention(key, key, value, None, True), kernel(key, None, True), tolerance)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_that_share_and_scales_the_rest(rate):
    torch.manual_seed(0)
    dropout, x = Dropout(rate), torch.ones(333, 333, requires_grad=True)
    y = dropout(x)
    assert abs((y == 0).float().mean() - rate) < 0.01
    assert set(y.unique().tolist()) == {0.0, y.max().item()}
    assert y.max().item() == pytest.approx(1 / (1 - rate), rel=1e-4)
    y.sum().backward()
    assert torch.equal(x.grad, y)
    rows, columns = (y == 0).float().mean(dim=1), (y == 0).float().mean(dim=0)
    assert max(rows.std(), columns.std()) < 1.3 * math.sqrt(rate * (1 - rate) / 333)
    assert dropout.eval()(x) is x


# ---- data -------------------------------------------------------------------------------------


def test_text_is_normalised_to_comma_below():
    assert data.normalize("  Ştiinţa\tşi  ŢARA ", "ro") == "Știința și ȚARA"
    assert data.normalize("Beşiktaş", "en") == "Beşiktaş"
    assert data.normalize("s\u0326i ra\u0306u", "ro") == "și rău"


@pytest.mark.parametrize("name", ["ro", "RO", "ron", "rum", "ro-MD", "ro_RO", "ron_Latn"])
def test_a_language_is_known_in_all_usual_spellings(name, capsys, tmp_path):
    assert data.normalize("ţară", name) == data.normalize("ţară", " Romanian") == "țară"
    path = write_pairs(tmp_path / "a.tsv", [("a", "ţ")])
    assert read_all(path, languages=("eng_Latn", name)) == [("a", "ț")]
    assert "no rules" not in capsys.readouterr().err
    assert read_all(path, languages=("en", "tr")) == [("a", "ţ")]
    assert "no rules are known for the language 'tr'" in capsys.readouterr().err


def test_characters_that_nobody_sees_are_removed():
    hidden = "\ufeffcă\u00ad\u200bs\u200d\u0326uță\u2060\u200e "
    assert data.normalize(hidden, "ro") == "cășuță"
    assert data.normalize("\ufeff", "en") == ""
    family = "👨\u200d👩\u200d👧"  # here the joiner is seen
    assert data.normalize(family, "en") == family
    assert data.normalize("می\u200cخواهم", "fa") == "می\u200cخواهم"


@pytest.fixture(scope="module")
def phrases():
    return list(data.phrasebook(50_000))


def test_the_phrasebook_is_large_distinct_and_reproducible(phrases):
    assert len(phrases) == len({english for english, _ in phrases}) == 50_000
    assert phrases[:500] == list(data.phrasebook(500))
    assert phrases[:500] != list(data.phrasebook(500, seed=1))
    for english, romanian in phrases:
        for text in (english, romanian):
            assert text == data.normalize(text, "ro")
            assert text[0].isupper() and text[-1] in ".?"
            assert not set("_,") & set(text)


def test_the_phrasebook_speaks_romanian(phrases):
    """One sentence for each thing that is more than replacing words."""
    known = dict(phrases)
    for english, romanian in (
        ("I saw him.", "L-am văzut."),
        ("I saw her.", "Am văzut-o."),
        ("You help the teacher.", "Îl ajuți pe profesor."),
        ("We helped the girl.", "Am ajutat-o pe fată."),
        (
            "Twenty old dogs will see these nurses.",
            "Douăzeci de câini bătrâni le vor vedea pe aceste asistente.",
        ),
        ("Why did she buy his key?", "De ce a cumpărat ea cheia lui?"),
        ("We liked the good dog.", "Ne-a plăcut câinele bun."),
        ("Did he not like these new cities?", "Lui nu i-au plăcut aceste orașe noi?"),
        ("She sleeps in the city.", "Ea doarme în oraș."),
        ("She ate in your beautiful city.", "Ea a mâncat în orașul tău frumos."),
    ):
        assert known[english] == romanian


def test_numerals_agree_and_take_de(phrases):
    seen = set()
    for english, romanian in phrases:
        for pattern, expected in (
            ("two dogs", "doi câini"),
            ("two apples", "două mere"),
            ("twenty keys", "douăzeci de chei"),
            ("twenty children", "douăzeci de copii"),
        ):
            if pattern in english.lower():
                assert expected in romanian.lower()
                seen.add(pattern)
    assert len(seen) == 4


def write_pairs(path: Path, pairs) -> Path:
    path.write_text("".join(f"{a}\t{b}\n" for a, b in pairs), encoding="utf-8")
    return path


def read_all(*names, **more) -> list[tuple[str, str]]:
    return [pair[:2] for pair in data.read_pairs([str(name) for name in names], **more)]


def as_pairs(rows) -> list[data.Pair]:
    return [data.Pair(*row, f"row {i}") for i, row in enumerate(rows)]


PAIRS = [('One, "two".', "Unu, „doi”."), ("It's a cat.", "Este o pisică."), ("", "gol")]


def test_every_format_holds_the_same_pairs(tmp_path):
    import pyarrow
    import pyarrow.parquet

    records = [{"en": en, "ro": ro} for en, ro in PAIRS]
    write_pairs(tmp_path / "a.tsv", PAIRS)
    (tmp_path / "b.tsv").write_text(
        "\ufeffro\ten\r\n" + "".join(f"{ro}\t{en}\r\n" for en, ro in PAIRS)
    )
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "ro", "en"])
        writer.writeheader()
        writer.writerows({"id": 1, **record} for record in records)
    lines = [json.dumps({"translation": record}) for record in records]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, records)) + "\n")
    (tmp_path / "c.json").write_text(json.dumps(records, indent=1))
    for name, table in (
        ("a.parquet", {"en": [en for en, _ in PAIRS], "ro": [ro for _, ro in PAIRS]}),
        ("b.parquet", {"translation": records}),
    ):
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / name)
    (tmp_path / "x.en").write_text("".join(f"{en}\n" for en, _ in PAIRS))
    (tmp_path / "x.ro").write_text("".join(f"{ro}\n" for _, ro in PAIRS))
    for path in tmp_path.glob("[abc].*"):
        assert read_all(path) == PAIRS, path
    assert read_all(tmp_path / "x.en", tmp_path / "x.ro") == PAIRS
    assert read_all(tmp_path / "a.tsv", tmp_path / "c.json") == PAIRS * 2
    swapped = read_all(tmp_path / "a.csv", languages=("ro", "en"))
    assert swapped == [(ro, en) for en, ro in PAIRS]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"a\tb\nc\xff\td\n", r"a\.tsv:2: not valid UTF-8"),
        ("a.tsv", b"a\tb\tc\n", r"a\.tsv: no columns for en and ro, found a, b, c; pick two"),
        ("a.tsv", b"a\tb\nab\n", r"a\.tsv:2: 1 columns, where line 1 has 2"),
        ("a.csv", b"\xef\xbb\xbf", r"a\.csv: not readable: No columns"),
        ("a.csv", b"x" * 200_000 + b",b\n", r"a\.csv: not readable: field larger"),
        ("a.tsv", b"en\tde\na\tb\n", r"a\.tsv: no columns for en and ro, found en, de"),
        ("a.csv", b"id,english,other\n1,a,b\n", "found id, english, other; pick two"),
        ("a.csv", b"en,ro\na,b,c\n", r"a\.csv: not readable: .*line 2"),
        ("a.csv", b'en,ro\na,"b\n', r"a\.csv: not readable: .*row 1"),
        ("a.csv", b"en,ro\na,\0\n", r"a\.csv:2: a NUL"),
        ("a.csv", b"", "no pairs left"),
        ("a.csv", b"\n", "no pairs left|not readable"),
        ("a.jsonl", b'{"en": "a", "de": "b"}\n', r"a\.jsonl: no columns.*found en, de"),
        ("a.jsonl", b'{"en": "a", "ro": "b"}\n[1]\n', r"a\.jsonl: not readable"),
        ("a.jsonl", b'{"en": "a", "ro": 5}\n', r"a\.jsonl row 1: expected text, found 5"),
        ("a.jsonl", b'{"en": ["a"], "ro": ["b"]}\n', r"a\.jsonl row 1: expected text, found \['a'"),
        ("a.jsonl", b'{"en": "\\ud800", "ro": "b"}\n', r"a\.jsonl: not readable"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl: not readable"),
        ("a.jsonl", b'{"en": "a", "ro": "\xff"}\n', r"a\.jsonl:1: not valid UTF-8"),
        ("a.jsonl", b'{"e\\nn": "a"}', "found e n"),
        ("a.jsonl", b'{"en": \n', r"a\.jsonl: not readable"),
        ("a.json", b'\n[{"en": "a"}]', r"found en;"),
        ("a.parquet", b"PAR1 not", r"a\.parquet: not readable"),
        ("a.xlsx", b"", "cannot tell what"),
        ("a.tsv", b"", "no pairs left"),
        ("a.tsv", b"\ta\na\t\n", "no pairs left.*2 empty"),
        ("a.tsv", b"a\tb\n", "cannot hold out"),
        ("a.tsv", b"a\tb\na\tc\n", "cannot hold out"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    code = main("--dataset", tmp_path / name, "--output", tmp_path / "out")
    *notes, error = capsys.readouterr().err.splitlines()
    assert code == 2 and error.startswith("error: ")
    assert all(line.startswith("note: ") for line in notes)
    assert re.search(message, error), error
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


TEXT = [("The lamp.", "Lampa."), ("She runs.", "Ea aleargă.")]
HEADERS = ["English\tRomanian", "EN\tRO", "eng\tron", "src\ttgt", "ro_RO\ten-GB", "target\tsource"]


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_a_header_is_recognised_in_all_usual_spellings(header, suffix, tmp_path, capsys):
    swapped = header[0] in "rt"
    lines = [header, *("\t".join(pair[::-1] if swapped else pair) for pair in TEXT)]
    text = "\n".join(lines)
    if suffix == ".csv":
        text = text.replace("\t", ", ")  # a space after the comma, as people type it
    (tmp_path / f"a{suffix}").write_text(text, encoding="utf-8")
    assert read_all(tmp_path / f"a{suffix}") == TEXT
    assert f"a{suffix}: line 1 is a header; source is " in capsys.readouterr().err


def test_columns_are_picked_by_name_or_number(tmp_path, capsys):
    rows = [(f"{i}", *pair, "CC-BY") for i, pair in enumerate(TEXT)]
    plain, headed, records = (tmp_path / name for name in ("a.tsv", "b.csv", "c.jsonl"))
    plain.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    names = ("id", "text", "translated", "license")
    headed.write_text("".join(",".join(row) + "\n" for row in (names, *rows)), encoding="utf-8")
    records.write_text("".join(json.dumps(dict(zip(names, row))) + "\n" for row in rows))
    for path in (plain, headed, records):
        with pytest.raises(InputError, match=r"pick two by name or number, such as --columns 1 2"):
            read_all(path)
    assert read_all(plain, columns=("2", "3")) == TEXT
    for path in (headed, records):
        assert read_all(path, columns=("text", "translated")) == TEXT
    assert read_all(records, columns=("3", "2")) == [pair[::-1] for pair in TEXT]
    with pytest.raises(InputError, match="no column '5'; found id, text"):
        read_all(headed, columns=("2", "5"))


def test_of_several_columns_of_a_language_the_one_named_after_it_is_taken(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("en_id\ten\tro\n1\tThe lamp.\tLampa.\n", encoding="utf-8")
    assert read_all(path) == TEXT[:1]


def test_the_direction_is_that_of_the_data(tmp_path, capsys):
    english, romanian = next(data.phrasebook())
    assert read_all("phrasebook")[0] == (english, romanian)
    assert read_all("phrasebook", languages=("ro", "en"))[0] == (romanian, english)
    with pytest.raises(InputError, match="no columns for de and fr"):
        read_all(
            write_pairs(tmp_path / "it.tsv", [("de", "it"), ("a", "b")]), languages=("de", "fr")
        )
    for name, side in (("x.en", 0), ("x.ro", 1)):
        (tmp_path / name).write_text("".join(f"{pair[side]}\n" for pair in TEXT), encoding="utf-8")
    english, romanian = tmp_path / "x.en", tmp_path / "x.ro"
    assert read_all(english, romanian) == TEXT
    assert read_all(romanian, english, languages=("ron", "eng")) == [p[::-1] for p in TEXT]
    assert "names no languages" not in capsys.readouterr().err
    for paths, languages in (
        ((romanian, english), ("en", "ro")),
        ((english, romanian), ("ro", "en")),
    ):
        with pytest.raises(InputError, match="the endings say"):
            read_all(*paths, languages=languages)
    plain = write_pairs(tmp_path / "plain.tsv", TEXT)
    assert read_all(plain, languages=("ro", "en")) == TEXT
    assert "plain.tsv names no languages: column 1 is ro, 2 is en" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".json", ".parquet"])
def test_words_that_look_like_missing_values_are_text(suffix, tmp_path):
    pairs = [("NA", "null"), ("007", "1.0"), ("None", "nan"), ("", "NULL")]
    assert read_all(*write_as(suffix, tmp_path, pairs)) == pairs


def test_what_is_left_out_renumbers_nothing(tmp_path):
    path = write_pairs(tmp_path / "a.tsv", [("a b", "x"), ("", ""), ("a b", "x"), ("c d", "y")])
    dropped = Counter()
    kept = data.clean(data.read_pairs(str(path)), dropped)
    assert [pair.place for pair in kept] == [f"{path}:1", f"{path}:4"]
    assert dropped == {"empty": 1, "duplicate": 1}


def test_unusable_paths_are_refused(tmp_path):
    (tmp_path / "x.en").write_text("a\nb\n")
    (tmp_path / "x.ro").write_text("a\n")
    with pytest.raises(InputError, match=r"x\.ro ends before .*x\.en:2: the files"):
        read_all(tmp_path / "x.en", tmp_path / "x.ro")
    with pytest.raises(InputError, match="does not exist"):
        read_all(tmp_path / "missing.tsv")
    (tmp_path / "folder.tsv").mkdir()
    with pytest.raises(InputError, match="not a regular file"):
        read_all(tmp_path / "folder.tsv")
    with pytest.raises(InputError, match="cannot tell what"):
        read_all("a", "b", "c")


# What texts are made of: all of Unicode, and more often what has broken loaders before.
TROUBLE = list("\0\t\n\v\f\r\x1c\x85\xa0\u00ad\u200b\u200f\u202e\u2028\u2066\ufeff\U0001f600")
TROUBLE += [*"\"',;{}[]\\<>|", "\r\n", "</s>", "<pad>", "s\u0326", "ș", "ş", "e\u0301"]
TEXTS = strategies.lists(
    strategies.one_of(
        strategies.sampled_from(TROUBLE),
        strategies.text(strategies.characters(exclude_categories=("Cs",)), max_size=5),
    ),
    max_size=6,
).map("".join)
many = hypothesis_settings(
    max_examples=EXAMPLES or 50,
    derandomize=not EXAMPLES,
    deadline=None,  # the machine may be busy
    suppress_health_check=list(HealthCheck),
)


def write_as(suffix: str, folder: Path, pairs: list[tuple[str, str]]) -> list[Path]:
    """A file (or two, for .txt) as other programs would write these pairs."""
    import pyarrow.parquet

    path = folder / f"a{suffix}"
    records = [{"en": source, "ro": target} for source, target in pairs]
    if suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("en", "ro"), *pairs])
    elif suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    elif suffix == ".json":
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    elif suffix == ".parquet":
        columns = {name: [row[name] for row in records] for name in ("en", "ro")}
        schema = pyarrow.schema([(name, pyarrow.string()) for name in columns])
        pyarrow.parquet.write_table(pyarrow.table(columns, schema), path)
    elif suffix == ".tsv":
        path.write_bytes("".join(f"{a}\t{b}\n" for a, b in pairs).encode())
    else:
        sides = [folder / "a.en", folder / "a.ro"]
        for side, texts in zip(sides, zip(*pairs) if pairs else ((), ())):
            side.write_bytes("".join(f"{text}\n" for text in texts).encode())
        return sides
    return [path]


@pytest.mark.parametrize("suffix", [*data.FORMATS, ".txt"])
@many
@given(pairs=strategies.lists(strategies.tuples(TEXTS, TEXTS), max_size=4))
def test_any_text_is_loaded_faithfully(suffix, pairs):
    """Or, by formats that cannot hold it, refused by file and line."""
    if suffix in (".tsv", ".txt"):  # these have no way to write an end of line or a tab
        separators = "[\t\n]|\r$" if suffix == ".tsv" else "\n|\r$"
        pairs = [tuple(re.sub(separators, "", text) for text in pair) for pair in pairs]
    if suffix in (".tsv", ".txt") and pairs:  # and a mark at the start of the file is no text
        pairs[0] = tuple(text.lstrip("\ufeff") for text in pairs[0])
    expected = [(data.normalize(a, "en"), data.normalize(b, "ro")) for a, b in pairs]
    with tempfile.TemporaryDirectory() as folder:
        names = write_as(suffix, Path(folder), pairs)
        if suffix == ".tsv" and pairs and data._find_columns(pairs[0], ("en", "ro")):
            return  # a header
        try:
            assert read_all(*names) == expected
        except InputError as error:
            if suffix == ".parquet" and not pairs:
                return  # a file without rows, which `datasets` refuses
            assert suffix == ".csv" and re.search(r"a\.csv:\d+: a NUL", str(error))
            assert any("\0" in text for pair in pairs for text in pair)


@pytest.mark.parametrize("suffix", [*data.FORMATS, ".txt"])
@many
@given(
    pairs=strategies.lists(strategies.tuples(TEXTS, TEXTS), min_size=1, max_size=3),
    cut=strategies.integers(0, 200),
    insert=strategies.binary(max_size=6),
)
def test_a_damaged_file_is_read_or_refused_by_name(suffix, pairs, cut, insert):
    with tempfile.TemporaryDirectory() as folder:
        names = write_as(suffix, Path(folder), pairs)
        content = names[0].read_bytes()
        place = cut % (len(content) + 1)
        names[0].write_bytes(content[:place] + insert + content[place + 1 :])
        try:
            for source, target in read_all(*names):
                assert source == data.normalize(source, "en")
                assert target == data.normalize(target, "ro")
        except InputError as error:
            assert f"{Path(folder) / 'a.'}" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("suffix", data.FORMATS)
def test_what_is_no_text_file_is_refused(suffix, tmp_path):
    """At once, too: a FIFO would be waited for."""
    import gzip

    path = tmp_path / f"zip{suffix}"
    path.write_bytes(gzip.compress(b"a\tb\n"))
    with pytest.raises(InputError, match=f"zip{suffix}.*(UTF-8|not readable)"):
        read_all(path)
    path = tmp_path / f"utf16{suffix}"
    path.write_bytes("a\tb\n".encode("utf-16"))
    with pytest.raises(InputError, match=f"utf16{suffix}.*(UTF-8|not readable)"):
        read_all(path)
    path = tmp_path / f"pipe{suffix}"
    os.mkfifo(path)
    with pytest.raises(InputError, match="not a regular file"):
        read_all(path)
    path = tmp_path / f"long{suffix}"  # one line of a megabyte
    names = write_as(suffix, tmp_path, [("a" * 10**6, "ș" * 10**6)])
    names[0].rename(path)
    try:
        assert read_all(path) == [("a" * 10**6, "ș" * 10**6)]
    except InputError as error:
        assert suffix == ".csv" and f"{path}:2: field larger" in str(error)


def test_quotes_in_a_tsv_are_text(tmp_path):
    pairs = [('"Yes', "Da"), ('a ""b"" c', "'ț"), ('"x"', '"'), ("\\N", "NULL")]
    assert read_all(write_pairs(tmp_path / "a.tsv", pairs)) == pairs


def test_cleaning_counts_what_it_drops():
    dropped = Counter()
    rows = [("a b", "x"), ("", "x"), ("a b", "x"), ("a b", "y"), ("a", "x" * 40), ("c", "d")]
    kept = data.clean(as_pairs(rows), dropped, held_out={data.text_key("C!")})
    assert [pair[:2] for pair in kept] == [("a b", "x"), ("a b", "y")]
    assert dropped == {"empty": 1, "duplicate": 1, "length ratio": 1, "held out": 1}


def test_held_out_sentences_are_compared_as_people_read():
    rows = [(f"The house {i}.", f"Casa {i}.") for i in range(20)]
    rows += [(f"the HOUSE {i}!", f"Casa {i}!") for i in range(20)]
    pairs = as_pairs(rows)
    keys = [data.text_key(pair.source) for pair in pairs]
    rest, part = data.hold_out(pairs, keys, 5, seed=1)
    assert (len(rest), len(part)) == (30, 10)
    assert not {data.text_key(p.source) for p in rest} & {data.text_key(p.source) for p in part}
    assert data.text_key("...") == "...", "what has no words is itself"


def test_a_tokenizer_that_loses_letters_is_noticed(tmp_path):
    """By the round trip: without an unknown token, and without bytes, letters vanish in silence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    model.train_from_iterator(["the house is new"], trainers.BpeTrainer(vocab_size=100))
    lossy = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>")
    texts = ["house", "nouă", "new", "țară"]
    assert data.round_trip_loss(texts, lossy, "ro") == 0.5
    assert data.round_trip_loss(texts, data.train_tokenizer(texts, 300), "ro") == 0.0
    assert data.round_trip_loss(texts * 1000, lossy, "ro", sample=500) == pytest.approx(
        0.5, abs=0.1
    )
    assert data.round_trip_loss([], lossy, "ro") == 0.0


def test_no_source_sentence_stands_on_both_sides():
    keys = [i // 3 for i in range(300)]
    train, test = data.hold_out(range(300), keys, 0.2, seed=3)
    assert sorted(train + test) == list(range(300)) and len(test) == 60
    assert not {keys[row] for row in train} & {keys[row] for row in test}
    assert data.hold_out(range(300), keys, 0.2, seed=3) == (train, test)
    assert len(data.hold_out(range(300), keys, 5)[1]) == 15


@pytest.fixture(scope="module")
def prepared():
    return run.prepare(as_pairs(data.phrasebook(1200)), "train:400", 24, 200)


def test_the_own_tokenizer_round_trips(prepared):
    tokenizer = prepared.tokenizer
    assert len(tokenizer) == 400
    for text in (
        ROMANIAN,
        "Știința și țara.",
        "🙂 and 漢字",
        "a  b",
        "<b>\\n",
        "</s><pad> <unk>",
    ):
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        (ours,) = data.encode_texts([text], tokenizer)
        assert ours == ids


def test_over_long_pairs_are_dropped_not_cut(prepared):
    assert prepared.dropped["over-long"] > 0
    for part in (prepared.train, prepared.validation):
        assert max(lengths.max() for lengths in part.lengths) <= 24
        for row in range(0, len(part), 50):
            source, target = part[row]
            assert source[-1] == target[-1] == prepared.tokenizer.eos_token_id
    total = len(prepared.train) + len(prepared.validation)
    over_long = prepared.dropped["over-long"] + prepared.dropped["over-long validation"]
    assert total + over_long == 1200


def test_held_out_text_matches_its_ids(prepared):
    rows = [prepared.validation[row] for row in range(20)]
    sources, targets = data.pad_batch(rows)
    whole = {pair.place: pair for pair in prepared.validation_pairs}
    pairs = [whole[place] for place in prepared.validation.places[:20]]
    assert data.decode_ids(sources, prepared.tokenizer, "en") == [pair.source for pair in pairs]
    assert data.decode_ids(targets, prepared.tokenizer, "ro") == [pair.target for pair in pairs]


def test_the_tokenizer_is_trained_on_the_training_rows_alone():
    rows = [(f"common words {i}", f"cuvinte comune {i}") for i in range(100)]
    _, held_out = data.hold_out(range(100), range(100), 10)
    for row in held_out:
        rows[row] = tuple(f"qqqq wwww zzzz {row} {text}" for text in rows[row])
    prepared = run.prepare(as_pairs(rows), "train:600", 64, 10)
    # Which rows are held out depends on their number and not on their text.
    vocabulary = " ".join(prepared.tokenizer.get_vocab())
    assert "common" in vocabulary and "qq" not in vocabulary and "ww" not in vocabulary


def test_batches_follow_from_seed_and_epoch(prepared):
    def epoch(seed: int, number: int) -> list[list[int]]:
        sampler = data.BucketBatchSampler(*prepared.train.lengths, 16, seed)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(0, 1) == epoch(0, 1)
    assert epoch(0, 1) != epoch(0, 2) and epoch(0, 1) != epoch(1, 1)
    for number in range(3):
        rows = [row for batch in epoch(0, number) for row in batch]
        assert sorted(rows) == list(range(len(prepared.train)))


def test_buckets_hold_little_padding_and_batches_are_trimmed(prepared):
    train = prepared.train
    loader = data.make_loader(train, 16)
    real = padded = 0
    for index, (sources, targets) in enumerate(loader):
        for ids in (sources, targets):
            assert ids.dtype == torch.long
            assert ids[:, -1].any(), "the last column holds a token"
            real, padded = real + ids.ne(0).sum().item(), padded + ids.numel()
        tokens = targets.ne(0).sum().item()
        assert tokens == loader.batch_sampler.target_tokens(index)
    assert loader.batch_sampler.padding_share() == pytest.approx(1 - real / padded)
    assert 1 - real / padded < 0.15


def real_lengths(count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Lengths like those of sentences and their translations."""
    random_state = np.random.default_rng(0)
    source = np.clip(random_state.lognormal(2.5, 0.6, count), 2, 128).astype(int)
    target = np.clip(source * random_state.normal(1.4, 0.25, count), 2, 128)
    return source, target.astype(int)


@pytest.mark.parametrize("multiple", [1, 8])
def test_a_token_budget_is_kept_and_leaves_few_pads(multiple):
    lengths = real_lengths()

    def epoch(seed: int, number: int, **more) -> list[list[int]]:
        sampler = data.BucketBatchSampler(
            *lengths, seed=seed, batch_tokens=2048, multiple=multiple, **more
        )
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(0, 1) == epoch(0, 1)
    assert epoch(0, 1) != epoch(0, 2) and epoch(0, 1) != epoch(1, 1)
    sizes = []
    for batch in epoch(0, 3):
        widest = max(side[batch].max() for side in lengths)
        assert len(batch) * data.round_up(widest, multiple) <= 2048
        sizes.append(len(batch) * widest)
    everything, flat = list(range(len(lengths[0]))), itertools.chain.from_iterable
    assert sorted(flat(epoch(0, 3))) == everything
    # Schedules, and Lightning's validations, count on as many batches in every epoch.
    assert len({len(epoch(0, number)) for number in range(8)}) == 1
    assert np.median(sizes) > 1700, "batches are full"
    # Equal work: what two processes compute with at a time is alike, and all of it is shared out.
    ranks = [epoch(0, 3, rank=rank, world=2) for rank in range(2)]
    assert sorted(flat(flat(ranks))) == everything
    target = [[int(lengths[1][batch].sum()) for batch in rank] for rank in ranks]
    apart = [abs(a - b) / max(a, b) for a, b in zip(*target) if a and b]
    assert len(ranks[0]) == len(ranks[1]) and np.mean(apart) < 0.1
    by_size = data.BucketBatchSampler(*lengths, batch_size=64).padding_share()
    sampler = data.BucketBatchSampler(*lengths, batch_tokens=2048)
    assert sampler.padding_share() < 0.16 < by_size


def test_a_sentence_beyond_the_budget_is_a_batch_by_itself():
    lengths = np.array([5, 300, 5, 6])
    sampler = data.BucketBatchSampler(lengths, lengths, batch_tokens=16)
    assert [1] in list(sampler) and len(sampler) == 3
    assert sorted(itertools.chain.from_iterable(sampler)) == [0, 1, 2, 3]


def test_widths_are_rounded_up(prepared):
    loader = data.make_loader(prepared.train, None, batch_tokens=300, multiple=8)
    real = padded = 0
    for batch in loader:
        for ids in batch:
            longest = int(ids.ne(0).sum(dim=1).max())
            assert ids.size(1) == 8 * math.ceil(longest / 8)
            real, padded = real + ids.ne(0).sum().item(), padded + ids.numel()
    assert loader.batch_sampler.padding_share() == pytest.approx(1 - real / padded)


def test_a_tokenizer_that_cuts_and_pads_by_itself_is_told_not_to():
    tokenizer = data.train_tokenizer(["some words to learn from"], 300)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    (ids,) = data.encode_texts(["some words to learn from"], tokenizer)
    assert data.decode_ids([ids], tokenizer, "en") == ["some words to learn from"]


def test_window_tokens_cover_the_whole_window(prepared):
    lengths = [lengths[:500] for lengths in prepared.train.lengths]
    sampler = data.BucketBatchSampler(*lengths, 50)
    tokens = [sampler.target_tokens(index) for index in range(10)]
    assert len(sampler) == 10
    assert [sampler.window_tokens(i, 4) for i in (0, 3, 4, 9)] == [
        sum(tokens[:4]),
        sum(tokens[:4]),
        sum(tokens[4:8]),
        sum(tokens[8:]),
    ]


def test_create_dataloaders_splits_by_source_and_drops_duplicates():
    sources, targets = random_ids(40, 6), random_ids(40, 8, seed=1)
    sources[20:] = sources[:20]  # each source twice ...
    targets[20:30] = targets[:10]  # ... half of them as exact duplicates
    sources[:, 4:], targets[:, 5:] = 0, 0
    loaders = data.create_dataloaders(sources, targets, test_size=0.25, batch_size=4)
    sides = []
    for loader in loaders:
        rows = [tuple(row.tolist()) for batch, _ in loader for row in batch]
        assert all(batch.shape[1] == 4 for batch, _ in loader)
        assert all(batch.shape[1] == 5 for _, batch in loader)
        assert loader.dataset[0][0].shape == (6,) and loader.dataset[0][1].shape == (8,)
        sides.append(rows)
    assert len(sides[0]) + len(sides[1]) == 30
    assert not set(sides[0]) & set(sides[1])


def test_the_tutorials_names_and_signatures():
    def head(function, count: int) -> list:
        parameters = list(inspect.signature(function).parameters.values())
        return [(p.name, p.default) for p in parameters[:count]]

    assert head(data.load_dataset_and_tokenize, 5)[1:] == [
        ("dataset_name", "wmt16"),
        ("subset", "ro-en"),
        ("split", "train[:80%]"),
        ("max_length", 50),
    ]
    assert head(data.create_dataloaders, 4)[2:] == [
        ("test_size", 0.2),
        ("batch_size", 16),
    ]
    assert head(TransformerSeq2SeqModel, 6)[1:] == [
        ("d_model", 512),
        ("nhead", 8),
        ("num_encoder_layers", 6),
        ("num_decoder_layers", 6),
        ("max_length", 50),
    ]
    for name in ("training_step", "validation_step", "configure_optimizers"):
        assert name in vars(run.adapter_class(run.import_lightning().LightningModule))


def save_tokenizer(folder: Path, **special) -> Path:
    from transformers import PreTrainedTokenizerFast

    trained = data.train_tokenizer(["a b c", "d e f"], 300)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained.backend_tokenizer, **special)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "special",
    [
        {},
        {"eos_token": "</s>"},
        {"pad_token": "<pad>"},
        {"eos_token": "x", "pad_token": "x"},
    ],
)
def test_a_tokenizer_without_pad_or_eos_gets_them(tmp_path, special):
    tokenizer = data.load_tokenizer(str(save_tokenizer(tmp_path, **special)))
    assert None not in (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert max(tokenizer.pad_token_id, tokenizer.eos_token_id) < len(tokenizer)


def test_a_saved_tokenizer_names_a_class_that_transformers_4_and_5_know(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("name", ["./missing", "train:x", "train:10", "train:9999999"])
def test_a_tokenizer_that_cannot_be_is_refused(name, phrases):
    with pytest.raises(InputError, match="tokenizer|vocabulary"):
        run.prepare(as_pairs(phrases[:50]), name, 64, 5)


# ---- command line -----------------------------------------------------------------------------


def main(*arguments) -> int:
    """`python run.py ARGUMENTS` in this process; the exit code."""
    try:
        return run.main(*run.parse_command_line(list(map(str, arguments))))
    except SystemExit as stop:
        return stop.code


def python(*arguments, **more) -> subprocess.CompletedProcess:
    """Run the interpreter of these tests as a process of its own."""
    process = [sys.executable, *map(str, arguments)]
    more = {"capture_output": True, "text": True, "encoding": "utf-8"} | more
    return subprocess.run(process, check=False, **more)


def command(*arguments, **more) -> subprocess.CompletedProcess:
    """`python run.py ARGUMENTS` as a process of its own."""
    return python(HERE / "run.py", *arguments, **more)


SMALL = [
    *("--num-samples", 300, "--tokenizer", "train:320", "--max-epochs", 1),
    *("--d-model", 32, "--nhead", 2, "--dim-feedforward", 64, "--batch-size", 32),
    *("--num-encoder-layers", 1, "--num-decoder-layers", 1, "--validation-size", 20),
    *("--mlruns", "none"),
]


def test_flags_beat_the_preset_and_the_preset_the_defaults():
    _, config = run.parse_command_line(["--preset", "tutorial", "--batch-size", "3"])
    assert config.batch_size == 3 and config.d_model == 512 and config.seed == 0
    assert run.parse_command_line([])[1] == run.TrainConfig()
    names = {field.name for field in dataclasses.fields(run.TrainConfig)}
    assert all(set(preset) <= names for preset in run.PRESETS.values())


def test_the_tutorial_preset_is_the_tutorial_to_the_letter():
    _, config = run.parse_command_line(["--preset", "tutorial"])
    expected = {"dataset": ("wmt16",), "subset": "ro-en", "split": "train[:80%]"}
    expected |= {"num_samples": 100, "tokenizer": "t5-small", "max_length": 50}
    expected |= {"batch_size": 16, "d_model": 512, "nhead": 8, "dim_feedforward": 2048}
    expected |= {"num_encoder_layers": 6, "num_decoder_layers": 6, "dropout": 0.1}
    expected |= {"learning_rate": 5e-5, "max_epochs": 1, "validation_size": 0.2}
    assert {name: getattr(config, name) for name in expected} == expected
    optimizer = run.build_optimizer(tiny_model(), config)
    assert type(optimizer) is torch.optim.Adam
    schedule = run.build_schedule(optimizer, config, 5)
    assert schedule.get_last_lr() == [5e-5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-epoch", "3"], "did you mean --max-epochs?"),
        (["--d-mod", "64"], "unrecognized"),
        (["--batch-size", "0"], "at least 1"),
        (["--learning-rate", "fast"], "invalid float"),
        (["--loop", "manual"], "invalid choice"),
        (["--preset", "huge"], "invalid choice"),
        (["sing"], "unrecognized arguments: sing"),
        (["translate"], "--model"),
        (["evaluate", "--model", "x"], "--dataset"),
        (["--label-smoothing", "1"], "must be in"),
        (["--validation-size", "1.5"], "whole number"),
        (["--output", ""], "needs a name"),
        (["--seed", "-1"], "must be in"),
        (["--checkpoint-every", "10s"], "minutes"),
        (["--resume", "nowhere"], "no checkpoints in nowhere"),
        (["--learning-rate", "nan"], "must be in"),
        (["--max-length", "1000000000"], "65536"),
        (["translate", "--model", "x", "--batch-tokens", "0"], "at least 1"),
        (["translate", "--model", "x", "--num-return", "2"], "needs --sample or"),
        (["translate", "--model", "x", "--sample", "--beam", "2"], "neither with"),
        (["translate", "--model", "x", "--top-p", "0"], "top-p"),
        (["translate", "--model", "x", "--attention", "a.png"], "one sentence"),
        (["export", "--model", "x"], "required: OUTPUT"),
        (["bench", "decode", "--beam", "0"], "at least 1"),
        (["bench", "--turns", "2"], "at least 3"),
        (["bench", "encode"], "unrecognized arguments: encode"),
        (["translate", "--model", "x", "--length-penalty", "nan"], "length-penalty"),
        (["translate", "--model", "x", "--temperature", "inf"], "temperature"),
        (["translate", "--model", "x", "--beam", "2000000"], "not be above 1000"),
        (
            ["evaluate", "--model", "x", "--dataset", "y", "--num-samples", "-1"],
            "least",
        ),
    ],
)
def test_a_wrong_flag_is_an_error_in_one_line(arguments, message, capsys):
    assert main(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_every_flag_is_in_the_help_and_help_comes_before_torch():
    shown = command("--help", env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"})
    assert shown.returncode == 0 and "torch" not in shown.stderr
    for field in dataclasses.fields(run.TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in shown.stdout
    assert "translate" in shown.stdout and "evaluate" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device tpu: not here; found cpu"),
        (["--nhead", 3], "nhead=3 does not divide"),
        (["--positional", "absolute"], "sinusoidal, learned, rotary, none"),
        (["--output", HERE], "exists already"),
        (["--output", HERE / "run.py" / "x"], "cannot write to"),
        (["--output", "."], "exists already"),
        (["--output", "x" * 300], "too long"),
        (["--push", "--loop", "raw"], "not with --loop raw"),
        (["--precision", "fp16"], "needs a GPU"),
        (["--preset", "small"], "add --dataset"),
        (["--tensorboard", HERE / "run.py"], "run.py is a file, not a folder"),
        (["--mlruns", HERE / "run.py" / "x"], "run.py is a file, not a folder"),
        (["--mlruns", os.devnull], "is a file, not a folder"),
        (["--push", "--no-modlee"], "--no-modlee or --mlruns none"),
        (["translate", "--model", HERE], "no model folder: config.json is missing"),
        (["evaluate", "--model", HERE / "no", "--dataset", "x.tsv"], "no model folder"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_written(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODLEE_API_KEY", "secret-key-7f3a")
    assert main(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_pushing_needs_a_key(capsys, monkeypatch):
    monkeypatch.delenv("MODLEE_API_KEY", raising=False)
    assert main("--push") == 2
    assert "MODLEE_API_KEY" in capsys.readouterr().err


def test_a_hub_name_without_a_network_is_answered_without_retries(tmp_path):
    """No HF_HUB_OFFLINE here: the program finds out by itself, without minutes of retries."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = command("--dataset", "wmt16", "--subset", "ro-en", env=env, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot load data set wmt16/ro-en/train")
    assert "--dataset pairs.tsv" in done.stderr and done.stderr.count("\n") == 1


class StallingHub(http.server.BaseHTTPRequestHandler):
    """Has a tokenizer, of which it sends the first kilobyte and no more."""

    def do_HEAD(self) -> bool:
        """Returns whether the file is there."""
        known = self.path == "/" or self.path.endswith("/tokenizer.json")
        self.send_response(200 if known else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", "1000000" if known else "0")
        if not known:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        return known

    def do_GET(self) -> None:
        if self.do_HEAD():
            self.wfile.write(b" " * 1000)
            self.wfile.flush()
            time.sleep(60)

    def log_message(self, *arguments) -> None:
        pass


def test_a_download_that_stalls_ends_in_one_line(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StallingHub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    env |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    done = command("--tokenizer", "somebody/tokenizer", env=env, cwd=tmp_path)
    server.shutdown()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: cannot load tokenizer somebody/tokenizer: ")
    assert not list(tmp_path.glob("hf/**/snapshots/**/*.json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder made by `python run.py`, Lightning and, where it is installed, Modlee."""
    root = tmp_path_factory.mktemp("cli")
    home = root / "home"
    home.mkdir()
    work = root / "work"
    work.mkdir()
    env = os.environ | {"HOME": str(home), "HF_HUB_OFFLINE": "1"}
    env["MODLEE_API_KEY"] = "secret-key-7f3a"
    more = ("--output", root / "model", "--mlruns", "runs/mlruns")
    done = command(*SMALL, *more, cwd=work, env=env)
    assert done.returncode == 0, done.stderr
    (root / "stdout").write_text(done.stdout)
    (root / "stderr").write_text(done.stderr)
    return root / "model"


def test_a_run_leaves_a_whole_model_folder(folder):
    names = {path.name for path in folder.iterdir()}
    expected = {"model.safetensors", "config.json", "metrics.json", "loss.png"}
    assert expected | {"tokenizer.json"} <= names
    assert not [name for name in names if name.startswith(".")]
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in [
        "dataset",
        "tokenizer",
        "pairs",
        "parameters",
        "device",
        "precision",
        "loop",
        "modlee",
        "artifacts",
        "train_seconds",
        "tokens_per_second",
        "padding_share",
        "train_loss",
        "val_loss",
        "bleu",
        "chrf",
        "signature",
        "versions",
    ]:
        assert name in metrics
    dropped = sum(metrics["dropped"].values())
    assert sum(metrics["pairs"].values()) + dropped == 300
    assert metrics["modlee"] == HAS_MODLEE
    assert 0 < metrics["train_loss"] < 10 and 0 < metrics["val_loss"] < 10
    out = (folder.parent / "stdout").read_text()
    for word in ("phrasebook", "no benchmark", "train:320", "cpu", "fp32", "lightning"):
        assert word in out
    assert metrics["signature"] in out and out.count("translation  ") == 6
    assert "modlee" in out and str(folder) in out
    assert "Epoch 0: 100%" in (folder.parent / "stderr").read_text()


def test_a_run_leaves_nothing_else(folder):
    root = folder.parent
    assert [path.name for path in (root / "work").iterdir()] in ([], ["runs"])
    left = [path for path in (root / "home").rglob("*") if path.is_file()]
    left = [path for path in left if ".cache" not in path.parts and ".config" not in path.parts]
    assert not left


def test_the_key_is_written_nowhere(folder):
    for path in folder.parent.rglob("*"):
        if path.is_file():
            assert b"secret-key-7f3a" not in path.read_bytes(), path


def test_translate_writes_one_line_per_line(folder):
    lines = ["The cat sleeps.", "", "   ", "I see a dog.", "x " * 200, "", "last"]
    done = command("translate", "--model", folder, input="\n".join(lines))
    assert done.returncode == 0, done.stderr
    out = done.stdout.split("\n")
    assert out.pop() == "" and len(out) == len(lines)
    assert out[1] == out[2] == out[5] == "" and any(out)
    again = command("translate", "--model", folder, "I see a dog.", "The cat sleeps.")
    assert again.stdout.splitlines() == [out[3], out[0]]
    empty = command("translate", "--model", folder, input="")
    assert (empty.returncode, empty.stdout) == (0, "")


def test_over_long_lines_are_split_and_named(folder, tmp_path, capsys):
    """With learned positions too, which end: nothing is lost, nothing fails."""
    config = run.TrainConfig(positional="learned")
    model = tiny_model(vocab_size=320, positional="learned")
    tokenizer = data.load_tokenizer(str(folder))
    progress = run.Progress()
    progress.train.append((1, 1.0))
    run.save_model(tmp_path / "m", model, tokenizer, config, {}, progress)
    assert main("translate", "--model", tmp_path / "m", "short", "one two " * 40) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert "note: line 2: longer than 40 tokens, translated in pieces" in err
    assert "note: 2 lines (1, 2): the translation did not end" in err, "untrained"
    assert main("translate", "--model", tmp_path / "m", "a\udcff") == 2


def test_texts_are_split_where_it_hurts_least(folder):
    tokenizer = data.load_tokenizer(str(folder))

    def split(text: str, most: int) -> list[str]:
        pieces = run.split_text(text, tokenizer, most)
        assert all(len(ids) <= most and ids[-1] == 1 for ids in pieces)
        return data.decode_ids(pieces, tokenizer, "en")

    sentences = ["The cat sees a dog.", "Did you see it?", "“Yes.”"]
    text = " ".join(sentences)
    assert split(text, 1000) == [text]
    assert split(text, 20) == sentences
    clauses = "The cat sleeps, the dog sleeps, the wolf sleeps, the bird sleeps."
    pieces = split(clauses, 30)
    assert len(pieces) > 1 and all(piece[-1] in ",." for piece in pieces)
    assert (
        " ".join(split("the cat sees a dog and a wolf " * 9, 12))
        == ("the cat sees a dog and a wolf " * 9).strip()
    )
    assert "".join(split("x7q" * 50, 9)) == "x7q" * 50


def test_any_lines_are_translated_one_by_one_and_in_order(folder):
    """LINES=100000 for many."""
    chance = random.Random(0)
    lines = []
    for number in range(LINES):
        text = "".join(chance.choices(TROUBLE, k=number % 7))
        lines.append(re.sub("\n|\r$", "", text))
    content = "".join(f"{line}\n" for line in lines).encode()
    done = command("translate", "--model", folder, input=content, text=False, encoding=None)
    assert done.returncode == 0, done.stderr
    found = done.stdout.decode().split("\n")
    assert len(found) == LINES + 1 and found.pop() == ""
    empty = [not data.normalize(line, "en") for line in lines]
    assert sum(empty) > LINES / 7
    assert not any(output for output, nothing in zip(found, empty) if nothing)
    options = run.DecodeOptions()
    translator = run.Translator(*run.load_model(folder, torch.device("cpu")), options)
    some = chance.sample(range(LINES), 30)
    assert [translator.first([lines[i]])[0] for i in some] == [found[i] for i in some]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_translating_takes_no_more_memory_for_more_lines(folder, monkeypatch):
    monkeypatch.setattr(run, "TRANSLATE_WINDOW", max(16, LINES // 100))
    options = run.DecodeOptions()
    translator = run.Translator(*run.load_model(folder, torch.device("cpu")), options)
    pages = []
    for number, _ in enumerate(translator(f"The cat sees {n}." for n in range(LINES))):
        if number % (LINES // 4) == LINES // 4 - 1:
            pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert max(pages[1:]) <= 1.02 * pages[0], pages


def test_translate_reads_a_window_at_a_time_and_keeps_the_order(folder, monkeypatch):
    monkeypatch.setattr(run, "TRANSLATE_WINDOW", 8)
    options = run.DecodeOptions(batch_tokens=64)
    translator = run.Translator(*run.load_model(folder, torch.device("cpu")), options)
    lines = [f"I see {'a dog and ' * (n % 5)}{n}." for n in range(40)]
    seen = []
    stream = translator(line for line in lines if not seen.append(line))
    first = next(stream)
    assert len(seen) == 8, "no more is read than a window"
    found = [first, *stream]
    alone = [translator.first([line])[0] for line in lines]
    assert [best for ((best, _),) in found] == alone


def test_batches_hold_no_more_tokens_than_allowed():
    lengths = [3, 50, 4, 4, 9, 9, 9, 200]
    rows = sorted(range(8), key=lengths.__getitem__)
    batches = list(run.batch_by_tokens(rows, lengths, 40))
    assert [row for batch in batches for row in batch] == rows
    for batch in batches:
        size = len(batch) * max(lengths[row] for row in batch)
        assert size <= 40 or len(batch) == 1


def test_translate_gives_the_best_of_a_beam_with_scores(folder, capsys):
    more = ("--model", folder, "I see a dog.", "", "The cat sleeps.")
    assert main("translate", "--beam", 4, "--num-return", 3, "--scores", *more) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 9, "as many lines for each line"
    scores = [float(score) for score, _ in rows[:3]]
    assert scores == sorted(scores, reverse=True) and scores[0] < 0
    assert rows[3:6] == [["", ""]] * 3
    assert main("translate", "--beam", 4, *more) == 0
    assert capsys.readouterr().out.splitlines() == [rows[0][1], "", rows[6][1]]
    assert main("translate", "--beam", 1, *more) == 0
    greedy = capsys.readouterr().out
    assert main("translate", "--precision", "bf16", *more) == 0
    assert main("translate", *more) == 0
    assert capsys.readouterr().out.endswith(greedy)


def test_translate_draws_samples_by_seed(folder, capsys):
    def sample(*more) -> list[str]:
        assert main("translate", "--model", folder, "--sample", *more) == 0
        return capsys.readouterr().out.splitlines()

    text = ("I see a dog.", "The cat sleeps.")
    three = sample("--num-return", 3, *text)
    assert len(set(three)) == 6, "an untrained model says something else each time"
    assert sample("--num-return", 3, *text) == three
    assert sample("--num-return", 3, "--batch-tokens", 1, *text) == three
    assert sample("--seed", 1, "--num-return", 3, *text) != three


def test_translate_draws_its_attention(folder, tmp_path, capsys):
    picture = tmp_path / "attention.png"
    more = ("--model", folder, "I see a dog.")
    assert main("translate", "--attention", picture, *more) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main("translate", "--attention", tmp_path / "no" / "a.png", *more) == 2
    assert "--attention" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_export_writes_a_folder_for_transformers_alone(folder, tmp_path, capsys):
    import transformers

    output = tmp_path / "hf"
    assert main("export", "--model", folder, "--to", "hf", output) == 0
    assert main("export", "--model", folder, "--to", "hf", output) == 2, "nothing is lost"
    assert "exists already" in capsys.readouterr().err
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(output)
    text = "I see a dog."
    translator = run.Translator(*run.load_model(folder, torch.device("cpu")), run.DecodeOptions())
    batch = tokenizer([text], return_tensors="pt")
    limit = {"max_new_tokens": 2 * batch["input_ids"].size(1) + 10, "max_length": None}
    written = model.generate(**batch, **limit)
    (read,) = tokenizer.batch_decode(written, skip_special_tokens=True)
    assert data.normalize(read, "ro") == translator.first([text])[0]
    # Spaces and composed letters as in training.
    assert tokenizer("  I see\u00a0a  dog.")["input_ids"] == batch["input_ids"][0].tolist()
    if int(transformers.__version__.split(".")[0]) < 5:  # which has no such pipeline any more
        pipe = transformers.pipeline("translation", model=str(output))
        found = pipe(text, max_new_tokens=limit["max_new_tokens"])
        assert data.normalize(found[0]["translation_text"], "ro") == translator.first([text])[0]


def test_an_engine_folder_translates_and_evaluates_like_its_model(folder, tmp_path, capsys):
    pytest.importorskip("ctranslate2")
    assert main("export", "--model", folder, "--to", "ctranslate2", tmp_path / "ct2") == 0
    more = ("--to", "ctranslate2", "--quantization", "int8", tmp_path / "int8")
    assert main("export", "--model", folder, *more) == 0
    size = [(tmp_path / name / "model.bin").stat().st_size for name in ("ct2", "int8")]
    assert size[1] < 0.8 * size[0]
    lines = [english for english, _ in data.phrasebook(200, seed=1)]
    lines += ["", " ".join(lines[:12])]  # longer than the model knows: in pieces
    text = "\n".join(lines) + "\n"
    found = [
        command("translate", "--model", name, input=text) for name in (folder, tmp_path / "ct2")
    ]
    assert found[0].stdout == found[1].stdout and found[1].stdout.count("\n") == 202
    assert all("translated in pieces" in done.stderr for done in found)
    scores = []
    for name in (folder, tmp_path / "ct2", tmp_path / "int8"):  # on its own test part
        assert main("evaluate", "--model", name, "--json", tmp_path / "report.json") == 0
        scores.append(json.loads((tmp_path / "report.json").read_text())["bleu"])
    assert scores[0] == scores[1] and abs(scores[2] - scores[0]) <= 1
    capsys.readouterr()
    for flags in (("translate", "--sample", "I see."), ("export", tmp_path / "again")):
        assert main(*flags, "--model", tmp_path / "ct2") == 2
        assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "ct2" / "seq2seq.json").unlink()
    assert main("translate", "--model", tmp_path / "ct2", "I see.") == 2
    assert "seq2seq.json is missing" in capsys.readouterr().err


def test_without_the_engine_one_line_says_how_to_get_it(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    output = tmp_path / "ct2"
    assert main("export", "--model", folder, "--to", "ctranslate2", output) == 2
    assert "pip install ctranslate2" in capsys.readouterr().err and not output.exists()
    shutil.copytree(folder, output)
    shutil.copy(folder / "config.json", output / "seq2seq.json")
    (output / "model.bin").write_bytes(b"")
    assert main("translate", "--model", output, "I see.") == 2
    assert "pip install ctranslate2" in capsys.readouterr().err


def test_a_model_folder_that_stores_its_table_of_positions_loads(folder, tmp_path):
    """As folders did before the table was computed."""
    from safetensors.torch import load_file, save_file

    old = shutil.copytree(folder, tmp_path / "old")
    weights = load_file(old / "model.safetensors")
    assert "positions.table" not in weights
    save_file(weights | {"positions.table": torch.zeros(64, 32)}, old / "model.safetensors")
    logits = [
        run.load_model(name, torch.device("cpu"))[0](random_ids(1, 5), random_ids(1, 5))
        for name in (folder, old)
    ]
    assert torch.equal(*logits)


def test_bench_decode_compares_and_writes_its_figures(folder, tmp_path, capsys):
    report = tmp_path / "bench.json"
    more = ("--batch", 1, 3, "--beam", 1, 2, "--sentences", 4, "--repeats", 2)
    more += ("--max-new-tokens", 6, "--json", report)
    assert main("bench", "decode", "--model", folder, *more) == 0
    found = json.loads(report.read_text())
    libraries = {row["library"] for row in found["rows"]}
    assert {"ours", "transformers"} <= libraries
    assert len(found["rows"]) == 4 * len(libraries)
    for row in found["rows"]:
        assert row["same_output"] == 4 or row["beam"] > 1
        assert row["sentences"] == 4 and row["tokens"] <= 4 * 6
        low, high = row["ours_times_faster_range"]
        assert low <= row["ours_times_faster"] <= high
        assert len(row["seconds"]) == 2 and row["tokens_per_second"] > 0
        if row["library"] == "ours":
            assert low == high == 1.0
    assert "ours is faster" in capsys.readouterr().out
    assert main("bench", "decode", "--model", folder, "--json", tmp_path) == 2


def test_translate_refuses_what_is_no_text(folder):
    more = {"input": b"fine\n\xff\xfe\n", "text": False, "encoding": None}
    done = command("translate", "--model", folder, **more)
    assert done.returncode == 2
    assert done.stdout.count(b"\n") == 1, "the line before it is translated"
    assert done.stderr.decode().splitlines()[-1].startswith("error: standard input, line 2")


def test_evaluate_scores_a_file(folder, tmp_path, capsys):
    pairs = [("The cat sleeps.", "Pisica doarme."), ("I see.", "Ştiu.")]
    path = write_pairs(tmp_path / "pairs.tsv", pairs)
    report = tmp_path / "out.json"
    assert main("evaluate", "--model", folder, "--dataset", path, "--json", report) == 0
    result = json.loads(report.read_text())
    assert result["pairs"] == 2 and result["round_trip_loss_source"] == 0.0
    write_pairs(path, [*pairs, ("", ""), ("Half a pair.", "")])
    assert main("evaluate", "--model", folder, "--dataset", path, "--json", report) == 0
    again = json.loads(report.read_text())
    assert (again["pairs"], again["bleu"]) == (2, result["bleu"])
    for name in (
        "bleu",
        "chrf",
        "signature",
        "chrf_signature",
        "round_trip_loss_target",
        "seconds",
    ):
        assert name in result
    assert result["signature"] in capsys.readouterr().out
    assert main("evaluate", "--model", folder, "--dataset", tmp_path / "no.tsv") == 2
    assert main("evaluate", "--model", folder, "--dataset", "phrasebook") == 2
    assert main("evaluate", "--model", folder, "--dataset", path, "--json", tmp_path) == 2
    wrong = tmp_path / "no" / "out.json"
    assert main("evaluate", "--model", folder, "--dataset", path, "--json", wrong) == 2


def test_a_report_takes_the_place_of_its_like_alone(folder, tmp_path, capsys):
    folder = shutil.copytree(folder, tmp_path / "model")
    path = write_pairs(tmp_path / "pairs.tsv", [("The cat sleeps.", "Pisica doarme.")])
    kept = [path, folder / "config.json", folder / "metrics.json"]
    score = ("evaluate", "--model", folder, "--dataset", path)
    draw = ("translate", "--model", folder, "I see.", "--attention")
    kinds = ((*score, "--sentences"), (*score, "--json"), draw)
    for arguments in kinds:
        for _ in range(2):  # also beside the model
            assert main(*arguments, folder / f"new{arguments[-1]}") == 0
        kept.append(folder / f"new{arguments[-1]}")
    before = [file.read_bytes() for file in kept]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for arguments in kinds:
        for file in kept:
            if file.name != f"new{arguments[-1]}":
                assert main(*arguments, file) == 2
                assert f"{file} exists already" in capsys.readouterr().err
        assert main(*arguments, pipe) == 2
    assert [file.read_bytes() for file in kept] == before and pipe.is_fifo()
    both = (
        "--json",
        tmp_path / "one",
        "--sentences",
        f"{tmp_path}/../{tmp_path.name}/one",
    )
    assert main(*score, *both) == 2 and not (tmp_path / "one").exists()
    assert "that is the file of --json" in capsys.readouterr().err


def test_cedilla_and_comma_score_alike(folder, tmp_path):
    """One policy on both sides: references are read, and outputs decoded, as comma below."""
    assert read_all(write_pairs(tmp_path / "a.tsv", [("a", "Ştiţi")])) == [("a", "Știți")]
    tokenizer = data.load_tokenizer(str(folder))
    ids = torch.tensor(data.encode_texts(["Ştiţi  că"], tokenizer))
    assert data.decode_ids(ids, tokenizer, "ro") == ["Știți că"]
    assert data.decode_ids(ids, tokenizer, "tr") == ["Ştiţi că"]


def test_a_damaged_model_folder_is_refused(folder, tmp_path, capsys):
    for name, content in (
        ("model.safetensors", b"\x80\x04damaged"),
        ("config.json", b"{}"),
        ("config.json", b"not json"),
    ):
        copy = tmp_path / f"{name}-{len(content)}"
        shutil.copytree(folder, copy)
        (copy / name).write_bytes(content)
        assert main("translate", "--model", copy, "text") == 2
        error = capsys.readouterr().err
        assert "no model folder" in error and error.count("\n") == 1


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    run.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        run.write_json(path, {"a": math.nan})

    def half(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run.write_file(path, half)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    ("loop", "number"),
    list(itertools.product(["raw", "lightning"], [signal.SIGINT, signal.SIGTERM])),
)
def test_a_signal_saves_the_last_state(loop, number, tmp_path):
    """Of one process, and of two, which agree on when to stop."""
    two = loop == "lightning" and number == signal.SIGTERM
    output = tmp_path / "model"
    arguments = [*SMALL, "--max-epochs", 10_000, "--loop", loop, "--no-modlee"]
    arguments += ["--devices", 2, "--device", "cpu"] if two else []
    process = subprocess.Popen(
        [sys.executable, HERE / "run.py", *map(str, arguments), "--output", output],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
    )
    seen = b""
    while b"train_loss" not in seen:  # the bar shows a loss: steps are being made
        seen += process.stderr.read1()
        assert process.poll() is None, seen
    process.send_signal(number)
    time.sleep(0.05)
    process.send_signal(number)  # impatience loses nothing
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert b"Traceback" not in err and b"its weights are in" in out
    next_command = f"next:  python run.py --resume {output}.checkpoints"
    assert next_command in out.decode()
    assert (output / "loss.png").exists()
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["interrupted"] and metrics["steps"] >= run.LOG_EVERY
    assert main("translate", "--model", output, "I see.") == 0


# ---- nothing lost -----------------------------------------------------------------------------


def write_states(folder: Path, *steps: int) -> list[Path]:
    """Checkpoints of something small: 400 kB of the number of the step."""
    paths = []
    for step in steps:
        state = {"progress": {"step": step}, "w": torch.full((100_000,), float(step))}
        paths.append(run.write_checkpoint(folder, run.TrainConfig(), "data", 0, state))
    return paths


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def flip_a_bit(path: Path, owned: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # amid the weights, where only a checksum can tell
    path.write_bytes(content)


def cut_off(path: Path, owned: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path: Path, owned: Path) -> None:
    path.write_bytes(b"")


def pickle_by_torch(path: Path, owned: Path) -> None:
    torch.save({"progress": Hostile(owned)}, path)


def plain_pickle(path: Path, owned: Path) -> None:
    path.write_bytes(pickle.dumps(Hostile(owned)))


@pytest.mark.parametrize("damage", [flip_a_bit, cut_off, empty, pickle_by_torch, plain_pickle])
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(damage, tmp_path, capsys):
    """Nothing in it is executed, either."""
    _, newest = write_states(tmp_path / "checkpoints", 1, 2)
    assert run.read_checkpoint(newest.parent, "data")["progress"]["step"] == 2
    damage(newest, tmp_path / "owned")
    state = run.read_checkpoint(newest.parent, "data")
    assert state["progress"]["step"] == 1 and (state["w"] == 1).all()
    assert f"note: {newest} cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


def test_only_the_newest_two_checkpoints_are_kept_and_no_debris(tmp_path):
    write_states(tmp_path, 1, 2)
    (tmp_path / ".123.step-000000003.pt").write_bytes(b"half")  # as a killed one leaves it
    write_states(tmp_path, 3)
    names = ["settings.json", "step-000000002.pt", "step-000000003.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with pytest.raises(InputError, match="the pairs are not those"):
        run.read_checkpoint(tmp_path, "other")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")
    (first,) = write_states(tmp_path, 1)
    before, (_, hard) = first.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # half of a checkpoint
    try:
        with pytest.raises(run.Failed, match=f"cannot write.*{first} is intact.*--resume"):
            write_states(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "settings.json",
        first.name,
    ]
    assert first.read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("loop", ["raw", "lightning"])
def test_a_run_killed_at_any_moment_goes_on(loop, tmp_path):
    """kill -9, again and again, some amid a checkpoint; then the weights are those of a run that was
    left in peace. KILLS=50 for many."""
    more = ("--loop", loop, "--no-modlee", "--checkpoint-every", 1, "--max-epochs", 3)
    arguments = [*SMALL, *more, "--dropout", 0.1, "--accumulate", 2]
    arguments += ["--device", "cpu"]
    started = time.perf_counter()
    assert command(*arguments, "--output", "whole", cwd=tmp_path).returncode == 0
    seconds = time.perf_counter() - started
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    chance, kills, moments = random.Random(loop), 0, Counter()
    for part in itertools.count():
        output = tmp_path / f"part{part}"
        checkpoints = Path(f"{output}.checkpoints")
        while not output.is_dir() or run.was_interrupted(output):
            begun = any(checkpoints.glob("step-*.pt"))
            start = ["--resume", checkpoints] if begun else arguments + ["--output", output]
            process = subprocess.Popen(
                [sys.executable, HERE / "run.py", *map(str, start)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd=tmp_path,
            )
            limit = chance.uniform(0, seconds)
            if kills % 3:  # soon after a checkpoint, or while one is written
                pattern = "step-*.pt" if kills % 3 == 1 else ".[0-9]*.step-*"
                limit = chance.uniform(0, 0.3) if kills % 3 == 1 else 0
                before = set(checkpoints.glob(pattern))
                while process.poll() is None and before >= set(checkpoints.glob(pattern)):
                    time.sleep(0.0005)
            try:
                error = process.communicate(timeout=None if kills == KILLS else limit)[1]
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
                moments["before the first step"] += not checkpoints.is_dir()
                moments["in a write"] += any(checkpoints.glob(".*"))
                moments["after training"] += output.is_dir()
            else:
                assert process.returncode == 0, error
        assert (output / "model.safetensors").read_bytes() == whole
        if kills == KILLS:
            break
    print(f"{kills} kills in {part + 1} runs, of these {dict(moments)}")


def test_a_kill_amid_a_checkpoint_leaves_the_one_before(tmp_path):
    """The process dies when half of the file is there."""
    more = ("--loop", "raw", "--no-modlee", "--checkpoint-every", 2)
    assert command(*SMALL, *more, "--output", "whole", cwd=tmp_path).returncode == 0
    script = """
import os, signal, sys, torch, run
plain = torch.save
def save(state, path):
    plain(state, path)
    if state["progress"]["step"] == 6:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
run.main(*run.parse_command_line(sys.argv[1:]))
"""
    env = os.environ | {"PYTHONPATH": str(HERE)}
    killed = [*SMALL, *more, "--output", "part"]
    done = python("-c", script, *killed, cwd=tmp_path, env=env)
    assert done.returncode == -signal.SIGKILL, done.stderr
    checkpoints = tmp_path / "part.checkpoints"
    assert any(checkpoints.glob(".*.step-000000006.pt"))
    done = command("--resume", "part.checkpoints", cwd=tmp_path)
    assert done.returncode == 0 and "after step 4 of part" in done.stdout, done.stderr
    whole, part = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "part")
    )
    assert whole == part and not checkpoints.exists()


def test_nothing_in_a_model_folder_is_executed(folder, tmp_path):
    """Not in place of the weights, not beside them, not by way of the tokenizer."""
    owned = tmp_path / "owned"
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        copy = shutil.copytree(folder, tmp_path / name)
        plain_pickle(copy / name, owned)
        assert main("translate", "--model", copy, "I see.") == 0
    copy = shutil.copytree(folder, tmp_path / "weights")
    plain_pickle(copy / "model.safetensors", owned)
    assert main("translate", "--model", copy, "I see.") == 2
    pickle_by_torch(copy / "model.safetensors", owned)
    assert main("translate", "--model", copy, "I see.") == 2
    copy = shutil.copytree(folder, tmp_path / "code")
    (copy / "hostile.py").write_text(f"import os\nos.mkdir({str(owned)!r})\n")
    path = copy / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content |= {"auto_map": {"AutoTokenizer": ["hostile.Slow", "hostile.Fast"]}}
    content["tokenizer_class"] = "Hostile"
    path.write_text(json.dumps(content))
    done = command("translate", "--model", copy, "I see.", stdin=subprocess.DEVNULL)
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr
    assert not owned.exists()


def test_no_code_from_elsewhere_is_trusted():
    for name in ("run.py", "data.py"):
        source = (HERE / name).read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in source
        assert source.count("torch.load(") == source.count("weights_only=True)")
        banned = r"^[^#]*(pickle\.loads?|np\.load|(?<![.\w])eval|(?<![.\w])exec)\("
        assert not re.search(banned, source, re.MULTILINE)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("loop", ["raw", "lightning"])
def test_a_long_run_keeps_its_memory_and_files(prepared, loop):
    """STEPS=20000 for a long one: memory within 2 % from the first tenth to the end."""

    def look() -> tuple[int, int, float]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages, len(os.listdir("/proc/self/fd")), time.perf_counter()

    class Watched(run.Progress):
        def end_step(self):
            if self.step % (STEPS // 20) == 0:
                looks.append(look())
            if self.step == STEPS:
                self._signal = signal.SIGTERM
            return super().end_step()

    looks = []
    steps = math.ceil(len(prepared.train) / 64)
    fit(prepared, loop, progress=Watched(), max_epochs=math.ceil(STEPS / steps) + 1)
    pages, files, times = zip(*looks)
    assert max(pages[2:]) <= 1.02 * pages[2], pages
    assert max(files[2:]) <= files[2], files
    between = [round((b - a) * 20e3 / STEPS, 2) for a, b in itertools.pairwise(times)]
    print(f"\n{pages[-1] / pages[2]:.4f} of the memory, ms per step {between}")


# ---- the two loops ----------------------------------------------------------------------------


def fit(
    prepared,
    loop: str,
    modlee: bool = False,
    tmp_path=None,
    freeze=(),
    progress=None,
    state=None,
    **changes,
):
    """Train a tiny model with either loop. Returns (model, progress, record)."""
    settings = {"batch_size": 64, "max_epochs": 2, "seed": 5, "precision": "fp32"}
    settings |= {"mlruns": str(tmp_path / "mlruns")} if tmp_path else {}
    config = run.TrainConfig(**(settings | changes))
    model = tiny_model(vocab_size=len(prepared.tokenizer), dropout=0.1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in freeze)
    budget = config.batch_tokens
    loaders = [
        data.make_loader(part, 64, seed=config.seed, shuffle=shuffle, batch_tokens=budget)
        for part, shuffle in ((prepared.train, True), (prepared.validation, False))
    ]
    progress, record = progress or run.Progress(), None
    if state is not None:
        model.load_state_dict(state.pop("model"))
        progress.load(state)
        loaders[0].batch_sampler.start = (progress.epoch, progress.batch)
    if loop == "raw":
        run.train_raw(model, *loaders, config, progress)
        return model, progress, None
    if modlee:
        record = run.ModleeRecord(run.import_modlee(), config, prepared)
    base = run.modlee_base() if modlee else run.import_lightning().LightningModule
    adapter = run.adapter_class(base)(dataclasses.asdict(model.config), model)
    adapter.attach(config, progress)

    def train() -> None:
        run.train_lightning(adapter, *loaders, config, torch.device("cpu"))

    record.fit(adapter, train) if record else train()
    return model, progress, record


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("batch_tokens", [None, 650])
def test_raw_and_lightning_walk_the_same_path(
    prepared, precision, accumulate, batch_tokens, monkeypatch
):
    """Dropout, clipping, schedule and uneven windows on: bit-identical weights and losses."""
    settings = {"precision": precision, "accumulate": accumulate, "clip_norm": 0.5}
    settings |= {"average": 0.5, "batch_tokens": batch_tokens, "max_epochs": 4}
    monkeypatch.setattr(run, "LOG_EVERY", 3)  # or nothing would be averaged
    raw, raw_progress, _ = fit(prepared, "raw", **settings)
    torch.manual_seed(99)  # what either loop draws is its own doing
    lit, lit_progress, _ = fit(prepared, "lightning", **settings)
    loader = data.make_loader(prepared.train, 64, batch_tokens=batch_tokens)
    steps = 4 * math.ceil(len(loader) / accumulate)
    assert raw_progress.step == lit_progress.step == steps
    assert len(raw_progress.validation) == 4
    for name in ("train", "validation", "rates", "best"):
        assert getattr(raw_progress, name) == getattr(lit_progress, name)
    assert same_weights(raw, lit)
    with raw_progress.averaged(), lit_progress.averaged():
        assert same_weights(raw, lit)
    assert not same_weights(raw, tiny_model(vocab_size=len(prepared.tokenizer)))


@pytest.mark.parametrize(
    ("loop", "modlee"),
    [
        ("raw", False),
        ("lightning", False),
        pytest.param("lightning", True, marks=needs_modlee),
    ],
)
def test_a_resumed_run_walks_the_same_path(prepared, loop, modlee, tmp_path, monkeypatch):
    """From the middle of an epoch, from its end, and from the last checkpoint of all."""
    monkeypatch.setattr(run, "LOG_EVERY", 3)  # points that do not meet the checkpoints
    config = run.TrainConfig(accumulate=3)
    states = {}

    def save(state: dict) -> Path:
        path = tmp_path / "checkpoints"
        path = run.write_checkpoint(path, config, "digest", 0, state)
        states[state["progress"]["step"]] = path.read_bytes()
        return path

    settings = {"accumulate": 3, "clip_norm": 0.5, "modlee": modlee, "average": 0.5}
    progress = run.Progress(save=save, every=(1, math.inf))
    raw, raw_progress, _ = fit(prepared, "raw", progress=progress, **settings | {"modlee": False})
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    steps = math.ceil(math.ceil(len(prepared.train) / 64) / 3)
    newest = [f"step-{step:09}.pt" for step in (2 * steps - 1, 2 * steps)]
    assert kept == ["settings.json", *newest]
    assert sorted(states) == list(range(1, 2 * steps + 1))
    for step in (2, steps, steps + 1, 2 * steps):
        state = torch.load(io.BytesIO(states[step]), weights_only=True)
        assert (state["progress"]["batch"] == 0) == (step % steps == 0)
        torch.manual_seed(step)
        model, progress, _ = fit(prepared, loop, tmp_path=tmp_path, state=state, **settings)
        assert progress.step == 2 * steps
        for name in ("train", "validation", "rates", "best"):
            assert getattr(progress, name) == getattr(raw_progress, name)
        assert same_weights(raw, model)
        with raw_progress.averaged(), progress.averaged():
            assert same_weights(raw, model)


def test_resuming_reads_only_what_is_left(prepared):
    sampler = data.BucketBatchSampler(*prepared.train.lengths, 64, seed=1)
    sampler.set_epoch(1)
    whole = list(sampler)
    sampler.start = (1, 3)
    assert list(sampler) == whole[3:] and len(sampler) == len(whole)
    sampler.set_epoch(2)
    assert len(list(sampler)) == len(whole)


def test_an_interrupted_run_is_resumed_from_the_command_line(tmp_path, capsys, monkeypatch):
    """Like one never interrupted; with other settings only when that is insisted on."""
    from safetensors.torch import load_file

    monkeypatch.setenv("MODLEE_API_KEY", "secret-key-7f3a")
    more = ("--no-modlee", "--loop", "raw", "--device", "cpu", "--dropout", 0.1)
    assert main(*SMALL, *more, "--output", tmp_path / "whole") == 0
    part, checkpoints = tmp_path / "part", tmp_path / "part.checkpoints"

    def die(self, *arguments) -> None:
        raise MemoryError

    every = ("--checkpoint-every", 3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(run.Progress, "end_epoch", die)
        main(*SMALL, *more, *every, "--output", part)
    newest, before = sorted(checkpoints.glob("*.pt"), reverse=True)
    assert not part.exists() and newest.stat().st_mode & 0o044
    for path in checkpoints.iterdir():
        assert b"secret-key-7f3a" not in path.read_bytes(), path
    assert main(*SMALL, "--output", part) == 2
    assert "--resume" in capsys.readouterr().err
    assert main("--resume", checkpoints, "--seed", 3, "--batch-size", 7) == 2
    error = capsys.readouterr().err
    assert "--seed (was 0), --batch-size (was" in error and "--loop" not in error
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert main("--resume", checkpoints) == 2
        assert "torchrun has started 2" in capsys.readouterr().err
    settings = checkpoints / "settings.json"
    known = settings.read_text()
    settings.write_text(known.replace('"seed"', '"seeds"'))
    assert main("--resume", checkpoints) == 2
    assert "another version" in capsys.readouterr().err
    settings.write_text(known)
    with pytest.MonkeyPatch.context() as patch:  # stopped again, and none are to be written
        patch.setattr(run.Progress, "stop", True)
        assert main("--resume", checkpoints, "--checkpoint-every", 0) == 143
        assert newest.exists() and settings.exists()
        assert f"--resume {checkpoints}" in capsys.readouterr().out
    newest.write_bytes(newest.read_bytes()[:1000])
    assert main("--resume", checkpoints) == 0
    said = capsys.readouterr()
    assert f"{newest} cannot be read" in said.err
    assert f"after step {int(before.stem[5:])} of" in said.out
    assert not checkpoints.exists()
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_both_loops_train_on_shifted_labels(smoothing):
    model = tiny_model().eval()
    source, labels = random_ids(3, 6), random_ids(3, 5, seed=1)
    labels[1, 3:] = 0
    loss, tokens = run.batch_loss(model, (source, labels), smoothing)
    logits = model(source, shift_right(labels))
    expected, count = sequence_loss(logits, labels, 0, smoothing)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert tokens == count == 13
    assert smoothing == 0 or not torch.equal(loss, sequence_loss(logits, labels)[0])


def test_the_random_state_of_a_step_follows_from_seed_and_step():
    def draw(seed: int, step: int) -> float:
        torch.rand(7)
        run.seed_step(seed, step)
        return torch.rand(()).item()

    assert draw(1, 5) == draw(1, 5)
    assert len({draw(seed, step) for seed in range(5) for step in range(5)}) == 25


def test_two_batches_accumulated_equal_one_of_twice_the_size(prepared):
    """Token-exact: the gradient of a window is that of its pairs in one batch."""
    model = tiny_model(vocab_size=len(prepared.tokenizer), dropout=0.0)
    rows = [prepared.train[row] for row in range(40)]
    loss, tokens = run.batch_loss(model, data.pad_batch(rows), 0)
    (loss / tokens).backward()
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    lengths = [lengths[:40] for lengths in prepared.train.lengths]
    sampler = data.BucketBatchSampler(*lengths, 30, shuffle=False)  # 30 pairs, then 10
    for index, part in enumerate(sampler):
        batch = data.pad_batch([rows[row] for row in part])
        loss, _ = run.batch_loss(model, batch, 0)
        (run.step_share(loss, sampler, index, 2) / 2).backward()
    for parameter, expected in zip(model.parameters(), whole):
        assert close(parameter.grad, expected, 1e-6)


TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", 2)


@pytest.mark.parametrize(
    ("loop", "start", "more"),
    [
        ("raw", TORCHRUN, ()),
        ("lightning", TORCHRUN, ("--no-modlee",)),
        ("lightning", (), ("--devices", 2, "--strategy", "ddp")),
    ],
)
def test_two_processes_train_like_one_on_both_batches(loop, start, more, tmp_path):
    """Token-exact: gradients are averaged once per window, and each token counts the same."""
    from safetensors.torch import load_file

    both = [*SMALL, "--dropout", 0, "--device", "cpu", "--batch-size", 30]
    both += ["--checkpoint-every", 3]
    two = [*both, *more, "--loop", loop, "--accumulate", 2, "--output", "two"]
    one = [*both, "--loop", "raw", "--accumulate", 4, "--output", "one"]
    losses, weights = [], []
    for arguments in ((*start, HERE / "run.py", *two), (HERE / "run.py", *one)):
        done = python(*map(str, arguments), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("saved") == 1, "only the first process speaks"
        (line,) = re.findall("loss  .*", done.stdout)
        losses.append(line)
        weights.append(load_file(tmp_path / arguments[-1] / "model.safetensors"))
    assert losses[0] == losses[1]
    for name, weight in weights[0].items():
        assert close(weight, weights[1][name], 1e-4), name
    # Nothing is left but what one process writes.
    assert {path.name for path in tmp_path.iterdir()} <= {"one", "two", "runs"}
    if (tmp_path / "runs").exists():  # Modlee's
        assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mlruns"]


def test_only_the_first_process_writes_checkpoints(tmp_path):
    state = {"progress": {"step": 1}}
    write = partial(run.write_checkpoint, tmp_path / "kept", run.TrainConfig(), "digest")
    assert not write(1, state).exists() and not any(tmp_path.iterdir())
    assert write(0, state).exists()


def test_a_model_held_in_parts_is_saved_whole(tmp_path):
    """FSDP: its checkpoint is that of one process, and training goes on from it."""
    from safetensors.torch import load_file

    arguments = [*SMALL, "--dropout", 0, "--device", "cpu", "--batch-size", 30]
    fsdp = ["--strategy", "fsdp", "--checkpoint-every", 2]
    whole = command(*arguments, *fsdp, "--devices", 2, "--output", "whole", cwd=tmp_path)
    if not hasattr(torch, "accelerator"):
        assert whole.returncode == 2 and "needs torch 2.6" in whole.stderr
        return
    assert whole.returncode == 0, whole.stderr
    (tmp_path / "die.py").write_text(
        "import sys, run\n"
        "def die(self, *arguments): raise MemoryError\n"
        "run.Progress.end_epoch = die\n"
        "run.main(*run.parse_command_line(sys.argv[1:]))\n"
    )
    more = (*TORCHRUN, tmp_path / "die.py", *arguments, *fsdp, "--output", "part")
    env = os.environ | {"PYTHONPATH": str(HERE)}
    assert python(*more, cwd=tmp_path, env=env).returncode == 1
    folder = tmp_path / "part.checkpoints"
    settings = json.loads((folder / "settings.json").read_text())
    state = run.read_checkpoint(folder, settings["data"])
    sizes = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    model = tiny_model(vocab_size=320, nhead=2, max_length=64, **sizes)
    model.load_state_dict(state["model"])
    optimizer = run.build_optimizer(model, run.TrainConfig())
    optimizer.load_state_dict(state["optimizer"])
    for parameter in model.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    done = command("--resume", folder, cwd=tmp_path)
    assert done.returncode == 0 and "resumed" in done.stdout, done.stderr
    more = ("--accumulate", 2, "--loop", "raw", "--output", "one")
    outputs = [whole.stdout, command(*arguments, *more, cwd=tmp_path).stdout]
    expected, found, one = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part", "one")
    )
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]), name
    untrained = dict(tiny_model(vocab_size=320, nhead=2, **sizes).named_parameters())
    for name in ("embedding.weight", "decoder_norm.bias"):
        way = (one[name] - untrained[name]).norm()
        assert (one[name] - expected[name]).norm() < way / 4, name
    # Not to the last digit: the hook that keeps pad at zero does not survive there.
    losses = [re.findall(r"(?:training|validation) ([0-9.]+)", out) for out in outputs]
    assert np.allclose(*np.array(losses, float), atol=2e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("loop", ["raw", "lightning"])
def test_a_process_that_dies_ends_the_job(loop, tmp_path):
    """With a message; and what was saved can be gone on from."""
    more = ("--devices", 2, "--device", "cpu", "--max-epochs", 10_000, "--no-modlee")
    arguments = [*SMALL, *more, "--loop", loop, "--checkpoint-every", 5]
    process = subprocess.Popen(
        [sys.executable, HERE / "run.py", *map(str, arguments), "--output", "model"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env=os.environ | {"MODLEE_API_KEY": "secret-key-7f3a"},
    )
    seen = b""
    while b"train_loss" not in seen:
        seen += process.stderr.read1()
        assert process.poll() is None, seen
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    assert len(children.split()) == 2
    for child in children.split():
        # Where everyone on the machine can read it.
        assert b"secret-key" not in Path(f"/proc/{child}/cmdline").read_bytes()
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), signal.SIGKILL)
    started = time.perf_counter()
    _, err = process.communicate(timeout=300)
    print(f"ended after {time.perf_counter() - started:.1f} s")
    assert process.returncode not in (0, None)
    assert b"error: another process of this run has ended" in err
    assert b"--resume model.checkpoints" in err
    state = run.read_checkpoint(
        tmp_path / "model.checkpoints",
        json.loads((tmp_path / "model.checkpoints" / "settings.json").read_text())["data"],
    )
    assert state["progress"]["step"] >= 5


def test_no_pair_is_seen_twice_by_several_processes(prepared):
    for world in (2, 3):
        samplers = [
            data.BucketBatchSampler(*prepared.train.lengths, 32, seed=1, rank=rank, world=world)
            for rank in range(world)
        ]
        assert len({len(sampler) for sampler in samplers}) == 1
        rows = [row for sampler in samplers for batch in sampler for row in batch]
        assert sorted(rows) == list(range(len(prepared.train)))


@pytest.mark.parametrize("backward", [False, True])
def test_a_batch_without_memory_is_left_out_or_ends_the_run(
    prepared, backward, monkeypatch, capsys
):
    """Whether forward or backward ran out of it, in both loops, which stay alike."""
    plain, calls = run.batch_loss, []

    def fail(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB\nand more")

    def loss(model, batch, *more):
        result = plain(model, batch, *more)
        calls.append(model.training)
        if sum(calls) == 5 and model.training:
            shapes.append(" and ".join(str(list(ids.shape)) for ids in batch))
            if not backward:
                fail()
            result[0].register_hook(fail)
        return result

    class Watched(run.Progress):
        def leave_out(self, error, model, *batch) -> None:
            super().leave_out(error, model, *batch)
            assert all(weight.grad is None for weight in model.parameters())

    monkeypatch.setattr(run, "batch_loss", loss)
    found = []
    for loop in ("raw", "lightning"):
        shapes = []
        calls.clear()
        progress = Watched(on_oom="skip")
        model, progress, _ = fit(prepared, loop, progress=progress, accumulate=3)
        assert progress.left_out == 1
        said = capsys.readouterr().err
        assert f"out of memory at step 2, with a batch of {shapes[0]} tokens" in said
        steps = math.ceil(math.ceil(len(prepared.train) / 64) / 3)
        assert progress.step == 2 * steps and progress.batch == 0
        found.append((model, progress))
        calls.clear()
        with pytest.raises(run.Failed, match="out of memory at step 2.*--on-oom skip"):
            fit(prepared, loop, accumulate=3)
    assert same_weights(found[0][0], found[1][0])
    assert found[0][1].train == found[1][1].train
    calls.clear()
    monkeypatch.setattr(run, "batch_loss", plain)
    assert not same_weights(found[0][0], fit(prepared, "raw", accumulate=3)[0])


def test_another_error_is_no_want_of_memory(prepared, monkeypatch):
    def fail(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(run, "batch_loss", fail)
    for loop in ("raw", "lightning"):
        progress = run.Progress(on_oom="skip")
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            fit(prepared, loop, progress=progress)
        assert progress.left_out == 0  # and not only validation fails


def test_a_loss_that_is_no_number_names_step_and_rows(prepared):
    """Noticed at the next point of the curve; fp16's scaler skips such a step instead."""
    sampler = data.BucketBatchSampler(*prepared.train.lengths, 3)
    losses = [torch.tensor(value) for value in (6.0, math.nan, 2.0)]

    def feed(progress: run.Progress) -> run.Progress:
        for index, loss in enumerate(losses):
            progress.add(loss, sampler, index)
            progress.end_step()
        progress.flush()
        return progress

    progress = run.Progress()
    progress.places = prepared.train.places
    places = ", ".join(progress.places[row] for row in sorted(sampler.rows(1).tolist()))
    told = f"step 2 is nan.*batch holds {places}; last good checkpoint: none"
    with pytest.raises(run.Failed, match=told):
        feed(progress)
    with pytest.raises(run.Failed, match="validation loss after step 0 is nan"):
        run.Progress(overflows=True).end_epoch(math.nan)
    tokens = sampler.target_tokens(0) + sampler.target_tokens(2)
    assert feed(run.Progress(overflows=True)).train == [(3, 8.0 / tokens)]


@pytest.mark.parametrize("overflows", [0, 1])
def test_an_overflow_of_fp16_is_skipped_and_counted(prepared, monkeypatch, overflows):
    """The scaler leaves the step out, and training goes on. (fp16 is refused on a CPU, where it is
    slow; but it works.)"""
    plain, shares = run.step_share, []

    def share(*arguments) -> torch.Tensor:
        shares.append(1e6 if overflows and len(shares) == 2 else 1)
        return plain(*arguments) * shares[-1]

    monkeypatch.setattr(run, "step_share", share)
    progress = run.Progress(overflows=True)
    settings = {"precision": "fp16", "max_epochs": 1}
    model, _, _ = fit(prepared, "raw", progress=progress, **settings)
    assert progress.step == len(shares) and progress.skipped == overflows
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert progress.validation[0][1] < progress.train[0][1]


def test_under_lightning_a_batch_left_out_is_not_unscaled_twice(monkeypatch):
    """Lightning clips where there was no loss, but lets the scaler of fp16 take no step then."""

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(run, "batch_loss", fail)
    adapter = run.adapter_class(torch.nn.Module)(model=tiny_model())
    adapter.attach(run.TrainConfig(on_oom="skip"), run.Progress(True, on_oom="skip"))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))  # or it would not know its scale yet
    optimizer = torch.optim.Adam(adapter.parameters())
    optimizer.param_groups[0]["fused"] = True
    rows = data.BucketBatchSampler(np.array([3, 4]), np.array([3, 4]), 1)
    adapter.trainer = SimpleNamespace(
        precision_plugin=SimpleNamespace(scaler=scaler),
        train_dataloader=SimpleNamespace(batch_sampler=rows),
    )
    for index in range(2):
        batch = random_ids(1, 3), random_ids(1, 3)
        assert adapter.training_step(batch, index) is None
        adapter.configure_gradient_clipping(optimizer)


def test_older_cards_train_in_fp16(monkeypatch):
    """A T4 computes in bf16 too, by emulation, which is what torch's own question allows."""
    device = torch.device("cuda")
    for capability, precision in (((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        found = Mock(return_value=capability)
        monkeypatch.setattr(torch.cuda, "get_device_capability", found)
        assert run.choose_precision("auto", device) == precision


def test_bad_weights_are_no_checkpoint(tmp_path):
    model = tiny_model()
    progress = run.Progress(save=lambda state: tmp_path / "written")
    progress.begin(run.TrainConfig(), 10, model=model)
    progress.save()
    assert progress.checkpoint == tmp_path / "written"
    with torch.no_grad():
        model.embedding.weight[3, 3] = math.inf
    with pytest.raises(run.Failed, match=f"no number; last good.*{tmp_path}"):
        progress.save()


@pytest.mark.parametrize("loop", ["raw", "lightning"])
def test_a_diverging_run_ends_in_one_line(loop, tmp_path):
    arguments = (*SMALL, "--loop", loop, "--no-modlee", "--output", tmp_path / "model")
    arguments += ("--learning-rate", 4e9, "--clip-norm", 0)
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.match(r"error: the loss of step \d+ is nan", last)
    assert not (tmp_path / "model").exists()


def test_without_a_compiler_training_goes_on(prepared, monkeypatch, capsys):
    def fail(*arguments, **more):
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    model = tiny_model()
    run.compile_model(model)
    assert capsys.readouterr().err.count("\n") == 1
    assert all(part._compiled_call_impl is None for part in model.modules())
    arguments = ("--compile", "--loop", "lightning")
    assert main("train", *arguments) == 2
    assert "--loop raw" in capsys.readouterr().err


def test_a_compiled_model_has_the_same_loss_and_gradients(prepared):
    """For batches of several shapes, which share the graphs: one for each kind of layer, another
    where a batch has no pads."""
    model, compiled = (
        tiny_model(
            vocab_size=len(prepared.tokenizer),
            dropout=0.0,
            num_encoder_layers=1,
            num_decoder_layers=1,
        )
        for _ in range(2)
    )
    if not run.compile_model(compiled):
        pytest.skip("nothing can compile here")
    before = run.count_graphs()
    for count in (3, 5, 7):
        batch = data.pad_batch([prepared.train[row] for row in range(count)])
        losses = []
        for network in (model, compiled):
            network.zero_grad()
            loss, tokens = run.batch_loss(network, batch, 0)
            (loss / tokens).backward()
            losses.append(loss / tokens)
        assert close(*losses, 1e-5)
        for ours, theirs in zip(model.parameters(), compiled.parameters()):
            assert close(ours.grad, theirs.grad, 1e-4)
    assert 0 < run.count_graphs() - before <= 4


@pytest.mark.parametrize("name", ["cosine", "cooldown"])
def test_the_schedule_rises_and_ends_near_zero(name):
    config = run.TrainConfig(learning_rate=1.0, warmup=0.1, schedule=name)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=1.0)
    schedule = run.build_schedule(optimizer, config, 100)
    rates = []
    for _ in range(100):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    if name == "cosine":
        assert rates[-1] < 1e-3
    else:
        assert rates[70] == 1.0 and rates[-1] == pytest.approx(1 / 30)
        assert rates[85] == pytest.approx(0.5)


# ---- judged while it trains -------------------------------------------------------------------


def test_the_average_of_weights_is_the_formula():
    """Of all weights alike at first, then of the newest; and the model gets its own back."""
    model = torch.nn.Linear(2, 1, bias=False)
    average = run.WeightAverage(model, updates=4)
    values = [1.0, 5.0, 3.0, 7.0, 2.0, 2.0]
    expected = 0.0
    for count, value in enumerate(values, 1):
        torch.nn.init.constant_(model.weight, value)
        average.update()
        share = max(1 / count, 1 / 4)
        expected += share * (value - expected)
    with average.in_place():
        assert close(model.weight, torch.full((1, 2), expected))
        with pytest.raises(RuntimeError), average.in_place():
            raise RuntimeError
        assert close(model.weight, torch.full((1, 2), expected))
    assert (model.weight == 2.0).all()


@pytest.mark.parametrize("loop", ["raw", "lightning"])
def test_averaged_weights_are_validated_and_the_others_trained(prepared, loop, monkeypatch):
    monkeypatch.setattr(run, "LOG_EVERY", 3)
    plain, plain_progress, _ = fit(prepared, loop)
    model, progress, _ = fit(prepared, loop, average=0.9)
    assert same_weights(plain, model) and progress.train == plain_progress.train
    assert progress.validation != plain_progress.validation
    loader = data.make_loader(prepared.validation, 64, 0, shuffle=False)
    with progress.averaged():
        loss = run.validate(model, loader, contextlib.nullcontext())
    assert progress.validation[-1] == (progress.step, loss)
    assert not model.embedding.weight[0].any()  # the pad's row


@pytest.mark.parametrize("loop", ["raw", "lightning"])
def test_the_average_is_of_trained_weights_from_the_first_epoch_on(prepared, loop, monkeypatch):
    """Which may be over before the first point of the curve."""
    monkeypatch.setattr(run, "LOG_EVERY", 1000)
    _, progress, _ = fit(prepared, loop, average=0.5)
    assert progress.validation[1][1] < progress.validation[0][1] - 0.01


def test_an_average_of_too_few_steps_is_said(prepared, capsys, monkeypatch):
    for every, times in ((1000, 1), (1, 0)):
        monkeypatch.setattr(run, "LOG_EVERY", every)
        fit(prepared, "raw", average=0.5)
        assert capsys.readouterr().err.count("too few for --average") == times


@pytest.mark.parametrize("loop", ["raw", "lightning"])
def test_training_ends_when_patience_does(prepared, loop, tmp_path):
    """Without learning no loss is better than the first. Nor is one after a resumption."""
    settings = {"learning_rate": 0.0, "max_epochs": 7, "patience": 2}
    state = {}
    progress = run.Progress(save=lambda s: state.update(s) or tmp_path, every=(1, 1e9))
    fit(prepared, loop, progress=progress, **settings)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    _, progress, _ = fit(prepared, loop, state=torch.load(buffer), **settings)
    batches = math.ceil(len(prepared.train) / 64)
    assert progress.epoch == 3 and progress.step == 3 * batches
    assert progress.best == (progress.validation[0][1], batches)
    assert progress.exit_code == 0


@pytest.mark.parametrize("loop", ["raw", "lightning"])
def test_a_signal_in_the_last_step_of_an_epoch_ends_training(prepared, loop):
    """Where every step is the last of its epoch, too."""

    class Signalled(run.Progress):
        def end_step(self):
            self._signal = signal.SIGTERM if self.batch == self._batches else 0
            return super().end_step()

    _, progress, _ = fit(prepared, loop, progress=Signalled(), max_epochs=5)
    assert progress.epoch == len(progress.validation) == 1
    assert progress.exit_code == 128 + signal.SIGTERM


@pytest.mark.parametrize("loop", ["raw", "lightning"])
def test_the_best_weights_are_kept_and_the_last_beside_them(loop, tmp_path, monkeypatch, capsys):
    from safetensors.torch import load_file

    losses, kept = iter([3.0, 2.0, 2.5]), []
    end_epoch = run.Progress.end_epoch

    def judge(self, loss: float) -> None:
        end_epoch(self, next(losses))
        kept.append({k: v.clone() for k, v in self._parts["model"].state_dict().items()})

    monkeypatch.setattr(run.Progress, "end_epoch", judge)
    more = ("--no-modlee", "--loop", loop, "--max-epochs", 3)
    assert main(*SMALL, *more, "--output", tmp_path / "model") == 0
    best = load_file(tmp_path / "model" / "model.safetensors")
    last = load_file(tmp_path / "model" / "last.safetensors")
    assert all(torch.equal(best[name], kept[1][name]) for name in best)
    assert all(torch.equal(last[name], kept[2][name]) for name in last)
    assert any(not torch.equal(best[name], last[name]) for name in best)
    assert "validation 2.0000, the best, of step" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "model" / "metrics.json").read_text())
    assert metrics["val_loss"] == 2.0 and metrics["best_step"] < metrics["steps"]


@pytest.mark.parametrize("loop", ["raw", "lightning"])
def test_a_run_is_seen_while_it_trains(loop, tmp_path, monkeypatch, capsys):
    """Time left and samples on stderr, the picture, MLflow with the model folder, TensorBoard."""
    mlflow = pytest.importorskip("mlflow")
    has_tensorboard = run.find_spec("tensorboard") is not None
    drawn, draw = [], run.draw_curves

    def look(path: Path, progress) -> None:
        draw(path, progress)
        drawn.append((path.parent.name, len(progress.bleu)))

    monkeypatch.setattr(run, "draw_curves", look)
    monkeypatch.setattr(run.Picture, "PAUSE", 0)
    more = ("--loop", loop, "--max-epochs", 2, "--bleu-pairs", 7, "--batch-size", 16)
    more += ("--mlruns", tmp_path / "mlruns")
    more += ("--tensorboard", tmp_path / "tb") if has_tensorboard else ()
    output = tmp_path / "model"
    assert main(*SMALL, *more, "--output", output) == 0
    assert drawn == [("model.checkpoints", 1), ("model.checkpoints", 2)] + drawn[2:]
    said = capsys.readouterr()
    (line,) = [part for part in said.err.splitlines() if "epoch 1/2: train" in part]
    assert re.search(r"validation \d.*BLEU .* of 7 pairs, 0:0\d:\d\d left", line)
    assert not list(output.parent.glob("*.checkpoints"))
    client = mlflow.MlflowClient(run.mlruns_folder(tmp_path / "mlruns").as_uri())
    (found,) = client.search_runs(["0"])
    assert found.info.status == "FINISHED"
    assert found.data.params["max_epochs"] == "2"
    curves = {
        name: [
            (point.step, point.value)
            for point in client.get_metric_history(found.info.run_id, name)
        ]
        for name in (
            "train/loss",
            "train/learning_rate",
            "validation/loss",
            "validation/BLEU",
        )
    }
    assert [len(curves[name]) for name in curves] == [3, 3, 2, 2]
    metrics = json.loads((output / "metrics.json").read_text())
    assert curves["validation/loss"][-1] == (metrics["steps"], metrics["last_val_loss"])
    assert found.data.metrics["final/bleu"] == metrics["bleu"]
    root = Path(found.info.artifact_uri.removeprefix("file://"))
    names = {path.name for path in output.iterdir()}
    assert names == {path.name for path in (root / "model").iterdir()}
    weights = (root / "model" / "model.safetensors", output / "model.safetensors")
    assert weights[0].samefile(weights[1]) and (root / "loss.png").exists()
    if not has_tensorboard:
        assert main(*SMALL, "--tensorboard", tmp_path / "tb") == 2
        assert "pip install tensorboard" in capsys.readouterr().err
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb" / "model"))
    events.Reload()
    for name, points in curves.items():
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in seen] == [step for step, _ in points]
        assert np.allclose([v for _, v in seen], [v for _, v in points])


def test_best_weights_of_another_run_are_not_taken(tmp_path, capsys):
    """As a run that was killed may leave them: what is kept must be what is said."""
    progress = run.Progress()
    progress.best, progress.step, progress.validation = (
        (1.5, 3),
        9,
        [(3, 1.5), (9, 2.0)],
    )
    cpu, weights = torch.device("cpu"), {"w": torch.ones(2)}
    for best, found in (((1.5, 3), weights), ((1.5, 6), None), ((1.4, 3), None)):
        run.write_best(tmp_path, 0, {"weights": weights, "best": best})
        assert (run.best_weights(tmp_path, progress, cpu) is None) == (found is None)
    assert capsys.readouterr().err.count("the last are kept") == 2
    (tmp_path / "best.pt").write_bytes(b"damaged")
    assert run.best_weights(tmp_path, progress, cpu) is None
    progress.step = 3
    assert run.best_weights(tmp_path, progress, cpu) is None


def test_a_broken_record_ends_no_training(tmp_path, capsys, monkeypatch):
    pytest.importorskip("mlflow")
    draw = run.draw_curves

    def fail(*_) -> None:
        raise OSError("No space left on device")

    def fail_at_first(path: Path, progress) -> None:
        if path.parent.name.endswith(".checkpoints"):
            fail()
        draw(path, progress)

    monkeypatch.setattr(run, "draw_curves", fail_at_first)
    monkeypatch.setattr(run.MlflowRun, "_begin", fail)
    more = ("--loop", "raw", "--mlruns", tmp_path / "mlruns")
    assert main(*SMALL, *more, "--output", tmp_path / "model") == 0
    error = capsys.readouterr().err
    for name in ("MlflowRun", "Picture"):
        note = f"note: no more records: {name}: No space left on device"
        assert error.count(note) == 1
    assert (tmp_path / "model" / "loss.png").is_file()


def test_a_store_without_a_default_experiment_gets_one(tmp_path):
    pytest.importorskip("mlflow")
    folder = tmp_path / "mlruns"
    folder.mkdir()
    (folder / ".DS_Store").touch()  # which is enough to be taken for a store
    config = run.TrainConfig(mlruns=str(folder), output="model")
    recorder = run.MlflowRun(config)
    recorder.update(run.Progress())
    recorder.end("FINISHED")
    assert recorder.client.get_run(recorder.run_id).info.status == "FINISHED"


def test_mlflow_is_told_to_report_nothing():
    code = "import os, run; print(os.environ['MLFLOW_DISABLE_TELEMETRY'])"
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    assert python("-c", code, cwd=HERE, env=env).stdout.strip() == "true"


def test_samples_change_nothing_that_is_learnt(tmp_path):
    from safetensors.torch import load_file

    weights = []
    for pairs in (0, 5):
        output = tmp_path / f"model-{pairs}"
        more = ("--loop", "raw", "--dropout", 0.1, "--max-epochs", 2)
        assert main(*SMALL, *more, "--bleu-pairs", pairs, "--output", output) == 0
        weights.append(load_file(output / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_time_left_is_that_of_the_steps_to_come():
    progress = run.Progress()
    progress.step, progress.total_steps, progress.seconds = 100, 400, 1234.0
    assert progress.time_left == "1:01:42"
    progress.watched = 10.0
    assert progress.time_left == "1:02:12"


def test_the_time_left_counts_the_validation_just_done(prepared, monkeypatch):
    seconds = []
    progress = run.Progress(watch=lambda progress, _: seconds.append(progress.seconds))
    validate = run.validate

    def long(*arguments) -> float:
        progress._started -= 1000  # as if it took so long
        return validate(*arguments)

    monkeypatch.setattr(run, "validate", long)
    fit(prepared, "raw", progress=progress)
    assert seconds[0] >= 1000 and seconds[1] >= 2000


# ---- fair scores ------------------------------------------------------------------------------


def test_held_out_parts_are_trained_without_and_scored_on(tmp_path, capsys):
    """No source sentence of validation or test is learnt, even if it is handed in."""
    rows = list(data.phrasebook(400))
    rows += [(source, target + "!") for source, target in rows[:50]]
    pairs = write_pairs(tmp_path / "pairs.tsv", rows)
    own = (*SMALL[2:], "--dataset", pairs, "--max-length", 200, "--validation-size", 30)
    own += ("--test-size", 40, "--loop", "raw", "--beam", 2, "--output", tmp_path / "m")
    assert main(*own) == 0
    said = capsys.readouterr().out
    parts = {name: read_all(tmp_path / "m" / f"{name}.tsv") for name in ("validation", "test")}
    assert f"{len(parts['test'])} test pairs, beam 2" in said
    held_out = {source for part in parts.values() for source, _ in part}
    assert [len({source for source, _ in part}) for part in parts.values()] == [30, 40]
    assert len(held_out) == 70
    # The model's own test part is what it is evaluated on by default, with the same score.
    report = tmp_path / "report.json"
    assert main("evaluate", "--model", tmp_path / "m", "--beam", 2, "--json", report) == 0
    metrics = json.loads((tmp_path / "m" / "metrics.json").read_text())
    assert json.loads(report.read_text())["bleu"] == metrics["bleu"]
    assert metrics["pairs"]["test"] == len(parts["test"])
    # Handed in as sets, they are left out of training.
    sets = {name: str(tmp_path / "m" / f"{name}.tsv") for name in parts}
    more = ("--validation-set", sets["validation"], "--test-set", sets["test"])
    config = run.parse_command_line(list(map(str, (*own, *more))))[1]
    prepared = run.prepare_data(config)
    assert prepared.dropped["held out"] == sum(source in held_out for source, _ in rows)
    assert [pair[:2] for pair in prepared.test_pairs] == parts["test"]
    assert [pair[:2] for pair in prepared.validation_pairs] == parts["validation"]
    short = run.prepare_data(dataclasses.replace(config, max_length=12))
    lost = len(parts["validation"]) - len(short.validation)
    assert short.dropped["over-long validation"] == lost > 0
    for wrong in ("vall", tmp_path / "no.tsv"):
        flags = ("--dataset", pairs, "--validation-set", wrong, "--preset", "base")
        assert main(*SMALL, *flags, "--output", tmp_path / "n") == 2
    assert "has no split 'vall', and files end in" in capsys.readouterr().err
    assert main(*own, "--test-size", 450, "--output", tmp_path / "n") == 2
    assert "give more pairs or hold out fewer" in capsys.readouterr().err


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path):
    names = [run.claim_name(tmp_path / "now", 0, 1) for _ in range(3)]
    assert [name.name for name in names] == ["now", "now-2", "now-3"]
    assert (tmp_path / "now-3.checkpoints").is_dir()


def test_a_score_that_is_interrupted_leaves_a_model_and_says_so(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments) -> None:
        raise run.Interrupted(130)

    monkeypatch.setattr(run, "score_model", interrupted)
    output = tmp_path / "a model"
    assert main(*SMALL, "--loop", "raw", "--output", output) == 130
    assert f"evaluate --model '{output}'" in capsys.readouterr().err
    assert main("translate", "--model", output, "I see.") == 0


def test_a_hub_data_set_is_validated_and_tested_on_its_own_splits(hub_home, tmp_path):
    env = os.environ | {"HF_HOME": str(hub_home), "HF_HUB_OFFLINE": "1"}
    more = ("--preset", "base", "--device", "cpu", *SMALL[2:], "--loop", "raw")
    more += ("--beam", "1", "--batch-tokens", 500)
    done = command(*more, "--output", tmp_path / "m", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "m" / "metrics.json").read_text())
    assert metrics["pairs"] == {"train": 190, "validation": 30, "test": 40}
    assert metrics["dropped"]["held out"] == 10
    assert metrics["scored"] == "test" and "40 test pairs, greedy" in done.stdout
    more += ("--output", tmp_path / "n")
    done = command(*more, "--test-set", "dev", cwd=tmp_path, env=env)
    assert done.returncode == 2 and "--test-set: wmt16 has no split 'dev'" in done.stderr
    pairs = write_pairs(tmp_path / "pairs.tsv", list(data.phrasebook(100)))
    done = command(*more, "--dataset", pairs, cwd=tmp_path, env=env)
    assert "no split 'validation', as the preset has it" in done.stderr
    assert "20 validation pairs, greedy" in done.stdout


def test_evaluate_compares_two_models_and_names_the_worst(folder, tmp_path, capsys):
    rows = list(data.phrasebook(40, seed=3))
    pairs = write_pairs(tmp_path / "pairs.tsv", rows)
    out, table = tmp_path / "out.json", tmp_path / "worst.tsv"
    more = ("--dataset", pairs, "--json", out, "--sentences", table)
    assert main("evaluate", "--model", folder, *more, "--against", folder) == 0
    whole = json.loads(out.read_text())
    assert (whole["beam"], whole["precision"]) == (1, "fp32")
    found = whole["against"]
    assert found.pop("model") == str(folder)
    assert set(found) == {"BLEU", "chrF"}
    for metric in found.values():
        assert metric["ours"][0] == metric["theirs"][0] and metric["p"] == 1
    assert "could be chance" in capsys.readouterr().out
    head, *lines = [line.split("\t") for line in table.read_text("utf-8").splitlines()]
    assert head == ["chrF", "pair", "source", "translation", "reference"]
    assert [float(line[0]) for line in lines] == sorted(float(line[0]) for line in lines)
    assert sorted((int(n), s, r) for _, n, s, _, r in lines) == [
        (n, *row) for n, row in enumerate(rows, 1)
    ]


def test_a_better_system_is_better_by_more_than_chance():
    references = [target for _, target in data.phrasebook(200)]
    worse = [" ".join(reversed(text.split())) for text in references]
    found = run.compare(references, worse, references)
    assert found["BLEU"]["ours"][0] > 99 and found["BLEU"]["theirs"][0] < 50
    assert found["BLEU"]["p"] < 0.05 and found["chrF"]["p"] < 0.05
    spaced = run.compare([f"{text} " for text in references], references, references)
    assert spaced["BLEU"]["p"] == 1.0


def test_clipping_bounds_the_gradient_norm():
    model = tiny_model()
    model(random_ids(2, 5), random_ids(2, 5)).sum().backward()
    run.clip_gradients(model, run.TrainConfig(clip_norm=0.25))
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm.item() == pytest.approx(0.25, rel=1e-3)


# ---- what a step costs ------------------------------------------------------------------------


TINY = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "batch_size": 32}
TINY |= {"num_encoder_layers": 1, "num_decoder_layers": 1}


def bench_case(prepared, device="cpu", **changes):
    config = run.TrainConfig(**TINY, max_epochs=1, precision="fp32", **changes)
    model, loaders, progress = run.bench_case(config, prepared, torch.device(device))
    sampler = loaders[0].batch_sampler
    sampler.windows = 1
    sampler.set_epoch(0)
    return config, model, loaders, progress


def test_two_turns_are_the_same_work(prepared):
    _, model, loaders, _ = bench_case(prepared)
    sampler = loaders[0].batch_sampler
    sampler.windows = 2
    sampler.set_epoch(0)
    seen = []
    sampler.gate = seen.append
    batches = list(itertools.islice(sampler, 2 * run.WINDOW))
    assert batches[: run.WINDOW] == batches[run.WINDOW :]
    assert seen == list(range(2 * run.WINDOW))
    work = run.describe_work(sampler, model.config)
    rows = [row for batch in batches[: run.WINDOW] for row in batch]
    pairs = [prepared.train[row] for row in rows]
    assert work["source_tokens"] == sum(len(s) for s, _ in pairs) / run.WINDOW
    assert work["target_tokens"] == sum(len(t) for _, t in pairs) / run.WINDOW
    flops = sum(count_flops(model.config, len(s), len(t)) for s, t in pairs)
    assert work["flops"] == 3 * flops / run.WINDOW
    tokens = [sampler.window_tokens(index, 2) for index in (0, run.WINDOW)]
    assert tokens[0] == tokens[1] == sum(map(sampler.target_tokens, (0, 1)))


@pytest.mark.parametrize(
    "arm",
    ["barebones", "off", "bar", "log", "checkpoint", "clip", "defaults", "shipped"],
)
def test_every_arm_trains_like_the_raw_loop(prepared, arm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ends = []
    for name in ("raw", arm):
        config, model, loaders, progress = bench_case(prepared, clip_norm=0.1)
        run.run_arm(run.ARMS[name], model, loaders, config, progress, prepared)
        ends.append((progress.train, progress.validation, model))
    assert ends[0][:2] == ends[1][:2] and ends[0][0][0][0] == run.WINDOW
    assert same_weights(ends[0][2], ends[1][2])
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert any(name.endswith(".ckpt") for name in left) == (arm in ("checkpoint", "defaults"))
    # By itself Lightning logs to TensorBoard where that is installed.
    logs = [name for name in left if name.endswith(".csv") or ".tfevents." in name]
    assert bool(logs) == (arm in ("log", "defaults"))


def test_a_step_is_taken_apart_without_a_remainder(prepared, monkeypatch):
    """Every part is called as often as it should be, and is itself again afterwards."""
    config, model, loaders, progress = bench_case(prepared)
    gate = run.Gate(None, torch.device("cpu"), progress)
    ticks = itertools.count()
    monkeypatch.setattr(gate, "clock", lambda: next(ticks))
    loss, backward = run.batch_loss, torch.Tensor.backward
    with run.taken_apart(gate, wait=True):
        run.train_raw(model, *loaders, config, progress)
    steps = run.WINDOW
    validated = len(loaders[1])
    assert gate.parts.pop("forward") == steps + validated
    assert gate.parts.pop("data") >= steps + validated
    assert gate.parts == dict.fromkeys(("backward", "clipping", "optimizer"), steps)
    assert (run.batch_loss, torch.Tensor.backward) == (loss, backward)


def test_the_difference_of_pairs_has_an_interval():
    random_state = np.random.default_rng(1)
    reference = 1.0 + 0.1 * random_state.standard_normal(40)
    noise = 0.01 * random_state.standard_normal(40)
    found = run.paired_difference(reference + 0.2 + noise, reference)
    assert found.low < 0.2 / run.WINDOW < found.high
    assert found.high - found.low < 0.02 / run.WINDOW
    stalled = reference + 0.2 + noise
    stalled[3] += 30  # one stall of the machine
    again = run.paired_difference(stalled, reference)
    assert again.value == pytest.approx(found.value, abs=0.005 / run.WINDOW)


def served(name: str, order: list, loss: float = 5.0):
    """A stand-in for an arm: its loop takes as many ms a step as its name has letters."""

    def ask(*question) -> dict:
        order.append(name)
        parts = {"forward": 0.8, "backward": 1.2}
        seconds = 2.0 + len(name) * 1e-3 * run.WINDOW
        measured = {"seconds": seconds, "parts": parts, "points": [(20, loss)]}
        return measured | {"peak": 2**20, "device_seconds": None}

    return ask


def test_arms_take_turns_there_and_back():
    order, names = [], ["raw", "off", "clip"]
    bar = argparse.Namespace(update=lambda count=1: None)
    serve = {name: served(name, order) for name in names}
    found = run.take_turns(names, serve, 2, bar)
    assert order == [*names, *names, *reversed(names)]
    assert [len(found[name]["answers"]) for name in names] == [2, 2, 2]
    serve["clip"] = served("clip", order, 5.0000001)
    del order[:]
    with pytest.raises(data.InputError, match="nothing was timed"):
        run.take_turns(names, serve, 2, bar)
    assert order == names


def test_costs_are_itemised_and_drawn(tmp_path, capsys):
    bar = argparse.Namespace(update=lambda count=1: None)
    sizes = {"small": 1e9, "demo": 4e9}
    cpu = torch.device("cpu")
    report = {"rows": [], "sizes": {}, "left_out": {}, "start": {}, "precision": "fp32"}
    report |= {
        "machine": "a machine",
        "matmul_gflops": 100.0,
        "versions": run.versions(),
    }
    for size, flops in sizes.items():
        work = {"source_tokens": 10, "target_tokens": 20, "padding_share": 0.1}
        model = dataclasses.asdict(tiny_model().config)
        report["sizes"][size] = work | {"flops": flops, "model": model}
        for group in run.GROUPS[: 1 if size == "small" else None]:
            serve = {name: served(name, []) for name in group}
            found = run.take_turns(list(group), serve, 3, bar)
            report["rows"] += run.describe_arms(size, found, report["sizes"][size], 1e11, cpu)
    rows = {row["arm"]: row for row in report["rows"] if row["size"] == "demo"}
    assert rows["clip"]["beside"] == "off" and rows["modlee-data"]["beside"] == "autolog"
    assert rows["clip"]["more_ms"]["loop"] == pytest.approx([1, 1, 1])  # clip - off letters
    assert rows["off"]["more_ms"]["whole"] == pytest.approx([0, 0, 0], abs=1e-9)
    assert rows["raw"]["mfu"] == pytest.approx(4e9 / (rows["raw"]["ms"] / 1e3) / 1e11)
    assert rows["raw"]["ms"] == pytest.approx(103)
    report["breakdown"] = run.describe_breakdown(found["autolog"]["answers"])
    assert report["breakdown"]["the loop"] == pytest.approx(len("autolog"))
    report["sum"] = run.describe_sum(report["rows"], "demo")
    letters = [len(name) - len(base) for name, base in run.ITEMS.items()]
    assert report["sum"]["parts"][0] == pytest.approx(sum(letters))
    report["start"] = {
        "ours": {"import": (1.0, "")},
        "stock": {"import": (1.0, ""), "Code": (2.0, "OSError: no network")},
    }
    run.print_bench(report)
    printed = capsys.readouterr().out
    assert "fails: OSError: no network" in printed and "noise" not in printed
    assert all(run.ARMS[name].label in printed for name in run.ARMS)
    run.draw_bench(tmp_path / "bench.png", report, "demo")
    assert (tmp_path / "bench.png").stat().st_size > 20_000
    for row in report["rows"]:
        row["more_ms"]["whole"][2] += 10
    run.print_bench(report)
    assert "too noisy" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["buckets", "longest", "fixed"])
def test_bench_train_counts_real_tokens(prepared, kind):
    batches, lengths = run.trainee_batches(prepared.train, kind, 600, 3, 1)
    real = sum(ids.ne(0).sum().item() for batch in batches for ids in batch)
    assert len(batches) == 3 and real == sum(map(sum, lengths))
    if kind == "fixed":
        assert all(ids.shape == (12, 50) for batch in batches for ids in batch)
    model = run.model_config("demo", 400)
    answers = [{"seconds": s, "memory": None, "graphs": 0} for s in (4.0, 2.0, 2.0)]
    row = run.describe_trainee("it", answers, batches, lengths, model, 1e9)
    flops = 3 * sum(count_flops(model, *pair) for pair in lengths)
    assert row["tokens_per_second"] == round(real / 2, 1)
    assert row["mfu"] == round(flops / 2 / 1e9, 4)
    padded = sum(ids.numel() for batch in batches for ids in batch)
    assert row["padding_share"] == round(1 - real / padded, 4)


def test_all_trainees_learn_the_same_task(prepared):
    """Each brings the loss down on one batch, and those with a correct loss start where ours does."""
    model_config = dataclasses.replace(run.model_config("demo", 400), dropout=0.0)
    (batch,), _ = run.trainee_batches(prepared.train, "longest", 300, 1, 1)
    losses = {}
    for name in ("ours", "tutorial", "torch", "marian", "x"):
        torch.manual_seed(0)
        build = run.TRAINEES[name].build
        try:
            model = (
                build(**dataclasses.asdict(model_config))
                if build is run.Ours
                else build(model_config)
            )
        except ImportError:
            continue
        run.same_scale(model, 128)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        losses[name] = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = model(*batch)
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
        assert losses[name][-1] < losses[name][0] - 0.3, name
    # Post-LN, Marian starts elsewhere, but not far away.
    for name, far in {"torch": 0.4, "marian": 1.2}.items():
        assert abs(losses[name][0] - losses["ours"][0]) < far, losses


@pytest.mark.parametrize("peers", [True, False])
def test_bench_train_prints_its_table(tmp_path, monkeypatch, capsys, peers):
    monkeypatch.setattr(run, "TRAINEES", {k: run.TRAINEES[k] for k in ("ours", "torch")})
    if not peers:
        growth = run.growth_cases

        def fewer(*arguments) -> dict:
            cases = growth(*arguments)
            return {n: cases[n] for n in ("budget 200", "length 8", "size demo")}

        monkeypatch.setattr(run, "growth_cases", fewer)
    report, picture = tmp_path / "train.json", tmp_path / "cost.png"
    more = ("--size", "demo", "--tokenizer", "train:320", "--batch-tokens", 200)
    more += ("--turns", 3, "--steps", 2, "--json", report, "--picture", picture)
    more += ("--device", "cpu", *(["--peers"] if peers else []))
    assert main("bench", "train", *more) == 0
    output = capsys.readouterr().out
    rows = json.loads(report.read_text())["rows"]
    if peers:
        assert set(rows) == {"ours", "torch"}
        assert rows["ours"]["ours_is_faster"] == [1.0, 1.0, 1.0]
        assert "nn.Transformer" in output and not picture.exists()
    else:
        assert set(rows) == {"budget 200", "length 8", "size demo"}
        assert rows["length 8"]["padding_share"] == 0.0
        assert picture.stat().st_size > 10_000
    assert all(row["tokens_per_second"] > 0 for row in rows.values())


def test_bench_writes_a_trace_of_ten_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "SIZES", {"cpu": {"small": {}, "demo": TINY}})
    path = tmp_path / "trace.json"
    assert main("bench", "--profile", path, "--device", "cpu") == 0
    events = json.loads(path.read_text())["traceEvents"]
    steps = [event for event in events if "Optimizer.step#Adam" in event["name"]]
    assert len(steps) == 10
    assert main("bench", "--picture", tmp_path / "none" / "bench.png") == 2
    assert "no file can be written" in capsys.readouterr().err


# ---- the wmt16 path ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub_home(tmp_path_factory, phrases) -> Path:
    """A Hugging Face home that answers offline to wmt16 / ro-en and to t5-small."""
    import datasets

    home = tmp_path_factory.mktemp("hub")
    rows = [{"translation": {"ro": ro, "en": en}} for en, ro in phrases[:250]]
    splits = {"train": rows[:200], "validation": rows[190:220], "test": rows[210:]}
    features = datasets.Features({"translation": datasets.Translation(["ro", "en"])})
    revision = "0" * 40
    for name in ("wmt16", "wmt___wmt16"):
        folder = home / "datasets" / name / "ro-en" / "0.0.0" / revision
        folder.mkdir(parents=True)
        for split, part in splits.items():
            path = str(folder / f"wmt16-{split}.arrow")
            writer = datasets.arrow_writer.ArrowWriter(path=path, features=features)
            for row in part:
                writer.write(row)
            writer.finalize()
        info = {
            "features": {"translation": {"languages": ["ro", "en"], "_type": "Translation"}},
            "builder_name": "parquet",
            "dataset_name": "wmt16",
            "config_name": "ro-en",
            "version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0},
            "splits": {
                split: {
                    "name": split,
                    "num_bytes": 1,
                    "num_examples": len(part),
                    "dataset_name": "wmt16",
                }
                for split, part in splits.items()
            },
        }
        (folder / "dataset_info.json").write_text(json.dumps(info))
    model = home / "hub" / "models--t5-small"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(revision)
    sides = [text for pair in phrases[:200] for text in pair]
    tokenizer = data.train_tokenizer(sides, 400)
    tokenizer.save_pretrained(model / "snapshots" / revision)
    (model / "snapshots" / revision / "config.json").write_text('{"model_type": "t5"}')
    return home


def test_the_tutorial_preset_runs_on_a_cached_wmt16(hub_home, tmp_path):
    env = os.environ | {"HF_HOME": str(hub_home), "HF_HUB_OFFLINE": "1"}
    sizes = ["--d-model", 32, "--dim-feedforward", 64, "--no-modlee"]
    output = tmp_path / "model"
    done = command("--preset", "tutorial", *sizes, "--output", output, env=env)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["pairs"] == {"train": 80, "validation": 20, "test": 0}
    assert metrics["steps"] == 5 and metrics["tokenizer"] == "t5-small"
    assert "wmt16/ro-en train[:80%]" in done.stdout


def test_the_tutorials_calls_run_on_a_cached_wmt16(hub_home):
    script = """
import data, seq2seq
input_ids, decoder_input_ids, tokenizer = data.load_dataset_and_tokenize(60)
assert input_ids.shape == decoder_input_ids.shape == (60, 50), input_ids.shape
train, val = data.create_dataloaders(input_ids, decoder_input_ids)
assert len(train.dataset) == 48 and len(val.dataset) == 12
model = seq2seq.TransformerSeq2SeqModel(len(tokenizer), d_model=32, nhead=4,
    num_encoder_layers=1, num_decoder_layers=1, max_length=50)
source, labels = next(iter(train))
logits = model(source, seq2seq.shift_right(labels))
assert logits.shape == (16, labels.size(1), len(tokenizer))
"""
    env = os.environ | {"HF_HOME": str(hub_home), "HF_HUB_OFFLINE": "1"}
    done = python("-c", script, env=env, cwd=HERE)
    assert done.returncode == 0, done.stderr


# ---- Modlee -----------------------------------------------------------------------------------


@needs_modlee
def test_importing_modlee_leaves_the_process_as_it_was():
    script = """
import logging, ssl, warnings, torch, run
run.import_lightning()
import mlflow, sklearn
def state():
    names = ["pytorch_lightning", "lightning.pytorch.core", "mlflow", "torchvision",
             "torch.nn", "sklearn", "pymfe", "numpy"]
    return (ssl._create_default_https_context, torch.get_rng_state().tolist(),
            list(logging.root.handlers), logging.root.level, list(warnings.filters),
            [(logging.getLogger(n).level, logging.getLogger(n).propagate) for n in names])
before = state()
assert run.import_modlee() is not None
after = state()
for one, other in zip(before, after):
    assert one == other, (one, other)
context = ssl._create_default_https_context()
assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname
"""
    done = python("-W", "ignore", "-c", script, cwd=HERE)
    assert done.returncode == 0, done.stderr


FROZEN = ("encoder_layers.0.linear1.weight",)


@pytest.fixture(scope="module")
def recorded(prepared, tmp_path_factory):
    """The same training without and with Modlee, and what the second left behind."""
    folder = tmp_path_factory.mktemp("modlee")
    work, home = folder / "work", folder / "home"
    work.mkdir()
    home.mkdir()
    plain = fit(prepared, "lightning", freeze=FROZEN)
    here, old_home = os.getcwd(), os.environ.get("HOME", "")
    os.chdir(work)
    os.environ["HOME"] = str(home)
    try:
        with_modlee = fit(prepared, "lightning", True, folder, FROZEN)
    finally:
        os.chdir(here)
        os.environ["HOME"] = old_home
    return plain, with_modlee, folder


@needs_modlee
def test_modlee_does_not_change_the_weights(recorded, prepared):
    (plain, plain_progress, _), (model, progress, _), _ = recorded
    assert same_weights(plain, model)
    raw, raw_progress, _ = fit(prepared, "raw", freeze=FROZEN)
    assert same_weights(raw, model) and raw_progress.train == progress.train
    assert plain_progress.train == progress.train
    assert plain_progress.validation == progress.validation


def test_a_snapshot_puts_everything_back():
    """What Modlee's callbacks change: random states, trainability, modes, print options."""
    model = tiny_model()
    model.embedding.weight.requires_grad_(False)
    model.dropout.eval()
    restore = run.snapshot(model)
    drawn = torch.rand(3).tolist(), np.random.rand(), random.random()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.train()
    torch.set_printoptions(threshold=math.inf)
    restore()
    assert (torch.rand(3).tolist(), np.random.rand(), random.random()) == drawn
    assert not model.embedding.weight.requires_grad
    assert model.output.weight is model.embedding.weight
    assert model.encoder_norm.weight.requires_grad
    assert not model.dropout.training and model.training
    assert torch._tensor_str.PRINT_OPTS.threshold == 1000


@needs_modlee
def test_a_frozen_parameter_stays_frozen(recorded):
    _, (model, _, _), _ = recorded
    start = tiny_model(vocab_size=model.config.vocab_size)
    (name,) = FROZEN
    assert not model.get_parameter(name).requires_grad
    assert torch.equal(model.get_parameter(name), start.get_parameter(name))
    assert model.get_parameter("embedding.weight").requires_grad


@needs_modlee
def test_modlee_leaves_nothing_behind_but_its_run(recorded):
    _, (_, _, record), folder = recorded
    assert not list((folder / "work").iterdir())
    assert not [p for p in (folder / "home").rglob("*") if p.name == "kwargs.txt"]
    assert Path(record.run_path).is_relative_to(folder / "mlruns")
    assert not list(folder.rglob("*.pth")) and not list(folder.rglob("*.ckpt"))
    assert torch._tensor_str.PRINT_OPTS.threshold == 1000
    root_handlers = [type(handler).__name__ for handler in logging.root.handlers]
    assert "StreamHandler" not in root_handlers


@needs_modlee
def test_modlee_records_its_artifacts(recorded, prepared):
    _, (_, progress, record), _ = recorded
    expected = "model.py model_graph.py model_graph.txt model_size model_metafeatures"
    expected = {*expected.split(), "data_metafeatures", "cached_vars"}
    assert expected <= set(record.artifacts)
    artifacts = Path(record.run_path) / "artifacts"
    features = json.loads((artifacts / "data_metafeatures").read_text())
    assert features["dataset_size"] == len(prepared.train)
    logged = (Path(record.run_path) / "metrics" / "val_loss").read_text().split()
    assert float(logged[-2]) == pytest.approx(progress.validation[-1][1], abs=1e-5)
    assert record.seconds > 0


@needs_modlee
def test_autologging_ends_with_the_fit(recorded):
    from mlflow.utils.autologging_utils import get_autologging_config

    assert get_autologging_config("pytorch", "disable") is True


@needs_modlee
def test_a_recorded_model_can_be_rebuilt(recorded):
    import mlflow
    import modlee

    _, (model, _, record), _ = recorded
    rebuilt = modlee.retriever.get_model(record.run_path)
    mlflow.pytorch.autolog(disable=True)  # its constructor switches it on
    rebuilt.model.load_state_dict(model.state_dict())
    source, target = random_ids(2, 6), random_ids(2, 5)
    assert torch.equal(rebuilt.model.eval()(source, target), model.eval()(source, target))


@needs_modlee
def test_pushing_to_a_dead_server_does_not_lose_the_run(recorded, capsys, monkeypatch):
    _, (_, _, record), folder = recorded
    monkeypatch.setenv("MODLEE_API_KEY", "secret-key-7f3a")
    monkeypatch.chdir(folder / "work")
    record.push()
    out = capsys.readouterr()
    assert "uploading" in out.out and "not uploaded" in out.out
    assert "secret-key-7f3a" not in out.out + out.err
    assert not list((folder / "work").iterdir())


# ---- the README -------------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("number", "expected"), [(0, ["reward", "desserts", "noitalsnart"]), (1, ["[("])]
)
def test_the_code_in_the_readme_runs_as_printed(number, expected, tmp_path):
    """The first piece with `positional.py` and `seq2seq.py` alone."""
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]
    files = ("positional.py", "seq2seq.py", "data.py", "run.py")
    for name in files[: 2 if number == 0 else 4]:
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "copied.py").write_text(code, encoding="utf-8")
    done = python("copied.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected), lines
    assert all(line.startswith(word) for line, word in zip(lines, expected)), lines
    if number == 1:
        losses = [
            loss
            for _, loss in json.loads(
                re.sub("[()]", lambda m: {"(": "[", ")": "]"}[m[0]], lines[0])
            )
        ]
        assert losses[-1] < losses[0] < math.log(28)


def readme_commands() -> list[str]:
    """What stands in the README's indented lines, but for the two commands that `.ci/run` runs."""
    lines = re.findall(r"^    ((?:\w+=\w+ )?\.venv/bin/.*)$", README, re.MULTILINE)
    return [line.split("  #")[0] for line in lines if "pip install" not in line]


@pytest.fixture(scope="module")
def workshop(folder, hub_home, tmp_path_factory) -> Path:
    """A folder with all the files that the README's commands name."""
    root = tmp_path_factory.mktemp("readme")
    (root / "results").mkdir()
    for name in ("NAME", "OTHER"):
        shutil.copytree(folder, root / "runs" / name)
    for name in ("pairs", "rosts.en-ro", "tatoeba.en-ro"):
        rows = list(data.phrasebook(400, seed=len(name)))
        write_pairs(root / f"{name}.tsv", rows)
    (root / "lines.en").write_text("I see a dog.\n\nThe cat sleeps.\n")
    return root


def test_every_test_that_the_readme_names_is_there():
    tests = [name for name in globals() if name.startswith("test_")]
    _, table = README.split("## Promises")
    names = re.findall(r"`(\w+)`", "".join(re.findall(r"\| (.*) \|$", table, re.MULTILINE)))
    promised = [name for name in names if not name.isupper() and "_" in name or name == "key"]
    assert len(promised) > 15
    for name in promised:
        assert any(name in test for test in tests), name


def test_every_command_of_the_readme_is_known():
    commands = [line for line in readme_commands() if " run.py" in line]
    assert len(commands) > 15
    for line in commands:
        words = line.split(" < ")[0].split(" run.py", maxsplit=1)[1]
        words = words.replace("--resume runs/NAME.checkpoints", "")
        run.parse_command_line(shlex.split(words))


@pytest.mark.parametrize("line", [c for c in readme_commands() if " bench" not in c])
def test_every_command_of_the_readme_runs(line, workshop, hub_home):
    """Made small by flags at its end; `bench` has tests of its own and runs in `.ci/run`."""
    line = line.replace(".venv/bin/python", sys.executable)
    line = line.replace(".venv/bin/torchrun", f"{sys.executable} -m torch.distributed.run")
    line = line.replace(".venv/bin/mlflow", f"{sys.executable} -m mlflow")
    env = os.environ | {"HF_HOME": str(hub_home), "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = str(HERE)
    line = line.replace(" run.py", f" {HERE / 'run.py'}")
    if "mlflow" in line:
        look_at_mlflow(line, workshop, env)
        return
    is_training = not re.search(r"run\.py (translate|evaluate|export)", line)
    if "--resume" in line:
        interrupt(workshop / "runs" / "NAME")
    elif "ctranslate2" in line or "--model fast" in line:
        pytest.importorskip("ctranslate2")
    elif is_training:
        line += (
            " " + " ".join(map(str, SMALL)) + " --no-modlee --device cpu --beam 1 --test-size 20"
        )
    done = subprocess.run(
        line,
        shell=True,
        cwd=workshop,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def interrupt(output: Path) -> None:
    """Leave the checkpoints of a run that was killed."""

    def die(self, *arguments) -> None:
        raise MemoryError

    shutil.rmtree(output)
    more = ("--no-modlee", "--loop", "raw", "--checkpoint-every", 3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(run.Progress, "end_epoch", die)
        main(*SMALL, *more, "--output", output)


def look_at_mlflow(line: str, root: Path, env: dict) -> None:
    """The server starts, and its page is there."""
    pytest.importorskip("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        f"exec env {line} --port {port} --workers 1",
        shell=True,
        cwd=root,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(600):
            assert server.poll() is None
            with contextlib.suppress(OSError):
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/").read()
                assert b"mlflow" in page.lower()
                return
            time.sleep(0.1)
        pytest.fail("no answer")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
