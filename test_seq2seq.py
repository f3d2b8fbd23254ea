"""Tests of the model, the data, the loops, the commands and the benchmarks, in that order.

    python -m pytest              offline, on two CPU cores, in seven minutes; no file is needed
    python -m pytest -n 0 -k ...  some of them, in one process

Tests that need Modlee are skipped where it is not installed.
"""

import contextlib
import copy
import csv
import dataclasses
import http.server
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import Mock, patch

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several test processes, which share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
import tyro
from hypothesis import HealthCheck, example, given, strategies
from hypothesis import settings as hypothesis_settings
from safetensors.torch import load_file, save_file

import data
import modlee_record
import run
import seq2seq
import translate
from benchmarks import decode as decode_bench
from benchmarks import figures, harness, lightning, quality
from benchmarks import train as train_bench
from data import InputError
from positional import POSITIONAL_KINDS, sinusoidal_positional_encoding
from seq2seq import (
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
MODULES = ("positional.py", "seq2seq.py", "data.py", "translate.py", "modlee_record.py", "run.py")
KINDS = list(POSITIONAL_KINDS)
ROMANIAN = "aăâbcdefghiîjklmnopqrsștțuvwxyzAĂÂBCDEFGHIÎJKLMNOPQRSȘTȚUVWXYZ„”«»–"
# The long versions of some tests: these many, where the environment says so.
EXAMPLES = int(os.environ.get("EXAMPLES", "0"))  # of hostile data, new ones every time
KILLS = int(os.environ.get("KILLS", "3"))
STEPS = int(os.environ.get("STEPS", "200"))
SENTENCES = int(os.environ.get("SENTENCES", "500"))
HAS_MODLEE = translate.versions()["modlee"] is not None
needs_modlee = pytest.mark.skipif(not HAS_MODLEE, reason="Modlee is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA")


def tiny_model(seed: int = 0, **changes) -> TransformerSeq2SeqModel:
    sizes = {"vocab_size": 50, "d_model": 32, "nhead": 4, "num_encoder_layers": 2}
    sizes |= {"num_decoder_layers": 2, "max_length": 40, "dim_feedforward": 64}
    torch.manual_seed(seed)
    return TransformerSeq2SeqModel(**(sizes | changes))


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Sentences without pads, [rows, length], ending in eos."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 50, (rows, length), generator=generator)
    ids[:, -1] = 1
    return ids


def resident_pages() -> int:
    """Resident memory of this process in pages, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1])


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
    with pytest.raises(ValueError, match="max_length >= 1"):
        sinusoidal_positional_encoding(0, width)


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


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_ends_at_its_limit_and_never_writes_the_start_token(kind):
    """Also for sentences longer than any in training; learned positions raise an error."""
    model, source = tiny_model(positional=kind, eos_id=49), random_ids(2, 90)
    torch.nn.init.zeros_(model.embedding.weight)  # all logits alike: the first that may be, 1
    if kind == "learned":
        assert greedy_decode(model, random_ids(1, 40)).tolist() == [[1] * 40]
        with pytest.raises(ValueError, match="90 tokens is longer than the 40 learned"):
            greedy_decode(model, source)
        return
    assert greedy_decode(model, source, 100).tolist() == [[1] * 100] * 2
    with pytest.raises(ValueError, match="at least 1"):
        greedy_decode(model, source, max_new_tokens=0)


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
        ({"activation": "gelu"}, "relu or relu2"),
        ({"dropout": 1.0}, "dropout"),
        ({"num_decoder_layers": 0}, "num_decoder_layers must be at least 1"),
        ({"eos_id": 0}, "pad_id and eos_id must differ"),
        ({"pad_id": 50}, "pad_id must be in"),
        ({"positional": "rotary", "d_model": 36}, "even head width"),
        ({"max_length": 0}, "max_length"),
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
    for row, column in labels.nonzero().tolist():
        expected -= (1 - smoothing) * log_p[row, column, labels[row, column]]
        expected -= smoothing * log_p[row, column].mean()
    assert close(loss, expected, 1e-3)
    logits[1, 3:] = 1e4
    assert close(sequence_loss(logits, labels, label_smoothing=smoothing)[0], loss)


def test_model_files_need_torch_alone():
    """The two files that people copy import only torch and the standard library."""
    for name in MODULES[:2]:
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
        activation={"relu": torch.relu, "relu2": lambda x: torch.relu(x) ** 2}[config.activation],
        batch_first=True,
        norm_first=config.norm_first,
    )
    names = {"self_attention_norm": "norm1", "cross_attention_norm": "norm2"}  # ours -> theirs
    names |= {"self_attention": "self_attn", "cross_attention": "multihead_attn"}
    names |= {"in_proj.": "in_proj_", "_layers": ".layers", "coder_norm": "coder.norm"}
    state = {}
    for name, parameter in model.named_parameters():
        last = "norm3" if name.startswith("decoder") else "norm2"
        for ours, theirs in (names | {"feed_forward_norm": last}).items():
            name = name.replace(ours, theirs)
        if name.startswith(("encoder.", "decoder.")):
            state[name] = parameter
    if not config.norm_first:
        reference.encoder.norm = reference.decoder.norm = None
    reference.load_state_dict(state)
    return reference, state


def torch_hidden(reference, model, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What `as_torch(model)` makes of the same embeddings: [B, T, D]."""
    pads, length = source == 0, target.size(1)
    return reference(
        model.embed(source),
        model.embed(shift_right(target)),
        tgt_mask=torch.ones(length, length, dtype=torch.bool).triu(1),
        src_key_padding_mask=pads,
        memory_key_padding_mask=pads,
    )


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
    ("rows", "d_model", "nhead", "encoder", "decoder", "activation"),
    [
        (4, 32, 4, 2, 2, "relu"),
        (4, 32, 4, 2, 2, "relu2"),
        (1, 24, 3, 1, 3, "relu2"),
        (5, 40, 1, 3, 1, "relu"),
        (2, 64, 64, 1, 1, "relu"),
    ],
)
def test_the_same_weights_in_nn_transformer_give_the_same_logits(
    norm_first, rows, d_model, nhead, encoder, decoder, activation
):
    sizes = {"d_model": d_model, "nhead": nhead, "num_encoder_layers": encoder}
    sizes["activation"] = activation
    sizes |= {"num_decoder_layers": decoder, "norm_first": norm_first, "dropout": 0.0}
    model = tiny_model(**sizes)
    for name, parameter in model.named_parameters():  # biases and norms that matter
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.3)
    reference, weights = as_torch(model)
    source, target = ragged(rows, 11), ragged(rows, 9, seed=1)
    expected = torch_hidden(reference, model, source, target) @ model.output.weight[:50].T
    logits = model(source, shift_right(target))
    real = target != 0  # what is right of a sentence does not count
    assert close(logits[real], expected[real])

    direction = torch.randn(int(real.sum()), 50)
    ours = torch.autograd.grad((logits[real] * direction).sum(), list(weights.values()))
    theirs = [dict(reference.named_parameters())[name] for name in weights]
    theirs = torch.autograd.grad((expected[real] * direction).sum(), theirs)
    for name, a, b in zip(weights, ours, theirs):
        assert close(a, b, 1e-5 * max(1.0, b.abs().max().item())), name


def overfit(**changes):
    """(model, sources, targets): 32 pairs of different lengths, trained until they are known."""
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
    if request.param == "untied":
        return overfit(tie_embeddings=False, activation="relu2")
    return overfit(norm_first=request.param == "pre-LN")


def numbered_tokenizer(vocab_size: int):
    """Token i is the word "i", except for <pad> 0, </s> 1, <unk> 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), *map(str, range(3, vocab_size))]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def without_pads(rows: torch.Tensor) -> list[list[int]]:
    """Up to the first eos: transformers 5 fills up with eos where pad is 0."""
    rows = [[i for i in row if i != 0] for row in rows.tolist()]
    return [row[: row.index(1) + 1] if 1 in row else row for row in rows]


def test_transformers_gives_the_same_logits_and_the_same_translations(learnt, tmp_path):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model, source, _ = learnt
    tokenizer = numbered_tokenizer(50)
    translate.complete_tokenizer(tokenizer, model.config)
    translate.to_transformers(model).save_pretrained(tmp_path)
    translate.save_tokenizer(tokenizer, tmp_path)
    reference = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert reference.config.vocab_size == 50
    assert AutoTokenizer.from_pretrained(tmp_path)("7 8")["input_ids"] == [7, 8, 1]
    # Unlearnt sentences too, where the model is in doubt.
    source = torch.cat([source, ragged(8, 12, seed=5), ragged(8, 12, seed=6)])
    mask = source.ne(0).long()
    decoder_input = shift_right(ragged(48, 10, seed=7))
    with torch.no_grad():
        logits = reference(
            input_ids=source, attention_mask=mask, decoder_input_ids=decoder_input
        ).logits
    assert close(logits, model(source, decoder_input), 1e-4)
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
                major, minor, *_ = map(int, run.versions()["transformers"].split("."))
                assert width > 1 and (major, minor) >= (4, 50)
                _, score = teacher_forced(model, source[row], theirs[row])
                assert best.score > score
    assert without_pads(greedy_decode(model, source, 20)) == [
        best.tokens for best, *_ in beam_search(model, source, 1, max_new_tokens=20)
    ]


@pytest.mark.parametrize("kind", ["sinusoidal", "learned", "rotary"])
def test_32_pairs_are_overfitted(kind):
    """Decoding reproduces exactly what was trained with teacher forcing."""
    model, source, target = overfit(positional=kind)
    assert without_pads(greedy_decode(model, source)) == without_pads(target)


def teacher_forced(model, source: torch.Tensor, tokens: list[int]):
    """(log-probability of each token, their mean) of a translation."""
    target = torch.tensor([tokens])
    logits = model(source[source != 0][None], shift_right(target))
    log_probs = logits.log_softmax(-1)[0].gather(1, target.T)[:, 0]
    return log_probs.tolist(), log_probs.mean().item()


def test_positions_unknown_to_transformers_are_refused():
    for kind in ("learned", "rotary", "none"):
        with pytest.raises(InputError, match=f"{kind} positions"):
            translate.to_transformers(tiny_model(positional=kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_ctranslate2_translates_alike(kind, norm_first, tied, tmp_path, monkeypatch):
    """Greedy output is token-identical, also with random weights, whose choices are close calls,
    and with a batch in three parts."""
    pytest.importorskip("ctranslate2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    changes = {"tie_embeddings": tied, "activation": "relu" if tied else "relu2"}
    model = tiny_model(positional=kind, norm_first=norm_first, **changes).eval()
    translate.to_ctranslate2(model, numbered_tokenizer(50), tmp_path)
    engine = translate.Engine(tmp_path, model.config, numbered_tokenizer(50), "cpu")
    source = torch.cat([ragged(8, 12, seed=seed) for seed in range(4)])
    source = source[source.ne(0).sum(1) > 1]  # it does not translate a source that is only eos
    translator = engine.translator = Mock(wraps=engine.translator)
    found = engine.decode(without_pads(source), 1, 1.0, 1, False)
    most = translator.translate_batch.call_args.kwargs["max_batch_size"]
    assert len(source) / 3 <= most < len(source) / 2 and engine.parts == 3
    expected = without_pads(greedy_decode(model, source))
    assert [best.tokens for (best,) in found] == expected
    assert len({tuple(row) for row in expected}) > 4


def test_ctranslate2_has_positions_for_all_that_can_be_decoded(tmp_path):
    pytest.importorskip("ctranslate2")
    model = tiny_model(max_length=600, d_model=16, num_encoder_layers=1, num_decoder_layers=1)
    with torch.no_grad():
        model.embedding.weight[1] = 0  # eos never wins
    translate.to_ctranslate2(model.eval(), numbered_tokenizer(50), tmp_path)
    engine = translate.Engine(tmp_path, model.config, numbered_tokenizer(50), "cpu")
    ((best,),) = engine.decode([[*[5] * 599, 1]], 1, 1.0, 1, False)
    assert len(best.tokens) == 2 * 600 + 10


def test_ctranslate2_finds_what_our_beams_find(learnt, tmp_path):
    """In most cases: it stops its search at another time. The same output has the same score."""
    pytest.importorskip("ctranslate2")
    model, source, _ = learnt
    tokenizer, rows = numbered_tokenizer(50), without_pads(source)
    for quantization, share in ((None, 0.8), ("int8", 0.7)):
        translate.to_ctranslate2(model, tokenizer, tmp_path, quantization)
        engine = translate.Engine(tmp_path, model.config, tokenizer, "cpu")
        for beam in (1, 4):
            found = engine.decode(rows, beam, 1.0, beam, True)
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


def test_the_cache_follows_rows_that_leave_and_hypotheses_that_branch():
    model, source = tiny_model().eval(), ragged(5, 9)
    target = random_ids(10, 12, seed=1)
    target[3, 6:] = target[2, 6:]  # of the same sentence; they differ before
    expected = model(source.repeat_interleave(2, dim=0), target)
    with torch.no_grad():
        cache = KeyValueCache(model, source, width=2)
        for step in range(6):
            model.decode_step(target[:, step], cache)
        cache.keep([1, 4, 3])
        rows = torch.tensor([2, 3, 8, 9, 6, 7])
        for step in range(6, 12):
            if step == 9:  # both hypotheses of the first sentence continue its first one
                cache.reorder([0, 0, 2, 3, 4, 5])
                rows[1] = 2
            logits = model.decode_step(target[rows, step], cache)
            assert close(logits, expected[rows, step])


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
    model, source = tiny_model(vocab_size=6, seed=4).eval(), torch.tensor([[3, 5, 1]])
    model.embedding.weight.data *= 3  # opinions
    best = (-math.inf, [])
    for length in (1, 2, 3):
        for tokens in itertools.product(range(1, 6), repeat=length):
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
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((observed - expected).abs() < 4 * deviation + 1 / count).all()
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


def test_decoding_leaves_the_model_as_it_was():
    """In either mode; surrounding autocast changes nothing."""
    model, source = tiny_model(d_model=256).train(), ragged(8, 9)
    for decode in (greedy_decode, beam_search):
        expected = decode(model, source)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = decode(model, source)
        assert torch.equal(found, expected) if torch.is_tensor(found) else found == expected
        with pytest.raises((RuntimeError, IndexError)):
            decode(model, torch.full((1, 3), 99))
        assert model.training
    model(source, source).sum().backward()
    model.encoder_layers.eval()
    greedy_decode(model, source)
    assert model.training and not model.encoder_layers[0].training
    with pytest.raises(ValueError, match="nothing to decode"):
        greedy_decode(model, torch.zeros(0, 3, dtype=torch.long))


def test_only_the_best_candidates_may_end():
    """Twice the beam are considered, so that enough continue; of those that end, only the ones
    within the beam count. Computed by hand: a beam of two, eos is 1."""
    beam = _Beam(width=2, length_penalty=1.0, limit=9)
    first = [(-0.1, -0.1, 0, 5), (-0.2, -0.2, 0, 6), (-0.3, -0.3, 0, 1), (-9, -9, 0, 7)]
    assert beam.advance(first, eos_id=1) == [0, 0], "the second continues the first"
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


def test_attention_weights_are_those_of_nn_transformer():
    model, source, labels = tiny_model().eval(), ragged(3, 9), ragged(3, 6, seed=1)
    reference, _ = as_torch(model)
    expected = []

    def keep(module, inputs, more, _) -> None:
        more |= {"need_weights": True, "average_attn_weights": False}
        expected.append(module.forward(*inputs, **more)[1])

    for layer in reference.decoder.layers:
        layer.multihead_attn.register_forward_hook(keep, with_kwargs=True)
    torch_hidden(reference.eval(), model, source, labels)
    weights = cross_attention_weights(model, source, labels)
    assert weights.shape == (2, 3, 4, 6, 9)
    assert close(weights.sum(-1), torch.ones(2, 3, 4, 6))
    assert (weights[:, source[:, None, None, :].expand(3, 4, 6, 9) == 0] == 0).all()
    weights, expected = (w.transpose(2, 3) for w in (weights, torch.stack(expected)))
    real = labels != 0
    assert close(weights[:, real], expected[:, real])  # [L, N, H, S]


# ---- skipping pads and logits -----------------------------------------------------------------


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
    """Its probability underflows float32, its loss does not."""
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
    """Checks the size of every tensor made, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(_ProjectedLoss, "PIECE", 50 * 40)  # the weights have 50 * 32
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
    assert largest == 50 * 40, "a piece"


def test_gradients_can_be_asked_for_twice_and_a_batch_of_nothing_has_some(monkeypatch):
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
    """Feed-forward blocks get only rows of real tokens; a batch without pads has no mask."""
    model, seen = tiny_model(), []
    for layer in (*model.encoder_layers, *model.decoder_layers):
        layer.linear1.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    input_ids, labels = padded_batch([(3, 9), (12, 2)])
    model(input_ids, labels=labels)
    assert seen == [15, 15, 11, 11]
    assert model.encode(random_ids(3, 5))[1].mask is None
    assert model.encode(input_ids)[1].mask is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_first", [True, False])
def test_pads_that_are_kept_change_no_loss_and_no_gradient(kind, norm_first, monkeypatch):
    """The path of other devices, with one sentence of only pads on either side."""
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
    """On the device "meta", whose tensors have no values: a step that needed one on the host would
    fail. The mode names the operator."""
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


def test_text_is_normalised():
    """To comma below, one space between words, and without invisible characters."""
    assert data.normalize("  Ştiinţa\tşi  ŢARA ", "ro") == "Știința și ȚARA"
    assert data.normalize("Beşiktaş", "en") == "Beşiktaş"
    assert data.normalize("s\u0326i ra\u0306u", "ro") == "și rău"
    hidden = "\ufeffcă\u00ad\u200bs\u200d\u0326uță\u2060\u200e "
    assert data.normalize(hidden, "ro") == "cășuță"
    assert data.normalize("\ufeff", "en") == ""
    family = "👨\u200d👩\u200d👧"  # here the joiner is seen
    assert data.normalize(family, "en") == family
    assert data.normalize("می\u200cخواهم", "fa") == "می\u200cخواهم"


@pytest.mark.parametrize("name", ["ro", "RO", "ron", "rum", "ro-MD", "ro_RO", "ron_Latn"])
def test_a_language_is_known_in_all_usual_spellings(name, capsys, tmp_path):
    assert data.normalize("ţară", name) == data.normalize("ţară", " Romanian") == "țară"
    path = write_pairs(tmp_path / "a.tsv", [("a", "ţ")])
    assert read_all(path, languages=("eng_Latn", name)) == [("a", "ț")]
    assert "no rules" not in capsys.readouterr().err
    assert read_all(path, languages=("en", "tr")) == [("a", "ţ")]
    assert "no rules are known for the language 'tr'" in capsys.readouterr().err


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
    """One sentence for each rule that is more than replacing words."""
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
    numerals = {"two dogs": "doi câini", "two apples": "două mere"}
    numerals |= {"twenty keys": "douăzeci de chei", "twenty children": "douăzeci de copii"}
    for english, expected in numerals.items():
        found = [there.lower() for here, there in phrases if english in here.lower()]
        assert found and all(expected in romanian for romanian in found)


def write_pairs(path: Path, pairs) -> Path:
    path.write_text("".join(f"{a}\t{b}\n" for a, b in pairs), encoding="utf-8")
    return path


def read_all(*names, **more) -> list[tuple[str, str]]:
    return [pair[:2] for pair in data.read_pairs([str(name) for name in names], **more)]


PAIRS = [('One, "two".', "Unu, „doi”."), ("It's a cat.", "Este o pisică."), ("", "gol")]


def test_every_format_holds_the_same_pairs(tmp_path):
    """Written in other ways than by `write_as`, and concatenated."""
    import pyarrow.parquet

    records = [{"en": en, "ro": ro} for en, ro in PAIRS]
    swapped = "".join(f"{ro}\t{en}\r\n" for en, ro in PAIRS)
    (tmp_path / "a.tsv").write_text("\ufeffro\ten\r\n" + swapped)
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "ro", "en"), *((1, ro, en) for en, ro in PAIRS)])
    lines = [json.dumps({"translation": record}) for record in records]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.json").write_text("\n".join(map(json.dumps, records)) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"translation": records}), tmp_path / "a.parquet")
    for path in tmp_path.glob("a.*"):
        assert read_all(path) == PAIRS, path
        assert read_all(path, languages=("ro", "en")) == [pair[::-1] for pair in PAIRS]
    assert read_all(tmp_path / "a.tsv", tmp_path / "a.json") == PAIRS * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"a\tb\nc\xff\td\n", r"a\.tsv:2: not valid UTF-8"),
        ("a.tsv", b"a\tb\tc\n", r"a\.tsv: no columns for en and ro, found a, b, c; pick two"),
        ("a.tsv", b"a\tb\nab\n", r"a\.tsv:2: 1 columns, where line 1 has 2"),
        ("a.tsv", b"ab\ncd\n", r"a\.tsv: no columns for en and ro, found ab; each side needs"),
        ("a.csv", b"\xef\xbb\xbf", "found none; each side needs"),
        ("a.csv", b"x" * 200_000 + b",b\n", r"a\.csv:1: field larger"),
        ("a.tsv", b"en\tde\na\tb\n", r"a\.tsv: no columns for en and ro, found en, de"),
        ("a.csv", b"id,english,other\n1,a,b\n", "found id, english, other; pick two"),
        ("a.csv", b"en,ro\na,b,c\n", r"a\.csv:2: 3 columns, where line 1 has 2"),
        ("a.csv", b'en,ro\na,"b\n', r"a\.csv:2: unexpected end of data"),
        ("a.csv", b'en,ro\n"a,b\nc,d\ne "f",g\n', r"a\.csv:4: .*inside a quoted text twice"),
        ("a.csv", b"", "no pairs left"),
        ("a.csv", b"\n", "found none; each side needs"),
        ("a.jsonl", b'{"en": "a", "de": "b"}\n', r"a\.jsonl: no columns.*found en, de"),
        ("a.jsonl", b'{"en": "a", "ro": "b"}\n[1]\n', r"a\.jsonl: not readable"),
        ("a.jsonl", b'{"en": "a", "ro": 5}\n', r"a\.jsonl row 1: expected text, found 5"),
        ("a.jsonl", b'{"en": "a", "ro": ["b", "c"]}\n', r"a\.jsonl row 1: expected one text"),
        ("a.tsv", b"en\tro\tro\na\tb\tc\n", r"a\.tsv: several columns are called 'ro'.*number"),
        ("a.jsonl", b'{"en": "\\ud800", "ro": "b"}\n', r"a\.jsonl: not readable"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl: not readable"),
        ("a.jsonl", b'{"en": "a", "ro": "\xff"}\n', r"a\.jsonl:1: not valid UTF-8"),
        ("a.jsonl", b'{"e\\nn": "a"}', "found e n"),
        ("a.jsonl", b'{"en": \n', r"a\.jsonl: not readable"),
        ("a.json", b'\n[{"en": "a"}]', r"found en;"),
        ("a.parquet", b"PAR1 not", r"a\.parquet: not readable"),
        ("a.xlsx", b"", "cannot tell what"),
        ("a.tsv.gz", b"\x1f\x8b", "cannot tell what.*give unpacked"),
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
@pytest.mark.parametrize(("suffix", "between"), [(".tsv", "\t"), (".CSV", ", "), (".csv", ";")])
def test_a_header_is_recognised_in_all_usual_spellings(header, suffix, between, tmp_path, capsys):
    """A space after the comma, as people type it, and semicolons, as Excel writes them."""
    swapped = header[0] in "rt"
    lines = [header, *("\t".join(pair[::-1] if swapped else pair) for pair in TEXT)]
    text = "\n".join(lines).replace("\t", between)
    (tmp_path / f"a{suffix}").write_text(text, encoding="utf-8")
    assert read_all(tmp_path / f"a{suffix}") == TEXT
    assert f"a{suffix}: line 1 is a header; source is " in capsys.readouterr().err


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_is_split_by_what_splits_all_its_lines_alike(delimiter, tmp_path):
    """The other delimiters may occur in texts, also in the first line."""
    pairs = [("Well, Tom; the lamp.", "Ei, lampa."), ("She runs.", "Ea aleargă.")]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(pairs)
    assert read_all(tmp_path / "a.csv") == pairs


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
    capsys.readouterr()
    assert read_all(plain, columns=("2", "3")) == TEXT
    assert "a.tsv: line 1 is read as a pair" in capsys.readouterr().err
    for path in (headed, records):
        assert read_all(path, columns=("text", "translated")) == TEXT
    assert read_all(records, columns=("3", "2")) == [pair[::-1] for pair in TEXT]
    with pytest.raises(InputError, match="no column '5'; found id, text"):
        read_all(headed, columns=("2", "5"))
    with pytest.raises(InputError, match="one column twice"):
        read_all(headed, columns=("2", "text"))
    for names in ("en_id\ten\tro", "en_id\tenglish\tro"):
        plain.write_text(f"{names}\n1\tThe lamp.\tLampa.\n", encoding="utf-8")
        assert read_all(plain) == TEXT[:1], "of several of a language the one named after it"
    plain.write_text("3\tThe lamp.\tLampa.\n", encoding="utf-8")
    assert read_all(plain, columns=("2", "3")) == TEXT[:1], (
        "a number is not a text of the first line"
    )
    plain.write_text("sentence\ttext\nThe lamp.\tLampa.\n", encoding="utf-8")
    assert read_all(plain, columns=("sentence", "2")) == TEXT[:1], "one name makes a header"


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


def test_unusable_paths_are_refused(tmp_path):
    (tmp_path / "x.en").write_text("a\nb\n")
    (tmp_path / "x.ro").write_text("a\n")
    with pytest.raises(InputError, match=r"x\.ro ends before .*x\.en:2: the files"):
        read_all(tmp_path / "x.en", tmp_path / "x.ro")
    with pytest.raises(InputError, match="same file twice"):
        read_all(tmp_path / "x.en", tmp_path / "x.en")
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
    max_examples=EXAMPLES or 20,
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
        path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
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
@example(pairs=[("NA", "null"), ("007", "1.0"), ("None", "nan"), ("", "NULL")])
def test_any_text_is_loaded_faithfully(suffix, pairs):
    """Or refused with file and line, by formats that cannot hold it."""
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
            assert suffix == ".csv" and sys.version_info < (3, 11)  # whose csv takes no NUL
            assert re.search(r"a\.csv:\d+: line contains NUL", str(error))
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
def test_files_that_are_not_text_are_refused(suffix, tmp_path):
    """At once: opening a FIFO would wait."""
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


def test_cleaning_counts_what_it_drops():
    dropped = Counter()
    rows = [("a b", "x"), ("", "x"), ("a b", "x"), ("a b", "y"), ("a", "x" * 40), ("c", "d")]
    pairs = (data.Pair(*row) for row in rows)
    kept = list(data.clean(pairs, dropped, held_out={data.text_key("C!")}))
    assert kept == [("a b", "x"), ("a b", "y")]
    assert dropped == {"empty": 1, "duplicate": 1, "length ratio": 1, "held out": 1}


def test_a_tokenizer_that_loses_letters_is_noticed(tmp_path):
    """By the round trip: without an unknown token and without bytes, letters vanish silently."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    model.train_from_iterator(["the house is new"], trainers.BpeTrainer(vocab_size=100))
    lossy = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>")
    texts = ["house", "nouă", "new", "țară"]
    assert data.round_trip_loss(texts, lossy, "ro") == 0.5
    assert data.round_trip_loss(texts, data.train_tokenizer(texts, 300), "ro") == 0.0
    sampled = data.round_trip_loss(texts * 1000, lossy, "ro", sample=500)
    assert sampled == pytest.approx(0.5, abs=0.1)
    assert data.round_trip_loss([], lossy, "ro") == 0.0


def test_no_source_sentence_stands_on_both_sides():
    """Case and punctuation do not count."""
    sources = [f"The house {i}." for i in range(20)] + [f"the HOUSE {i}!" for i in range(20)]
    keys = [data.text_key(source) for source in sources]
    for size in (5, 0.25):
        train, test = data.hold_out(range(40), keys, size, seed=1)
        assert sorted(train + test) == list(range(40)) and len(test) == 10
        assert not {keys[row] for row in train} & {keys[row] for row in test}
        assert data.hold_out(range(40), keys, size, seed=1) == (train, test)
    assert data.text_key("...") == "...", "what has no words is itself"


@pytest.fixture(scope="module")
def prepared():
    sizes = {"num_samples": 1200, "tokenizer": "train:400", "max_length": 24}
    return run.prepare_data(run.TrainConfig(**sizes, validation_size=200))


def test_the_own_tokenizer_round_trips(prepared, tmp_path):
    translate.save_tokenizer(prepared.tokenizer, tmp_path)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert len(merges) > 50 and all(isinstance(merge, str) for merge in merges), (
        "as 0.19 reads them"
    )
    tokenizer = data.load_tokenizer(str(tmp_path))
    assert len(tokenizer) == 400
    others = ("Știința și țara.", "🙂 and 漢字", "a  b", "<b>\\n", "</s><pad> <unk>")
    for text in (ROMANIAN, *others):
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
    encoded = data.encode(prepared.validation_pairs, prepared.tokenizer, 24, Counter())
    pairs = [pair for pair, *_ in itertools.islice(encoded, 20)]
    assert data.decode_ids(sources, prepared.tokenizer, "en") == [pair.source for pair in pairs]
    assert data.decode_ids(targets, prepared.tokenizer, "ro") == [pair.target for pair in pairs]


def test_the_tokenizer_is_trained_on_the_training_rows_alone(tmp_path):
    rows = [(f"common words {i}", f"cuvinte comune {i}") for i in range(100)]
    _, held_out = data.hold_out(range(100), range(100), 10)
    for row in held_out:
        rows[row] = tuple(f"qqqq wwww zzzz {row} {text}" for text in rows[row])
    pairs = str(write_pairs(tmp_path / "pairs.tsv", rows))
    sizes = {"dataset": (pairs,), "tokenizer": "train:600", "validation_size": 10}
    prepared = run.prepare_data(run.TrainConfig(**sizes))
    # Which rows are held out depends on their number and not on their text.
    vocabulary = " ".join(prepared.tokenizer.get_vocab())
    assert "common" in vocabulary and "qq" not in vocabulary and "ww" not in vocabulary


@pytest.mark.parametrize("multiple", [1, 8])
def test_batches_are_as_wide_as_their_longest_sentence(prepared, multiple):
    loader = data.make_loader(prepared.train, 16, multiple=multiple)
    real = padded = 0
    for batch in loader:
        for ids in batch:
            longest = int(ids.ne(0).sum(dim=1).max())
            assert ids.dtype == torch.long and ids.size(1) == data.round_up(longest, multiple)
            real, padded = real + ids.ne(0).sum().item(), padded + ids.numel()
    assert loader.batch_sampler.padding_share() == pytest.approx(1 - real / padded)
    assert multiple > 1 or 1 - real / padded < 0.15


def real_lengths(count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Lengths like those of sentences and their translations."""
    random_state = np.random.default_rng(0)
    source = np.clip(random_state.lognormal(2.5, 0.6, count), 2, 128).astype(int)
    target = np.clip(source * random_state.normal(1.4, 0.25, count), 2, 128)
    return source, target.astype(int)


@pytest.mark.parametrize(
    "batching", [{"batch_size": 16}, {"batch_tokens": 2048}, {"batch_tokens": 2048, "multiple": 8}]
)
def test_batches_follow_from_seed_and_epoch_and_hold_every_pair_once(batching):
    lengths = real_lengths()

    def epoch(seed: int, number: int, **more) -> list[list[int]]:
        sampler = data.BucketBatchSampler(*lengths, seed=seed, **batching, **more)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(0, 1) == epoch(0, 1)
    assert epoch(0, 1) != epoch(0, 2) and epoch(0, 1) != epoch(1, 1)
    # Schedules, and Lightning's validations, count on as many batches in every epoch.
    assert len({len(epoch(0, number)) for number in range(8)}) == 1
    everything, flat = list(range(len(lengths[0]))), itertools.chain.from_iterable
    for world in (1, 2, 3):
        ranks = [epoch(0, 3, rank=rank, world=world) for rank in range(world)]
        assert sorted(flat(flat(ranks))) == everything
        assert len({len(rank) for rank in ranks}) == 1
        if world == 2 and "batch_tokens" in batching:  # equal work: at a time both have as much
            target = [[int(lengths[1][batch].sum()) for batch in rank] for rank in ranks]
            apart = [abs(a - b) / max(a, b) for a, b in zip(*target) if a and b]
            assert np.mean(apart) < 0.1


@pytest.mark.parametrize("multiple", [1, 8])
def test_a_token_budget_is_kept_and_leaves_few_pads(multiple):
    lengths = real_lengths()
    sampler = data.BucketBatchSampler(*lengths, batch_tokens=2048, multiple=multiple)
    sampler.set_epoch(3)
    widest = [max(side[batch].max() for side in lengths) for batch in sampler]
    sizes = [len(batch) * width for batch, width in zip(sampler, widest)]
    for batch, width in zip(sampler, widest):
        assert len(batch) * data.round_up(width, multiple) <= 2048
    assert np.median(sizes) > 1700, "batches are full"
    by_size = data.BucketBatchSampler(*lengths, batch_size=64).padding_share()
    assert data.BucketBatchSampler(*lengths, batch_tokens=2048).padding_share() < 0.16 < by_size
    lengths = np.array([5, 300, 5, 6])  # one is beyond the budget, and a batch by itself
    sampler = data.BucketBatchSampler(lengths, lengths, batch_tokens=16)
    assert [1] in list(sampler) and len(sampler) == 3
    assert sorted(itertools.chain(*sampler)) == [0, 1, 2, 3]


def test_truncation_and_padding_of_a_tokenizer_are_off():
    tokenizer = data.train_tokenizer(["some words to learn from"], 300)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    (ids,) = data.encode_texts(["some words to learn from"], tokenizer)
    assert data.decode_ids([ids], tokenizer, "en") == ["some words to learn from"]


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
    split = "dataset_name=wmt16 subset=ro-en split=train[:80%] max_length=50"
    sizes = "d_model=512 nhead=8 num_encoder_layers=6 num_decoder_layers=6 max_length=50"
    for function, expected in (
        (data.load_dataset_and_tokenize, f"num_samples {split}"),
        (data.create_dataloaders, "input_ids decoder_input_ids test_size=0.2 batch_size=16"),
        (TransformerSeq2SeqModel, f"vocab_size {sizes}"),
    ):
        parameters = inspect.signature(function).parameters.values()
        written = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
        assert " ".join(written).startswith(expected)
    for name in ("training_step", "validation_step", "configure_optimizers"):
        assert name in vars(run.adapter_class(run.import_lightning().LightningModule))


@pytest.mark.parametrize(
    "special",
    [{}, {"eos_token": "</s>"}, {"pad_token": "<pad>"}, {"eos_token": "x", "pad_token": "x"}],
)
def test_a_tokenizer_without_pad_or_eos_gets_them(tmp_path, special):
    from transformers import PreTrainedTokenizerFast

    backend = data.train_tokenizer(["a b c", "d e f"], 300).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path)
    tokenizer = data.load_tokenizer(str(tmp_path))
    assert None not in (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert max(tokenizer.pad_token_id, tokenizer.eos_token_id) < len(tokenizer)


@pytest.mark.parametrize("name", ["./missing", "train:x", "train:10", "train:9999999"])
def test_impossible_tokenizers_are_refused(name):
    config = run.TrainConfig(num_samples=50, tokenizer=name, validation_size=5)
    with pytest.raises(InputError, match="tokenizer|vocabulary"):
        run.check_settings(config)
        run.prepare_data(config)


# ---- settings ---------------------------------------------------------------------------------


def main(*arguments) -> int:
    """`python run.py ARGUMENTS` in this process; the exit code."""
    try:
        return run.main(list(map(str, arguments)))
    except SystemExit as stop:
        return stop.code


def python(*arguments, **more) -> subprocess.CompletedProcess:
    """Run the interpreter of these tests in another process."""
    more = {"capture_output": True, "text": True, "encoding": "utf-8"} | more
    return subprocess.run([sys.executable, *map(str, arguments)], check=False, **more)


def command(*arguments, **more) -> subprocess.CompletedProcess:
    """`python run.py ARGUMENTS` in another process."""
    return python(HERE / "run.py", *arguments, **more)


SMALL = "--num-samples 300 --tokenizer train:320 --max-epochs 1 --d-model 32 --nhead 2"
SMALL += " --dim-feedforward 64 --num-encoder-layers 1 --num-decoder-layers 1 --batch-size 32"
SMALL = [*SMALL.split(), *("--validation-size", "20", "--mlruns", "none")]


def test_flags_beat_the_preset_and_the_preset_the_defaults():
    config = run.parse_settings(["--preset", "tutorial", "--batch-size", "3"])
    assert config.batch_size == 3 and config.d_model == 512 and config.seed == 0
    assert run.parse_settings([]) == run.TrainConfig()
    shown = command("--preset=small", "--help", env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"})
    assert shown.returncode == 0 and "torch" not in shown.stderr, "help comes before torch"
    text = " ".join(re.sub("[│\n]", " ", shown.stdout).split())
    assert "peak learning rate of Adam (default: 0.002)" in text
    for field in dataclasses.fields(run.TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    assert all(name in text for name in ("translate", "evaluate", "export", "bench"))


def test_the_tutorial_preset_is_the_tutorial_to_the_letter():
    config = run.TrainConfig(**run.PRESETS["tutorial"])
    expected = {"dataset": ("wmt16",), "subset": "ro-en", "split": "train[:80%]"}
    expected |= {"num_samples": 100, "tokenizer": "t5-small", "max_length": 50}
    expected |= {"batch_size": 16, "d_model": 512, "nhead": 8, "dim_feedforward": 2048}
    expected |= {"num_encoder_layers": 6, "num_decoder_layers": 6, "dropout": 0.1}
    expected |= {"learning_rate": 5e-5, "max_epochs": 1, "validation_size": 0.2}
    assert {name: getattr(config, name) for name in expected} == expected
    assert type(run.build_optimizer(tiny_model(), config)) is torch.optim.Adam
    assert {run.learning_rate(config, step, 5) for step in range(5)} == {5e-5}


def test_every_size_given_by_a_flag_reaches_the_model(prepared):
    sizes = {"d_model": 24, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 3}
    sizes |= {"dim_feedforward": 40, "dropout": 0.3, "activation": "relu2", "max_length": 30}
    sizes |= {"positional": "learned", "norm_first": False}
    shared = {field.name for field in dataclasses.fields(seq2seq.Seq2SeqConfig)}
    assert shared & {field.name for field in dataclasses.fields(run.TrainConfig)} == set(sizes)
    model = run.build_model(run.TrainConfig(**sizes), prepared.tokenizer)
    assert dataclasses.asdict(model.config).items() >= sizes.items()


def test_weight_decay_shrinks_matrices_alone():
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = run.build_optimizer(model, run.TrainConfig(learning_rate=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.dim() > 1 else 1.0
        assert close(parameter, before[name] * factor, 1e-6), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-epoch", "3"], "--max-epochs"),
        (["--learning-rate", "fast"], "could not convert"),
        (["--loop", "manual"], "lightning"),
        (["--preset", "huge"], "huge"),
        (["--positional", "absolute"], "sinusoidal"),
        (["sing"], "sing"),
        (["translate"], "--model"),
        (["export", "--model", "x"], "folder to create"),
    ],
)
def test_mistyped_flags_are_answered_with_exit_code_2(arguments, message, capsys):
    assert main(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--label-smoothing", "1"], "at most 0.99"),
        (["--validation-size", "1.5"], "whole number"),
        (["--warmup", "0.8"], "--warmup plus --cooldown must be at most 1"),
        (["--output", ""], "needs a name"),
        (["--dataset"], "--dataset needs a value"),
        (["--seed", "-1"], "must be at least 0"),
        (["--learning-rate", "nan"], "must be at least"),
        (["--max-length", "0"], "--max-length must be at least 1"),
        (["--device", "cuda"], "--device cuda is not available; found cpu"),
        (["--nhead", "3"], "nhead=3 does not divide"),
        (["--output", str(HERE)], "exists already"),
        (["--output", str(HERE / "run.py" / "x")], "choose another --output"),
        (["--output", "."], "exists already"),
        (["--output", "x" * 300], "too long"),
        (["--mlruns", ""], "needs a name"),
        (["--d-model", "6", "--nhead", "2", "--positional", "rotary"], "an even head width"),
        (["--push", "--loop", "raw"], "switched off"),
        (["--push", "--no-modlee"], "switched off"),
        (["--precision", "fp16"], "needs a GPU"),
        (["--preset", "small"], "add --dataset"),
        (["--compile"], "--loop raw"),
        (["--tokenizer", "train:x"], "train:8000"),
        (["--resume", "nowhere"], "nowhere is not the folder of a run"),
        (["--init", "nowhere"], "nowhere is not a model folder"),
        (["translate", "--model", "x", "--batch-tokens", "0"], "at least 1"),
        (["translate", "--model", "x", "--num-return", "2"], "at most --beam"),
        (["translate", "--model", "x", "--length-penalty", "nan"], "length-penalty"),
        (["translate", "--model", "x", "--beam", "2000000"], "at most 1000"),
        (["translate", "--model", str(HERE)], "not a model folder: config.json is missing"),
        (["translate", "--model", "x", "a\udcff"], "not valid UTF-8"),
        (["evaluate", "--model", "x", "--num-samples", "-1"], "at least 1"),
        (["evaluate", "--model", "x"], "x is not a model folder: it does not exist"),
        (["evaluate", "--model", str(HERE)], "no test part of its own: add --dataset"),
        (["evaluate", "--model", "x", "--json", "a", "--hypotheses", "a"], "the same file"),
        (["evaluate", "--model", "x", "--json", "a", "--hypotheses", "./a"], "the same file"),
        (["evaluate", "--model", "x", "--json", "/dev/stdout"], "no file can be written"),
        (["evaluate", "--model", "no", "--dataset", "x.tsv"], "not a model folder"),
        (["evaluate", "--model", "no", "--dataset", "phrasebook"], "the demo trains on"),
        (["evaluate", "--model", "no", "--json", str(HERE / "run.py")], "is not a report"),
        (["evaluate", "--model", "no", "--json", "no/out.json"], "no file can be written"),
        (
            ["export", "--model", "x", "--to", "hf", "--quantization", "int8", "y"],
            "belongs to --to",
        ),
    ],
)
def test_wrong_values_are_refused_in_one_line_and_nothing_is_written(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODLEE_API_KEY", "secret-key-7f3a")
    assert main(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_the_first_names_a_mistake(rank, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    assert main("--warmup", 2) == 2
    assert ("error: --warmup" in capsys.readouterr().err) == (rank == "0")


def test_pushing_needs_a_key(capsys, monkeypatch):
    monkeypatch.delenv("MODLEE_API_KEY", raising=False)
    assert main("--push") == 2
    monkeypatch.setenv("MODLEE_API_KEY", "")
    assert main("--push") == 2
    assert capsys.readouterr().err.count("MODLEE_API_KEY") == 2


def test_a_hub_name_without_a_network_is_answered_without_retries(tmp_path):
    """Without HF_HUB_OFFLINE: the program finds out by itself, without minutes of retries."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = command("--dataset", "wmt16", "--subset", "ro-en", env=env, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot load data set wmt16/ro-en/train")
    assert "--dataset pairs.tsv" in done.stderr and done.stderr.count("\n") == 1


class StallingHub(http.server.BaseHTTPRequestHandler):
    """Serves a tokenizer, of which it sends only the first kilobyte."""

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


# ---- what both loops share ----------------------------------------------------------------------


def test_the_schedule_is_a_trapezoid():
    config = run.TrainConfig(learning_rate=1.0, warmup=0.1, cooldown=0.3)
    rates = [run.learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[70] == 1.0
    assert rates[85] == pytest.approx(0.5) and rates[-1] == pytest.approx(1 / 30)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    flat = dataclasses.replace(config, warmup=0.0, cooldown=0.0)
    assert {run.learning_rate(flat, step, 100) for step in range(100)} == {1.0}


def test_the_schedule_follows_the_place_in_the_run():
    """Also if the epochs before had another number of batches."""
    config = run.TrainConfig(
        max_epochs=4, accumulate=3, warmup=0.0, cooldown=1.0, learning_rate=1.0
    )
    optimizer = torch.optim.Adam([torch.zeros(1)])
    for epoch, batch, done in ((0, 0, 0), (1, 0, 4), (2, 9, 11)):  # 4 steps an epoch, of 10 batches
        run.start_step(optimizer, config, run.Progress(99, epoch, batch), 10)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1 - done / 16)


def test_learning_rate_and_random_state_follow_from_seed_and_step():
    def draw(seed: int, step: int, rank: int = 0) -> float:
        torch.rand(7)
        optimizer = torch.optim.Adam([torch.zeros(1)], lr=9.0)
        config, distributed = run.TrainConfig(seed=seed, max_epochs=1), Mock()
        distributed.get_rank.return_value = rank
        with patch.object(run, "distributed", distributed):
            run.start_step(optimizer, config, run.Progress(step, 0, step), 100)
        assert optimizer.param_groups[0]["lr"] == run.learning_rate(config, step, 100)
        return torch.rand(()).item()

    assert draw(1, 5) == draw(1, 5)
    places = itertools.product(range(3), range(5), range(2))
    assert len({draw(*place) for place in places}) == 30


def test_two_batches_accumulated_equal_one_of_twice_the_size(prepared):
    """Token-exact: the gradient of a step is that of its pairs in one batch."""
    model = tiny_model(vocab_size=len(prepared.tokenizer), dropout=0.0)
    rows = [prepared.train[row] for row in range(40)]

    def backward(batch, share: int):
        input_ids, labels = data.pad_batch(batch)
        loss, tokens = model(input_ids, labels=labels)
        (loss / share).backward()
        return tokens

    tokens = backward(rows, 1)
    whole = [parameter.grad / tokens for parameter in model.parameters()]
    model.zero_grad()
    parts = [backward(rows[:30], 2), backward(rows[30:], 2)]
    config = run.TrainConfig(accumulate=2, clip_norm=0.0)
    run.finish_gradients(model, config, sum(parts))
    for parameter, expected in zip(model.parameters(), whole):
        assert close(parameter.grad, expected, 1e-6)


def test_clipping_bounds_the_gradient_norm():
    model = tiny_model()
    model(random_ids(2, 5), random_ids(2, 5)).sum().backward()
    run.finish_gradients(model, run.TrainConfig(clip_norm=0.25), torch.tensor(1))
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm.item() == pytest.approx(0.25, rel=1e-3)


def test_older_cards_train_in_fp16_and_newer_than_torch_are_said(monkeypatch):
    """A T4 emulates bf16, and torch's own check counts that."""
    device = torch.device("cuda")
    for capability, precision in (((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        found = Mock(return_value=capability)
        monkeypatch.setattr(torch.cuda, "get_device_capability", found)
        assert run.choose_precision("auto", device) == precision
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "B300")

    def zeros(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(InputError, match="cannot use B300 .*no kernel image.*newer torch"):
        translate.choose_device("auto")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes, but 1 GPUs"):
        translate.choose_device("cuda")


def test_without_a_compiler_training_goes_on(monkeypatch, capsys):
    def fail(*arguments, **more):
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    model = tiny_model()
    run.compile_model(model)
    assert capsys.readouterr().err.count("\n") == 1
    assert all(part._compiled_call_impl is None for part in model.modules())


def test_a_compiled_model_has_the_same_loss_and_gradients(prepared):
    """For batches of several shapes, which share the graphs: one for each kind of layer, another
    for batches without pads."""
    sizes = {"vocab_size": len(prepared.tokenizer), "dropout": 0.0}
    sizes |= {"num_encoder_layers": 1, "num_decoder_layers": 1}
    model, compiled = tiny_model(**sizes), tiny_model(**sizes)
    if not run.compile_model(compiled):
        pytest.skip("nothing can compile here")
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for count in (3, 5, 7):
        batch = data.pad_batch([prepared.train[row] for row in range(count)])
        losses = []
        for network in (model, compiled):
            network.zero_grad()
            loss, tokens = network(batch[0], labels=batch[1])
            (loss / tokens).backward()
            losses.append(loss / tokens)
        assert close(*losses, 1e-5)
        for ours, theirs in zip(model.parameters(), compiled.parameters()):
            assert close(ours.grad, theirs.grad, 1e-4)
    assert 0 < graphs["unique_graphs"] - before <= 4


# ---- the two loops ----------------------------------------------------------------------------


class MemoryHooks(run.RunHooks):
    """Keeps checkpoints in memory, as files hold them, and shows nothing."""

    def __init__(self, config, prepared, checkpoint: bytes | None = None):
        resumed = None
        if checkpoint:
            resumed = Path("a/b/c"), torch.load(io.BytesIO(checkpoint), weights_only=True)
        super().__init__(config, prepared, Path("nowhere"), {}, resumed)
        self.states: dict[int, bytes] = {}

    def show(self, progress: run.Progress) -> None:
        pass

    def save(self, progress: run.Progress) -> None:
        def keep(folder: Path, content: dict, last: Path | None) -> Path:
            file = io.BytesIO()
            torch.save(content, file)
            self.states[progress.step] = file.getvalue()
            return Path(f"step {progress.step}")

        self.keep_settings = lambda: None
        with (
            patch.object(run, "write_checkpoint", keep),
            patch.object(run, "steps_in", lambda _: []),
        ):
            super().save(progress)


def fit(prepared, loop="raw", modlee=False, folder=None, freeze=(), hooks=None, **changes):
    """Train a tiny model with either loop. Returns (model, hooks with .progress, Modlee's record).

    hooks: a class; checkpoint: to resume from."""
    device, checkpoint = torch.device(changes.pop("device", "cpu")), changes.pop("checkpoint", None)
    settings = {"batch_size": 64, "max_epochs": 2, "seed": 5, "precision": "fp32"}
    settings |= {"mlruns": str(folder / "mlruns")} if folder else {}
    config = run.TrainConfig(**(settings | changes))
    sizes = {"vocab_size": len(prepared.tokenizer), "dropout": 0.1, "activation": "relu2"}
    model = tiny_model(**sizes).to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in freeze)
    loaders = run.build_loaders(config, prepared, device)
    hooks = (hooks or MemoryHooks)(config, prepared, checkpoint)
    progress, record = run.Progress(), None
    if checkpoint is not None:
        model.load_state_dict(hooks.resumed["model"])
        progress = run.Progress(**hooks.resumed["progress"])
    hooks.progress = progress
    if loop == "raw":
        assert run.train_raw(model, *loaders, config, progress, hooks) is progress
        return model, hooks, None
    base = run.import_lightning().LightningModule
    if modlee:
        package = modlee_record.import_modlee()
        record = modlee_record.ModleeRecord(package, prepared.train, prepared.tokenizer)
        base = modlee_record.modlee_base()
    adapter = run.adapter_class(base)(dataclasses.asdict(model.config), model)
    adapter.attach(config, progress, hooks)
    train = partial(run.train_lightning, adapter, *loaders, config)
    record.fit(adapter, train, partial(run.set_mlflow_store, config.mlruns)) if record else train()
    return model, hooks, record


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ours)


def trained_alike(a: run.RunHooks, b: run.RunHooks) -> bool:
    """The same losses and the same best weights."""
    names = [name for name in vars(a.progress) if name != "sums"]
    same = all(getattr(a.progress, name) == getattr(b.progress, name) for name in names)
    same = same and torch.equal(a.progress.sums, b.progress.sums)
    same = same and all(a.found[name] == b.found[name] for name in ("best", "step"))
    weights = a.found["weights"], b.found["weights"]
    return same and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture
def threads(request):
    """torch's threads, as many as the parameter says."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize(
    ("precision", "accumulate", "batch_tokens"),
    [("fp32", 1, None), ("fp32", 3, 650), ("bf16", 1, 650), ("bf16", 3, None)],
)
def test_both_loops_train_identically(
    prepared, precision, accumulate, batch_tokens, threads, monkeypatch
):
    """Dropout, clipping, schedule and uneven windows on: bit-identical weights and losses."""
    settings = {"precision": precision, "accumulate": accumulate, "clip_norm": 0.5}
    settings |= {"batch_tokens": batch_tokens, "label_smoothing": 0.1}
    settings["weight_decay"] = 0.1 if accumulate > 1 else 0.0
    monkeypatch.setattr(run, "LOG_EVERY", 3)
    raw, raw_hooks, _ = fit(prepared, **settings)
    torch.manual_seed(99)  # what either loop draws is its own doing
    lit, lit_hooks, _ = fit(prepared, "lightning", **settings)
    progress = raw_hooks.progress
    assert progress.step == 2 * math.ceil(raw_hooks.batches / accumulate)
    assert trained_alike(raw_hooks, lit_hooks) and same_weights(raw, lit)
    assert len(progress.history["validation"]) == 2 and progress.history["rate"][-1][1] < 2e-3
    assert not same_weights(raw, tiny_model(vocab_size=len(prepared.tokenizer)))


@pytest.mark.parametrize(
    ("loop", "modlee", "threads"),
    [
        ("raw", False, 1),
        ("lightning", False, 2),
        pytest.param("lightning", True, 1, marks=needs_modlee),
    ],
    indirect=["threads"],
)
def test_a_resumed_run_trains_identically(prepared, loop, modlee, threads, tmp_path, monkeypatch):
    """From the middle of an epoch, from its end, and from the last checkpoint of all."""
    monkeypatch.setattr(run, "LOG_EVERY", 3)  # a resumed run begins between two points

    class EveryStep(MemoryHooks):
        def after_step(self, progress: run.Progress) -> None:
            super().after_step(progress)
            self.due = True

    settings = {"accumulate": 3, "clip_norm": 0.5, "weight_decay": 0.1}
    raw, raw_hooks, _ = fit(prepared, hooks=EveryStep, **settings)
    steps = raw_hooks.progress.step // 2
    assert sorted(raw_hooks.states) == list(range(1, 2 * steps + 1))
    for step in (steps + 1,) if modlee else (2, steps, steps + 1, 2 * steps):
        torch.manual_seed(step)
        if step == 2 * steps and loop == "lightning":
            continue  # `train` calls no loop then
        folder = tmp_path if modlee else None
        more = {"checkpoint": raw_hooks.states[step], "folder": folder, **settings}
        model, hooks, _ = fit(prepared, loop, modlee, **more)
        assert trained_alike(hooks, raw_hooks) and same_weights(raw, model)


def test_a_plain_loader_is_shuffled_by_seed_and_epoch(prepared):
    """And so a copied loop resumes exactly, also one that knows nothing of our sampler."""

    class Keep(run.Hooks):
        def after_step(self, progress: run.Progress) -> None:
            self.due = progress.step == 10

        def begin(self, progress, batches, model, optimizer, scaler) -> None:
            self.parts = {"model": model, "optimizer": optimizer}

        def save(self, progress: run.Progress) -> None:
            states = {name: part.state_dict() for name, part in self.parts.items()}
            self.state = copy.deepcopy((states, vars(progress)))

    class Restore(run.Hooks):
        def begin(self, progress, batches, model, optimizer, scaler) -> None:
            optimizer.load_state_dict(states["optimizer"])

    config = run.TrainConfig(precision="fp32", seed=3)
    loader = partial(
        torch.utils.data.DataLoader, prepared.train, batch_size=32, collate_fn=data.pad_batch
    )
    sizes, keep = {"vocab_size": len(prepared.tokenizer)}, Keep()
    whole = tiny_model(**sizes)
    run.train_raw(whole, loader(shuffle=True), loader(), config, hooks=keep)
    states, progress = keep.state
    resumed = tiny_model(seed=1, **sizes)
    resumed.load_state_dict(states["model"])
    torch.rand(5)
    progress = run.Progress(**progress)
    run.train_raw(resumed, loader(shuffle=True), loader(), config, progress, Restore())
    assert progress.batch == 0 and progress.epoch == 2 and same_weights(whole, resumed)


@pytest.fixture
def deterministic_cuda(monkeypatch):
    """Sums in a fixed order, which GPUs keep only if asked to."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_both_loops_and_a_resumed_run_train_identically(
    prepared, precision, deterministic_cuda, monkeypatch
):
    monkeypatch.setattr(run, "LOG_EVERY", 2)
    settings = {"device": "cuda", "precision": precision, "accumulate": 3, "clip_norm": 0.5}
    raw, raw_hooks, _ = fit(prepared, checkpoint_every=0.0, **settings)
    for loop, checkpoint in (("lightning", None), ("raw", raw_hooks.states[4])):
        model, hooks, _ = fit(prepared, loop, checkpoint=checkpoint, **settings)
        assert trained_alike(raw_hooks, hooks) and same_weights(raw, model)


@needs_cuda
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("loop", ["raw", "lightning"])
def test_no_step_waits_for_the_gpu(prepared, loop, precision, monkeypatch):
    """Except those that log: torch raises an error if the host would wait."""
    start_step, strict_steps = run.start_step, []

    def strict(optimizer, config, progress, batches) -> None:
        start_step(optimizer, config, progress, batches)
        if progress.step >= 2:  # the first ones load libraries
            torch.cuda.set_sync_debug_mode("error")
            strict_steps.append(progress.step)

    def may_wait(*arguments):
        torch.cuda.set_sync_debug_mode("default")
        return mean_loss(*arguments)

    mean_loss = run.mean_loss
    monkeypatch.setattr(run, "start_step", strict)
    monkeypatch.setattr(run, "mean_loss", may_wait)
    try:
        _, hooks, _ = fit(prepared, loop, device="cuda", precision=precision, max_epochs=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert hooks.progress.step > 10 and len(strict_steps) == hooks.progress.step - 2


def test_a_nan_loss_is_noticed_at_the_next_point(prepared):
    """fp16's scaler skips such a step instead. Weights that are not finite are never saved."""
    progress = run.Progress(step=20)
    for loss in (6.0, math.nan):
        progress.add(torch.tensor(loss), torch.tensor(2))
    with pytest.raises(FloatingPointError, match="the train loss at step 20 is nan"):
        copy.deepcopy(progress).log(run.TrainConfig(precision="fp32"), 0.1)
    progress.log(run.TrainConfig(precision="fp16"), 0.1)
    assert not progress.history["train"]
    progress.add(torch.tensor(6.0), torch.tensor(4))
    progress.log(run.TrainConfig(precision="fp16"), 0.1)
    assert progress.history["train"] == [(20, 1.5)], "the sums begin anew at every point"
    with pytest.raises(FloatingPointError, match="the validation loss at step 20 is nan"):
        progress.record("validation", math.nan)
    model, hooks, _ = fit(prepared, max_epochs=1)
    with torch.no_grad():
        model.embedding.weight[3, 3] = math.inf
    with pytest.raises(FloatingPointError, match="embedding.weight after step .* is not finite"):
        hooks.save(hooks.progress)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("overflows", [0, 1])
@pytest.mark.parametrize("loop", ["raw", pytest.param("lightning", marks=needs_cuda)])
def test_an_overflow_of_fp16_is_skipped_and_counted(prepared, monkeypatch, overflows, device, loop):
    """The scaler skips the step, and training continues. (On a CPU the program refuses fp16, which
    is slow there; but the raw loop can.)"""
    steps, forward = [], TransformerSeq2SeqModel.forward

    def overflow(model, *arguments, **more):
        loss, tokens = forward(model, *arguments, **more)
        if model.training:
            steps.append(loss)
        return loss * (1e9 if overflows and len(steps) == 3 else 1), tokens

    monkeypatch.setattr(TransformerSeq2SeqModel, "forward", overflow)
    model, hooks, _ = fit(prepared, loop, precision="fp16", max_epochs=1, device=device)
    assert hooks.progress.step == len(steps)
    assert run.count_skipped(hooks.progress, hooks) == overflows
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert hooks.found["best"] < 5


@pytest.mark.parametrize("loop", ["raw", "lightning"])
def test_a_diverging_run_ends_in_one_line(loop, tmp_path):
    arguments = (*SMALL, "--loop", loop, "--no-modlee", "--output", tmp_path / "model")
    arguments += ("--learning-rate", 2e9, "--clip-norm", 0)
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.match(r"error: the train loss at step \d+ is nan; last good checkpoint: none", last)
    assert not (tmp_path / "model" / "config.json").exists()


def test_out_of_memory_is_one_line(folder, tmp_path, monkeypatch, capsys):
    """With advice that the command can follow."""
    train = [*SMALL, "--no-modlee", "--output", tmp_path / "model", "--loop"]
    use = ["--model", folder]
    for command, flag in (
        ([*train, "raw"], "--accumulate"),
        ([*train, "lightning"], "--batch-size"),
        (["translate", *use, "I see."], "--batch-tokens or --beam\n"),
        (["evaluate", *use], "--batch-tokens or --beam\n"),
    ):
        for words, code in (("CUDA out of memory. Tried", 1), ("mat1 and mat2 shapes", None)):
            fail = Mock(side_effect=RuntimeError(words))
            monkeypatch.setattr(TransformerSeq2SeqModel, "encode", fail)
            if code is None:
                with pytest.raises(RuntimeError, match=words):
                    main(*command)
            else:
                assert main(*command) == code
                error = capsys.readouterr().err
                assert "error: out of memory; lower --batch-tokens" in error and flag in error


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("loop", ["raw", "lightning"])
def test_a_long_run_keeps_its_memory_and_files(prepared, loop):
    """STEPS=20000 for a long one: memory within 2 % from the first tenth to the end."""
    looks = []

    class Look(MemoryHooks):
        def after_step(self, progress: run.Progress) -> None:
            super().after_step(progress)
            if progress.step % (STEPS // 20) == 0:
                looks.append((resident_pages(), len(os.listdir("/proc/self/fd"))))
            self.stop = progress.step == STEPS

    fit(prepared, loop, hooks=Look, max_epochs=math.ceil(STEPS * 64 / len(prepared.train)) + 1)
    pages, files = zip(*looks)
    assert max(pages[2:]) <= 1.02 * pages[2], pages
    assert max(files[2:]) <= files[2], files


TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", 2, HERE / "run.py")


def test_two_processes_train_like_one_on_both_batches(tmp_path):
    """Token-exact: gradients are averaged once per window, and each token counts the same."""
    both = [*SMALL, "--dropout", 0, "--device", "cpu", "--batch-size", 30, "--no-modlee"]
    one = (HERE / "run.py", *both, "--loop", "raw", "--accumulate", 4, "--output", "one")
    losses, weights = [], []
    for arguments in (one, *((*TORCHRUN, *both, "--loop", loop) for loop in ("raw", "lightning"))):
        if arguments is not one:
            arguments += ("--accumulate", 2, "--output", arguments[-1])
        done = python(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("saved") == 1, "only the first process speaks"
        losses += re.findall("loss  .*", done.stdout)
        weights.append(load_file(tmp_path / arguments[-1] / "model.safetensors"))
    assert len(losses) == 3 and len(set(losses)) == 1
    assert all(torch.equal(weights[1][name], weights[2][name]) for name in weights[1]), "one path"
    for name, weight in weights[0].items():
        for other in weights[1:]:
            differs = (weight - other[name]).abs() > 1e-4
            if name.endswith("in_proj.bias"):  # of keys: without a gradient, but for rounding
                differs = differs.view(3, -1)[[0, 2]]
            assert not differs.any(), name
    # Nothing is left but what one process writes.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lightning", "one", "raw"]


# ---- checkpoints, signals, full disks -----------------------------------------------------------


def write_states(folder: Path, *steps: int) -> list[Path]:
    """Small checkpoints: 400 kB, filled with the number of the step."""
    paths = run.steps_in(folder)
    for step in steps:
        content = {"step": step, "w": torch.full((100_000,), step)}
        last = paths[-1] if paths else None
        paths.append(run.write_checkpoint(folder, content, last))
    return paths


class Hostile:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def flip_a_bit(path: Path, owned: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the weights, where only a checksum can tell
    path.write_bytes(content)


def cut_off(path: Path, owned: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path: Path, owned: Path) -> None:
    path.write_bytes(b"")


def pickle_by_torch(path: Path, owned: Path) -> None:
    torch.save({"state": Hostile(owned)}, path)


def plain_pickle(path: Path, owned: Path) -> None:
    path.write_bytes(pickle.dumps(Hostile(owned)))


def before_a_zip(path: Path, owned: Path) -> None:
    """A tar, as torch wrote before 1.0 and as its versions up to 2.5 would execute."""
    whole = path.read_bytes()
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    path.write_bytes(path.read_bytes() + whole)


DAMAGES = [flip_a_bit, cut_off, empty, pickle_by_torch, plain_pickle, before_a_zip]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(
    damage, tmp_path, capsys, monkeypatch
):
    """No code in it is executed. Of several processes the first sets it aside."""
    older, newest = write_states(tmp_path, 1, 2)
    assert run.read_checkpoint(tmp_path)[0] == newest
    damage(newest, tmp_path / "owned")
    with monkeypatch.context() as second:
        second.setenv("RANK", "1")
        assert run.read_checkpoint(tmp_path)[0] == older and newest.exists()
    path, checkpoint = run.read_checkpoint(tmp_path)
    assert path == older and checkpoint["step"] == 1 and (checkpoint["w"] == 1).all()
    said = capsys.readouterr().err
    assert f"note: {newest} cannot be read" in said
    assert ("not a zip archive" in said) == (damage in (empty, plain_pickle, before_a_zip))
    assert newest.with_suffix(".damaged").exists() and not newest.exists()
    assert not (tmp_path / "owned").exists()
    older.write_bytes(b"")
    with pytest.raises(InputError, match="no checkpoint"):
        run.read_checkpoint(tmp_path)


def test_only_the_newest_two_checkpoints_are_kept_and_no_debris(tmp_path):
    """And a run notices another that writes into its folder."""
    first, second = write_states(tmp_path, 1, 2)
    (first.parent / ".123.step-000000003.pt").write_bytes(b"half")  # as a killed one leaves it
    *_, third = write_states(tmp_path, 3)
    assert sorted(first.parent.iterdir()) == [second, third]
    hooks = run.RunHooks(run.TrainConfig(), None, tmp_path, {})
    hooks.model = tiny_model()
    for hooks.last in (None, second):
        with pytest.raises(run.TrainingError, match=f"another run writes to {tmp_path}.*step-0+3"):
            hooks.save(run.Progress())
    assert sorted(first.parent.iterdir()) == [second, third]


@contextlib.contextmanager
def full_disk(size: int):
    """No file can become larger."""
    resource = pytest.importorskip("resource")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, capsys):
    (first,) = write_states(tmp_path, 1)
    before = first.read_bytes()
    model = tiny_model()
    hooks = run.RunHooks(run.TrainConfig(max_epochs=1), None, tmp_path, {})
    hooks.last, hooks.given = first, hooks.config
    hooks.model, hooks.optimizer, hooks.scaler = model, torch.optim.Adam(model.parameters()), None
    failure = pytest.raises(run.TrainingError, match=f"cannot write.*{first} is intact.*--resume")
    with full_disk(20_000), failure:  # a part of a checkpoint
        hooks.save(run.Progress(step=2))
    assert {path.name for path in first.parent.iterdir()} == {first.name, "settings.json"}
    assert first.read_bytes() == before
    with full_disk(20_000):  # the last of all: the model may still fit
        hooks.save(run.Progress(step=2, epoch=1))
    assert "cannot write" in capsys.readouterr().err


def test_a_disk_that_is_full_at_the_end_loses_nothing(tmp_path, capsys, monkeypatch):
    """The model cannot be written; the last checkpoint is there, and resuming finishes. A model
    that is there stays whole until the next one is."""
    output, save = tmp_path / "model", run.save_model

    def full(*arguments) -> None:
        with full_disk(20_000):
            save(*arguments)

    for flags, left in (
        ([*SMALL, "--loop", "raw", "--output", output], {"checkpoints", "loss.png"}),
        (["--resume", output, "--max-epochs", 2], None),
    ):
        before = {path: path.read_bytes() for path in output.glob("*.*")}
        monkeypatch.setattr(run, "save_model", full)
        assert main(*flags) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and str(output) in error and "--resume" in error
        assert {path.name for path in output.iterdir()} == left or left is None
        for path, content in before.items():
            assert path.name == "loss.png" or path.read_bytes() == content
        monkeypatch.setattr(run, "save_model", save)
        assert main("--resume", output) == 0 and (output / "metrics.json").is_file()


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    translate.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        translate.write_json(path, {"a": math.nan})

    def half(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("disk full\nand more")

    with pytest.raises(OSError, match=rf"cannot write {path} \(disk full\?\): disk full and more"):
        translate.write_file(path, half)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    ("loop", "number"), [("raw", signal.SIGINT), ("lightning", signal.SIGTERM)]
)
def test_a_signal_saves_the_last_state(loop, number, tmp_path, capsys):
    output = tmp_path / "model"
    arguments = [*SMALL, "--max-epochs", 10_000, "--loop", loop, "--no-modlee"]
    arguments += ["--checkpoint-every", 0, "--output", output]
    process = subprocess.Popen(
        [sys.executable, HERE / "run.py", *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    while not run.steps_in(output):  # steps are being made
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    time.sleep(0.05)
    process.send_signal(number)  # impatience loses nothing
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert b"Traceback" not in err and not (output / "config.json").exists()
    assert f"next:  python run.py --resume {output}\n" in out.decode()
    epoch = run.read_checkpoint(output)[1]["progress"]["epoch"]
    # What it has learnt can be had at once.
    assert main("--resume", output, "--max-epochs", epoch) == 0
    assert main("translate", "--model", output, "I see.") == 0


def test_training_in_another_thread_works_without_signals(tmp_path):
    before, codes = signal.getsignal(signal.SIGTERM), []
    flags = [*SMALL, "--loop", "raw", "--output", tmp_path / "model"]
    thread = threading.Thread(target=lambda: codes.append(main(*flags)))
    thread.start()
    thread.join()
    assert codes == [0] and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_run_killed_at_any_moment_goes_on(tmp_path):
    """kill -9 during a checkpoint and at random moments, repeatedly, with alternating loops. The
    weights equal those of an undisturbed run. KILLS=50 for many."""
    script = """
import os, signal, sys, torch, run
run.LOG_EVERY, plain, left = 1, torch.save, int(os.environ["SAVES"])
def save(state, path):
    global left
    plain(state, path)
    left -= 1
    if left == 0:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
sys.exit(run.main(sys.argv[1:]))
"""
    arguments = [*SMALL, "--no-modlee", "--max-epochs", 3, "--accumulate", 2, "--dropout", 0.1]
    arguments += ["--checkpoint-every", 0, "--loop", "raw", "--output"]
    chance, loops = random.Random(0), itertools.cycle(["lightning", "raw"])

    def start(*flags, saves: int = 0, seconds: float | None = None) -> int:
        """The exit code; killed during that checkpoint, or after that many seconds."""
        process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, flags)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(HERE), "SAVES": str(saves)},
        )
        try:
            error = process.communicate(timeout=seconds)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            error = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), error
        return process.returncode

    begun = time.perf_counter()
    assert start(*arguments, "whole") == 0
    whole, part = time.perf_counter() - begun, 0
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    for kill in range(KILLS + 1):
        output = f"part{part}"
        flags = ["--resume", output, "--loop", next(loops)]
        if not run.steps_in(tmp_path / output):
            flags = [*arguments, output]
        how = {"saves": chance.randint(1, 8)} if kill % 2 else {"seconds": chance.uniform(0, whole)}
        if start(*flags, **({} if kill == KILLS else how)) == 0:  # the last is left in peace
            assert (tmp_path / output / "model.safetensors").read_bytes() == expected
            assert not list((tmp_path / output).rglob(".*")), "no half file is left"
            part += 1
    assert part > 0


def other_value(field: dataclasses.Field) -> list[str]:
    """Words of the command line that set a field to something else than `SMALL` has."""
    flag = f"--{field.name.replace('_', '-')}"
    known = {"dataset": "x.tsv", "columns": "2 1", "tokenizer": "train:400", "preset": "tutorial"}
    known |= {"validation_set": "x.tsv", "test_set": "x.tsv", "positional": "none"}
    known |= {"activation": "relu2", "validation_size": "30", "test_size": "0.3", "init": "x"}
    if field.default is True or field.default is False:
        return [f"--no-{flag[2:]}" if field.default else flag]
    if field.name in known:
        return [flag, *known[field.name].split()]
    return [flag, "xy" if "str" in str(field.type) else "0.25" if field.type is float else "7"]


FIXED = [field for field in dataclasses.fields(run.TrainConfig) if field.name not in run.RESUMABLE]


@pytest.mark.parametrize("field", FIXED, ids=lambda field: field.name)
def test_resume_refuses_what_it_cannot_change(field, folder, capsys):
    """Every such flag by its name, before anything is loaded; equal values are fine."""
    words = other_value(field)
    with patch.object(torch, "load", side_effect=AssertionError):
        assert main("--resume", folder, *words) == 2
    error = capsys.readouterr().err
    flag = words[0].replace("--no-", "--")
    assert error.startswith(f"error: {flag} ") and "--init" in error and error.count("\n") == 1
    assert run.parse_settings(["--resume", str(folder), *SMALL[:2]]).num_samples == 300


def test_a_run_is_resumed_extended_and_started_from(folder, tmp_path, capsys, monkeypatch):
    """From the command line, with settings that change and data that may not."""
    model = shutil.copytree(folder, tmp_path / "copy")
    (newest,) = run.steps_in(model)
    assert newest.stat().st_mode & 0o044 and b"secret-key-7f3a" not in newest.read_bytes()
    settings = json.loads((model / "checkpoints" / "settings.json").read_text())
    assert settings["precision"] == settings["device"] == "auto", "chosen anew when it is resumed"
    pairs = write_pairs(tmp_path / "pairs.tsv", list(data.phrasebook(300, seed=9)))
    monkeypatch.chdir(tmp_path)
    for flags, message in (
        ((*SMALL, "--output", "fresh", "--init", model, "--d-model", 64), "has 32; leave"),
        ((*SMALL, "--output", model), "belongs to another run: continue it with --resume"),
        (("--resume", "copy/checkpoints"), "copy/checkpoints is not the folder of a run"),
    ):
        assert main(*flags) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "old.checkpoints").mkdir()
    (tmp_path / "old.checkpoints" / "step-000000009.pt").touch()
    for name in ("old", "old.checkpoints"):
        assert main("--resume", name) == 2
        assert "old.checkpoints was written by an older version" in capsys.readouterr().err
    # More epochs; the model is replaced, whole. The folder may have a link and a slash.
    (model / "mine").mkdir()
    (tmp_path / "latest").symlink_to("copy")
    more = ("--no-modlee", "--mlruns", "none", "--max-epochs", 2, "--loop", "raw")
    assert main("--resume", "latest/", *more) == 0
    assert (model / "mine").is_dir() and not list(model.rglob(".*")), "what others put there stays"
    assert json.loads((model / "metrics.json").read_text())["steps"] == 9 + 9
    rates = run.read_checkpoint(model)[1]["progress"]["history"]["rate"]
    assert 0 < rates[-1][1] < 0.3 * 3e-3, "the schedule ends with the run"
    assert len(run.steps_in(model)) == 2
    assert main("--resume", "copy", "--max-epochs", 1) == 2
    assert "2 epochs are done, which is more than" in capsys.readouterr().err
    # Into another folder: the first stays as it is.
    before = {path: path.read_bytes() for path in model.rglob("*.*")}
    assert main("--resume", "copy", "--output", "fork", "--max-epochs", 3) == 0
    assert {path: path.read_bytes() for path in model.rglob("*.*")} == before
    assert json.loads(Path("fork/metrics.json").read_text())["steps"] == 27
    # Other data under the same name.
    with patch.object(data, "phrasebook", partial(data.phrasebook, seed=1)):
        assert main("--resume", "fork", "--max-epochs", 4) == 2
    assert "start a new run from its model with --init" in capsys.readouterr().err
    settings.pop("beam")  # by another version of the program
    (model / "checkpoints" / "settings.json").write_text(json.dumps(settings))
    assert main("--resume", "copy") == 2
    assert "by another version" in capsys.readouterr().err
    config = json.loads((model / "config.json").read_text())
    changed = config | {"source_lang": "de"}
    (model / "config.json").write_text(json.dumps(changed))
    assert run.parse_settings(["--init", "copy"]).source_lang == "de"
    changed["model"] = config["model"] | {"tie_embeddings": False}
    (model / "config.json").write_text(json.dumps(changed))
    assert main(*SMALL, "--init", model) == 2
    assert "untied embeddings" in capsys.readouterr().err
    del config["model"]["activation"]  # as in a folder that is older than the field
    (model / "config.json").write_text(json.dumps(config))
    # Other pairs, the same weights and tokenizer, either loop: one step of next to nothing.
    flags = ["--init", str(model), "--dataset", str(pairs), "--max-epochs", "1", "--clip-norm"]
    flags += ["1e-9", "--learning-rate", "1e-9", "--mlruns", "none", "--no-modlee"]
    for loop in ("raw", "lightning"):
        assert main(*flags, "--loop", loop, "--output", loop) == 0
        weights = [load_file(path / "model.safetensors") for path in (model, tmp_path / loop)]
        assert all(close(weights[0][name], weights[1][name]) for name in weights[0])
        tokenizers = [(path / "tokenizer.json").read_bytes() for path in (model, tmp_path / loop)]
        assert tokenizers[0] == tokenizers[1]
    model.rename(tmp_path / "moved")  # which the new run needs no more
    Path("raw").rename("renamed")
    assert main("--resume", "renamed", "--max-epochs", 2, "--no-modlee") == 0


def test_an_optimizer_keeps_its_own_settings_when_resumed(prepared):
    """As on a machine without the fused kernels that wrote the checkpoint."""
    model, hooks, _ = fit(prepared, max_epochs=1, weight_decay=0.1)
    again = MemoryHooks(hooks.config, prepared, next(iter(hooks.states.values())))
    groups = [{"params": [p], "weight_decay": 0.3} for p in model.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=9.0, foreach=False)
    count = len(list(model.parameters()))
    again.resumed["optimizer"] = {i: again.resumed["optimizer"][i] for i in range(count)}
    again.begin(run.Progress(), 1, model, optimizer, None)
    for group in optimizer.param_groups:
        assert (group["fused"], group["foreach"], group["weight_decay"]) == (None, False, 0.3)
    assert optimizer.state_dict()["state"][3]["step"] == hooks.progress.step


def test_nothing_in_a_model_folder_is_executed(folder, tmp_path):
    """Neither in place of the weights, nor beside them, nor through the tokenizer."""
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
    for name in MODULES:
        source = (HERE / name).read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in source
        assert source.count("torch.load(") == source.count("weights_only=True)")
        banned = r"^[^#]*(pickle\.loads?|np\.load|(?<![.\w])eval|(?<![.\w])exec)\("
        assert not re.search(banned, source, re.MULTILINE)


# ---- the model folder ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder made by `python run.py`, Lightning and, if it is installed, Modlee."""
    root = tmp_path_factory.mktemp("cli")
    for name in ("home", "work", "out"):
        (root / name).mkdir()
    env = os.environ | {"HOME": str(root / "home"), "HF_HUB_OFFLINE": "1"}
    env["MODLEE_API_KEY"] = "secret-key-7f3a"
    more = ("--output", root / "out" / "model", "--mlruns", "runs/mlruns")
    done = command(*SMALL, *more, cwd=root / "work", env=env)
    assert done.returncode == 0, done.stderr
    (root / "stdout").write_text(done.stdout)
    (root / "stderr").write_text(done.stderr)
    return root / "out" / "model"


def test_a_run_leaves_a_whole_model_folder_and_nothing_else(folder):
    names = "model.safetensors config.json metrics.json loss.png tokenizer.json validation.tsv"
    found = {path.name for path in folder.iterdir()}
    assert set(names.split()) <= found and not [name for name in found if name.startswith(".")]
    metrics = json.loads((folder / "metrics.json").read_text())
    names = "dataset tokenizer pairs parameters device precision loop modlee artifacts steps "
    names += "train_seconds tokens_per_second padding_share train_loss val_loss best_step bleu "
    names += "chrf signature versions round_trip_loss_source scored skipped_steps"
    assert set(names.split()) <= metrics.keys()
    dropped = sum(metrics["dropped"].values())
    assert sum(metrics["pairs"].values()) + dropped == 300
    assert metrics["modlee"] == HAS_MODLEE
    assert 0 < metrics["train_loss"] < 10 and 0 < metrics["val_loss"] < 10
    root = folder.parent.parent
    out = (root / "stdout").read_text()
    for word in (
        "phrasebook",
        "not a benchmark",
        "train:320",
        "cpu",
        "fp32",
        "lightning",
        "modlee",
    ):
        assert word in out
    assert metrics["signature"] in out and out.count("translation  ") == 6
    more = f"python run.py --resume {folder} --max-epochs 2"
    assert f"{folder}/checkpoints is kept for {more}; else delete it" in out
    log = (root / "stderr").read_text()
    assert "\r" not in log and log.count("epoch 1/1:  ") < 30, "few lines of progress in a file"
    assert [path.name for path in (root / "work").iterdir()] == ["runs"]
    left = [path for path in (root / "home").rglob("*") if path.is_file()]
    assert not [path for path in left if not {".cache", ".config"} & set(path.parts)]
    for path in root.rglob("*"):
        assert not path.is_file() or b"secret-key-7f3a" not in path.read_bytes(), path
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast", "known to transformers 4 and 5"


def test_a_damaged_model_folder_is_refused(folder, tmp_path, capsys):
    damages = [("model.safetensors", b"\x80\x04damaged", "not a model folder")]
    damages += [("config.json", b"{}", "not a model folder: config.json has no 'source_lang'")]
    damages += [("config.json", b"not json", "not a model folder")]
    damages += [("tokenizer.json", b"{}", "neither a model nor a tokenizer")]
    for name, content, message in damages:
        copy = shutil.copytree(folder, tmp_path / f"{name}-{len(content)}")
        (copy / name).write_bytes(content)
        assert main("translate", "--model", copy, "text") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert "--" not in error and "train" not in error, "no advice that translate has no use for"


def test_a_model_folder_that_stores_its_table_of_positions_loads(folder, tmp_path):
    """As folders did before the table was computed."""
    old = shutil.copytree(folder, tmp_path / "old")
    weights = load_file(old / "model.safetensors")
    assert "positions.table" not in weights
    save_file(weights | {"positions.table": torch.zeros(64, 32)}, old / "model.safetensors")
    logits = [
        translate.load_model(str(name), torch.device("cpu"))[0](random_ids(1, 5), random_ids(1, 5))
        for name in (folder, old)
    ]
    assert torch.equal(*logits)


# ---- curves and MLflow ------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["raw", "lightning", pytest.param("modlee", marks=needs_modlee)])
def test_a_run_is_seen_while_it_trains(loop, tmp_path, capsys, monkeypatch):
    """Time left and samples on stderr, the picture, all points in the MLflow store of the user."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    store = (tmp_path / loop / "mlruns").as_uri()
    flags = [*SMALL[:-2], "--max-epochs", 2, "--batch-size", 16, "--weight-decay", 0.2]
    if loop != "modlee":
        flags += ["--loop", loop, "--no-modlee"]
    if loop == "raw":
        monkeypatch.setattr(run, "TRACKING_URI", store)
    else:
        flags += ["--mlruns", loop]
    assert main(*flags, "--output", "model") == 0
    said = capsys.readouterr()
    (line,) = [part for part in said.err.splitlines() if "epoch 1/2: train" in part]
    assert re.search(r"validation \d.*BLEU .* of 20 pairs, 0:00:\d\d left", line)
    assert (tmp_path / "model" / "loss.png").read_bytes().startswith(b"\x89PNG")
    client = mlflow.MlflowClient(store)
    (found,) = client.search_runs(["0"])
    assert found.info.status == "FINISHED" and found.info.run_name == "model"
    assert found.data.params["config.max_epochs"] == "2"
    assert found.data.params["config.weight_decay"] == "0.2"
    assert "disabled" not in said.err and not (tmp_path / "mlruns").exists()
    curves = {
        name: [(p.step, p.value) for p in client.get_metric_history(found.info.run_id, name)]
        for name in ("train", "rate", "validation", "bleu")
    }
    assert [len(points) for points in curves.values()] == [3, 3, 2, 2]
    metrics = json.loads((tmp_path / "model" / "metrics.json").read_text())
    assert curves["validation"][-1] == (metrics["steps"], metrics["last_val_loss"])
    assert found.data.metrics["final_bleu"] == metrics["bleu"]
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true", "it tells its makers nothing"


def test_failing_records_do_not_end_training(tmp_path, capsys, monkeypatch):
    pytest.importorskip("mlflow")

    def fail(*_) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(run, "draw_curves", fail)
    monkeypatch.setattr(run, "set_mlflow_store", fail)
    more = ("--loop", "raw", "--max-epochs", 2, "--mlruns", tmp_path / "mlruns")
    assert main(*SMALL, *more, "--output", tmp_path / "model") == 0
    error = capsys.readouterr().err
    for name in ("MLflow", "loss.png"):
        assert error.count(f"note: {name} failed and is disabled: No space left on device") == 1
    assert (tmp_path / "model" / "config.json").is_file()


def test_samples_change_nothing_that_is_learnt_and_no_time(prepared, tmp_path):
    """And the time left includes long validations."""
    seconds = []

    class Show(MemoryHooks):
        def show(self, progress: run.Progress) -> None:
            seconds.append(self.found["seconds"])
            self.folder, self.config = tmp_path, dataclasses.replace(self.config, mlruns="none")
            run.RunHooks.show(self, progress)
            self.started -= 1000  # as if it took so long; it does not count

    plain, hooks, _ = fit(prepared)
    assert same_weights(plain, fit(prepared, hooks=Show)[0])
    assert seconds[1] < 1000
    hooks.found["seconds"], hooks.batches = 1234.0, 100
    assert hooks.time_left(run.Progress(epoch=0, batch=50)) == "1:01:42"


# ---- translating and scoring ------------------------------------------------------------------


def test_translate_writes_one_line_per_line(folder):
    lines = ["The cat sleeps.", "", "   ", "I see a dog.", "x " * 200, "", "last"]
    done = command("translate", "--model", folder, input="\n".join(lines))
    assert done.returncode == 0, done.stderr
    out = done.stdout.split("\n")
    assert out.pop() == "" and len(out) == len(lines)
    assert out[1] == out[2] == out[5] == "" and any(out)
    translator = translate.load_translator(str(folder))
    assert translator.translate(["I see a dog.", "", "The cat sleeps."]) == [out[3], "", out[0]]
    more = {"input": b"fine\n\xff\xfe\n", "text": False, "encoding": None}
    done = command("translate", "--model", folder, **more)
    assert done.returncode == 2
    assert done.stdout.count(b"\n") == 1, "the line before it is translated"
    assert done.stderr.decode().splitlines()[-1].startswith("error: standard input:2: not")


def test_closed_standard_streams_are_no_error(folder):
    for arguments in (["translate", "--model", folder, "I see a dog."], ["--help"]):
        words = [sys.executable, HERE / "run.py", *arguments]
        shell = f"exec {shlex.join(map(str, words))} <&- >&- 2>&-"
        assert subprocess.call(["sh", "-c", shell]) == 0


def test_help_into_head_ends_in_silence():
    words = [sys.executable, HERE / "run.py", "--help"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(list(map(str, words)), **pipes) as process:
        process.stdout.close()
        assert process.wait() == -signal.SIGPIPE and not process.stderr.read()


def test_a_model_is_used_from_python_in_another_folder(folder, tmp_path):
    """As in the README, with copies of the files that it names."""
    for wrong in ({"beam": 0}, {"num_return": 2}, {"precision": "fp16"}):
        with pytest.raises(InputError, match="must be|fp32 or bf16"):
            translate.load_translator(str(folder), **wrong)
    with pytest.raises(InputError, match="a list of lines"):
        translate.load_translator(str(folder)).translate("The teacher sees you.")
    shutil.copytree(folder, tmp_path / "runs" / "NAME")
    found = run_readme_code(0, tmp_path, *MODULES[:-1])
    lines = ["The teacher sees you.", "We like the red house."]
    assert found.strip() == str(translate.load_translator(str(folder)).translate(lines))


def test_over_long_lines_are_split_and_named(folder, tmp_path, capsys, prepared):
    """With learned positions too, which end: nothing is lost, nothing fails."""
    config = run.TrainConfig(positional="learned")
    model = tiny_model(vocab_size=320, positional="learned")
    tokenizer = data.load_tokenizer(str(folder))
    run.save_model(tmp_path / "m", model, prepared._replace(tokenizer=tokenizer), config, {})
    assert main("translate", "--model", tmp_path / "m", "short", "one two " * 40) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert "note: line 2: longer than 40 tokens, translated in pieces" in err
    assert "note: 2 lines (1, 2): the translation did not end" in err, "untrained"


def test_long_texts_are_split_at_sentences_then_clauses(folder):
    tokenizer = data.load_tokenizer(str(folder))

    def split(text: str, most: int) -> list[str]:
        pieces = translate.split_text(text, tokenizer, most)
        assert all(len(ids) <= most and ids[-1] == 1 for ids in pieces)
        return data.decode_ids(pieces, tokenizer, "en")

    sentences = ["The cat sees a dog.", "Did you see it?", "“Yes.”"]
    text = " ".join(sentences)
    assert split(text, 1000) == [text]
    assert split(text, 20) == sentences
    clauses = "The cat sleeps, the dog sleeps, the wolf sleeps, the bird sleeps."
    pieces = split(clauses, 30)
    assert len(pieces) > 1 and all(piece[-1] in ",." for piece in pieces)
    words = ("the cat sees a dog and a wolf " * 9).strip()
    assert " ".join(split(words, 12)) == words
    assert "".join(split("x7q" * 50, 9)) == "x7q" * 50


def test_any_lines_are_translated_one_by_one_and_in_order(folder):
    """SENTENCES=100000 for many."""
    chance = random.Random(0)
    lines = [
        re.sub("\n|\r$", "", "".join(chance.choices(TROUBLE, k=n % 7))) for n in range(SENTENCES)
    ]
    content = "".join(f"{line}\n" for line in lines).encode()
    done = command("translate", "--model", folder, input=content, text=False, encoding=None)
    assert done.returncode == 0, done.stderr
    found = done.stdout.decode().split("\n")
    assert len(found) == SENTENCES + 1 and found.pop() == ""
    empty = [not data.normalize(line, "en") for line in lines]
    assert sum(empty) > SENTENCES / 7
    assert not any(output for output, nothing in zip(found, empty) if nothing)
    translator = translate.load_translator(str(folder))
    for i in chance.sample(range(SENTENCES), 30):
        assert translator.translate([lines[i]]) == [found[i]]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_translating_takes_no_more_memory_for_more_lines(folder):
    pages, lines = [], (f"The cat sees {n}." for n in range(SENTENCES))
    translator = translate.load_translator(str(folder))
    for number, _ in enumerate(translator.stream(lines, window=max(16, SENTENCES // 100))):
        if number % (SENTENCES // 4) == SENTENCES // 4 - 1:
            pages.append(resident_pages())
    assert max(pages[1:]) <= 1.02 * pages[0], pages


def test_translate_reads_a_window_at_a_time_and_keeps_the_order(folder):
    translator = translate.load_translator(str(folder), batch_tokens=64)
    lines = [f"I see {'a dog and ' * (n % 5)}{n}." for n in range(40)]
    seen = []
    stream = translator.stream((line for line in lines if not seen.append(line)), window=8)
    first = next(stream)
    assert len(seen) == 8, "no more is read than a window"
    found = [best for ((best, _),) in [first, *stream]]
    assert found == [translator.translate([line])[0] for line in lines]
    lengths = [3, 50, 4, 4, 9, 9, 9, 200]
    rows = sorted(range(8), key=lengths.__getitem__)
    batches = list(translate.batch_by_tokens(rows, lengths, 40))
    assert [row for batch in batches for row in batch] == rows
    sizes = [len(batch) * max(lengths[row] for row in batch) for batch in batches]
    assert all(size <= 40 or len(batch) == 1 for size, batch in zip(sizes, batches))


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
    assert main("translate", "--precision", "bf16", *more) == 0
    assert capsys.readouterr().out.count("\n") == 3


def test_evaluate_scores_a_file(folder, tmp_path, capsys):
    pairs = [("The cat sleeps.", "Pisica doarme."), ("I see.", "Ştiu.")]
    path = write_pairs(tmp_path / "pairs.tsv", pairs)
    report, lines = tmp_path / "out.json", tmp_path / "out.ro"
    flags = ("evaluate", "--model", folder, "--dataset", path, "--json", report)
    assert main(*flags, "--hypotheses", lines) == 0
    result = json.loads(report.read_text())
    assert result["pairs"] == 2
    assert result["signature"] in capsys.readouterr().out
    translator = translate.load_translator(str(folder))
    sources = [source for source, _ in pairs]
    assert lines.read_text("utf-8").splitlines() == translator.translate(sources)
    assert main(*flags, "--hypotheses", lines) == 2, "it is not replaced"
    write_pairs(path, [*pairs, ("", ""), ("Half a pair.", "")])
    assert main(*flags) == 0
    again = json.loads(report.read_text())
    assert (again["pairs"], again["bleu"]) == (2, result["bleu"])
    assert {"bleu", "chrf", "signature", "chrf_signature", "seconds"} <= again.keys()
    assert main("evaluate", "--model", folder, "--dataset", tmp_path / "no.tsv") == 2
    for wrong in (tmp_path, tmp_path / "no" / "out.json", folder / "config.json", path):
        assert main(*flags[:-1], wrong) == 2
    assert path.read_text().startswith("The cat")


def test_cedilla_and_comma_score_alike(folder, tmp_path):
    """One policy on both sides: references are read, and outputs decoded, as comma below."""
    assert read_all(write_pairs(tmp_path / "a.tsv", [("a", "Ştiţi")])) == [("a", "Știți")]
    tokenizer = data.load_tokenizer(str(folder))
    ids = torch.tensor(data.encode_texts(["Ştiţi  că"], tokenizer))
    assert data.decode_ids(ids, tokenizer, "ro") == ["Știți că"]
    assert data.decode_ids(ids, tokenizer, "tr") == ["Ştiţi că"]


def test_an_interrupted_score_leaves_a_model(tmp_path, capsys, monkeypatch):
    def interrupted(*_) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(run, "score_model", interrupted)
    output, handler = tmp_path / "a model", signal.signal(signal.SIGINT, run.raise_interrupted)
    try:
        assert main(*SMALL, "--loop", "raw", "--output", output) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert f"evaluate --model '{output}'" in capsys.readouterr().err
    assert main("translate", "--model", output, "I see.") == 0


def test_held_out_parts_are_trained_without_and_scored_on(tmp_path, capsys):
    """No source sentence of validation or test is trained on, even if the data has it."""
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
    config = run.parse_settings(list(map(str, (*own, *more))))
    prepared = run.prepare_data(config)
    assert prepared.dropped["held out"] == sum(source in held_out for source, _ in rows)
    assert prepared.test_pairs == parts["test"]
    assert prepared.validation_pairs == parts["validation"]
    short = run.prepare_data(dataclasses.replace(config, max_length=12))
    lost = len(parts["validation"]) - len(short.validation)
    assert short.dropped["over-long validation"] == lost > 0
    for wrong in ("vall", tmp_path / "no.tsv"):
        flags = ("--dataset", pairs, "--validation-set", wrong, "--preset", "base")
        assert main(*SMALL, *flags, "--output", tmp_path / "n") == 2
    assert "has no split 'vall', and files end in" in capsys.readouterr().err
    assert main(*own[:-2], "--test-size", 450, "--output", tmp_path / "n") == 2
    assert "give more pairs or another size" in capsys.readouterr().err


# ---- export -----------------------------------------------------------------------------------


def test_export_writes_a_folder_for_transformers_alone(folder, tmp_path, capsys):
    import transformers

    output = tmp_path / "hf"
    assert main("export", "--model", folder, "--to", "hf", output) == 0
    assert main("export", "--model", folder, "--to", "hf", output) == 2, "nothing is lost"
    assert "exists already" in capsys.readouterr().err
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(output)
    text = "I see a dog."
    expected = translate.load_translator(str(folder)).translate([text])[0]
    batch = tokenizer([text], return_tensors="pt")
    limit = {"max_new_tokens": 2 * batch["input_ids"].size(1) + 10, "max_length": None}
    (read,) = tokenizer.batch_decode(model.generate(**batch, **limit), skip_special_tokens=True)
    assert data.normalize(read, "ro") == expected
    # Spaces and composed letters as in training.
    assert tokenizer("  I see\u00a0a  dog.")["input_ids"] == batch["input_ids"][0].tolist()


def test_an_engine_folder_translates_and_evaluates_like_its_model(folder, tmp_path, capsys):
    pytest.importorskip("ctranslate2")
    assert main("export", "--model", folder, "--to", "ctranslate2", tmp_path / "ct2") == 0
    assert main("export", "--model", folder, "--quantization", "int8", tmp_path / "int8") == 0
    size = [(tmp_path / name / "model.bin").stat().st_size for name in ("ct2", "int8")]
    assert size[1] < 0.8 * size[0]
    lines = [english for english, _ in data.phrasebook(200, seed=1)]
    lines += ["", " ".join(lines[:12])]  # longer than the model knows: in pieces
    translators = [translate.load_translator(str(name)) for name in (folder, tmp_path / "ct2")]
    found = [translator.translate(lines) for translator in translators]
    assert found[0] == found[1] and len(found[0]) == 202
    assert all("translated in pieces" in " ".join(each.notes) for each in translators)
    scores = []
    for name in (folder, tmp_path / "ct2", tmp_path / "int8"):  # on its own test part
        assert main("evaluate", "--model", name, "--json", tmp_path / "report.json") == 0
        report = json.loads((tmp_path / "report.json").read_text())
        scores.append(report["bleu"])
    assert scores[0] == scores[1] and abs(scores[2] - scores[0]) <= 1
    assert report["precision"].startswith("int8")
    assert main("translate", "--model", name, "--precision", "bf16", "I see.") == 2
    capsys.readouterr()
    assert main("export", tmp_path / "again", "--model", tmp_path / "ct2") == 2
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


# ---- benchmarks -------------------------------------------------------------------------------


def bench_case(prepared, **changes):
    config = run.TrainConfig(**TINY_BENCH, max_epochs=1, precision="fp32", **changes)
    model, loaders = lightning.bench_case(config, prepared, torch.device("cpu"))
    loaders[0].batch_sampler.repeats = 1
    loaders[0].batch_sampler.set_epoch(0)
    return config, model, loaders


TINY_BENCH = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "batch_size": 16}
TINY_BENCH |= {"num_encoder_layers": 1, "num_decoder_layers": 1}


def test_two_turns_are_the_same_work(prepared):
    _, model, loaders = bench_case(prepared)
    sampler, window = loaders[0].batch_sampler, lightning.WINDOW
    sampler.repeats = 2
    sampler.set_epoch(0)
    batches = list(sampler)
    assert batches[:window] == batches[window:]
    work = lightning.describe_work(sampler, model.config)
    pairs = [prepared.train[row] for batch in batches[:window] for row in batch]
    assert work["source_tokens"] == sum(len(s) for s, _ in pairs) / window
    assert work["target_tokens"] == sum(len(t) for _, t in pairs) / window
    flops = sum(count_flops(model.config, len(s), len(t)) for s, t in pairs)
    assert work["flops"] == 3 * flops / window


ON_LIGHTNING = [name for name, arm in lightning.ARMS.items() if arm.trainer is not None]


@pytest.mark.parametrize("name", [a for a in ON_LIGHTNING if lightning.ARMS[a].modlee is None])
def test_every_arm_trains_like_the_raw_loop(prepared, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ends = []
    for arm in ("raw", name):
        config, model, loaders = bench_case(prepared, clip_norm=1.0)
        progress = lightning.run_arm(lightning.ARMS[arm], model, loaders, config, prepared)
        ends.append((progress.history, model))
    assert ends[0][0] == ends[1][0] and same_weights(ends[0][1], ends[1][1])
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert any(file.endswith(".ckpt") for file in left) == (name in ("save", "defaults"))
    # By itself Lightning logs to TensorBoard where that is installed.
    logs = [file for file in left if file.endswith(".csv") or ".tfevents." in file]
    assert bool(logs) == (name in ("log", "defaults"))


def test_phases_and_loop_overhead_make_up_a_step(prepared, monkeypatch):
    """Every phase is called as often as it should be, and the patches are removed afterwards."""
    config, model, loaders = bench_case(prepared)
    timer, ticks, steps = lightning.TurnTimer(None, torch.device("cpu")), itertools.count(), []
    monkeypatch.setattr(timer, "clock", lambda: next(ticks))
    monkeypatch.setattr(lightning.TurnTimer, "__call__", lambda _, state: steps.append(state.step))
    before = TransformerSeq2SeqModel.forward, torch.Tensor.backward, run.start_step
    with lightning.timed_phases(timer, wait=True):
        run.train_raw(model, *loaders, config)
    count, validated = lightning.WINDOW, len(loaders[1])
    assert steps == list(range(count))
    assert timer.phases.pop("forward") == count + validated
    assert timer.phases.pop("data") >= count + validated
    assert timer.phases == dict.fromkeys(("backward", "clipping", "optimizer"), count)
    after = TransformerSeq2SeqModel.forward, torch.Tensor.backward, run.start_step
    assert before == after


def test_a_stall_does_not_move_the_median_interval():
    noise = 0.01 * np.random.default_rng(1).standard_normal(40)
    middle, low, high = harness.median_interval(0.2 + noise)
    assert low < 0.2 < high and high - low < 0.02
    stalled = 0.2 + noise
    stalled[3] += 30  # one stall of the machine
    assert harness.median_interval(stalled)[0] == pytest.approx(middle, abs=0.005)


def served(name: str, order: list, loss: float = 5.0):
    """A stand-in for an arm: its loop takes as many ms a step as its name has letters."""

    def ask(*question) -> dict:
        order.append(name)
        phases, loop = {"forward": 0.8, "backward": 1.2}, len(name) * 1e-3 * lightning.WINDOW
        answer = {"whole": 2.0 + loop, "loop": loop, "phases": phases, "losses": [(20, loss)]}
        return answer | {"peak": 2**20}

    return ask


def test_arms_take_turns_there_and_back_and_their_losses_agree():
    order, names = [], ["raw", "bar", "clip"]
    serve = {name: served(name, order) for name in names}
    answers = harness.take_turns(serve, 3, Mock())
    assert order == [*names, *reversed(names), *names]
    assert [len(found) for found in answers.values()] == [3, 3, 3]
    lightning.check_losses(answers)
    serve["clip"] = served("clip", order, 5.0000001)
    with pytest.raises(InputError, match="Trainer are .* the times cannot be compared"):
        lightning.check_losses(harness.take_turns(serve, 1, Mock()))


def test_an_interrupted_start_ends_the_processes_that_are_there():
    kind, started = multiprocessing.get_context("spawn").Process, []
    start = kind.start

    def stop_the_second(process) -> None:
        if started:
            raise run.Interrupted(130)
        started.append(process)
        start(process)

    jobs = {"raw": (), "adapter": ()}
    serving = harness.serving(Connection.recv, jobs)
    with patch.object(kind, "start", stop_the_second), pytest.raises(run.Interrupted), serving:
        pass
    started[0].join(60)
    assert started[0].exitcode == -signal.SIGKILL


def test_costs_are_itemised_and_drawn(tmp_path, capsys):
    report = {"rows": [], "sizes": {}, "left_out": {"Modlee": "not installed"}}
    report |= {"precision": "fp32", "machine": "a machine", "matmul_gflops": 100.0}
    report |= {"versions": translate.versions()}
    for size, flops in {"small": 1e9, "demo": 4e9}.items():
        work = {"source_tokens": 10, "target_tokens": 20, "flops": flops}
        report["sizes"][size] = work
        for group in lightning.GROUPS[: 1 if size == "small" else None]:
            serve = {name: served(name, []) for name in group}
            answers = harness.take_turns(serve, 4, Mock())
            report["rows"] += lightning.describe_arms(size, answers, work, 1e11)
    rows = {row["arm"]: row for row in report["rows"] if row["size"] == "demo"}
    assert rows["clip"]["beside"] == "adapter" and rows["modlee-data"]["beside"] == "autolog"
    assert rows["clip"]["more_loop_ms"] == pytest.approx([-3, -3, -3])  # clip - adapter letters
    assert rows["raw"]["more_whole_ms"] == pytest.approx([0, 0, 0], abs=1e-9)
    assert rows["raw"]["mfu"] == pytest.approx(4e9 / (rows["raw"]["ms"] / 1e3) / 1e11)
    assert rows["raw"]["ms"] == pytest.approx(103)
    phases = {"forward": 40.0, "backward": 60.0, "loop": float(len("phases"))}
    assert rows["phases"]["phases_ms"] == pytest.approx(phases)
    lightning.print_bench(report)
    printed = capsys.readouterr().out
    assert all(arm.label in printed for arm in lightning.ARMS.values())
    figures.draw_bench(report, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 20_000
    assert figures.main(["--help"]) == 0 and figures.main(["attention", "runs/NAME"]) == 2


def test_bench_times_arms_in_processes_of_their_own(tmp_path, capsys, monkeypatch):
    """Two arms, three turns; one that cannot begin; a trace of ten steps."""
    broken = lightning.Arm("broken", {"max_steps": "none"})
    monkeypatch.setattr(lightning, "ARMS", lightning.ARMS | {"broken": broken})
    monkeypatch.setattr(lightning, "GROUPS", (("raw", "adapter", "broken"),))
    monkeypatch.setattr(lightning, "SIZES", {"cpu": {"small": {}, "demo": TINY_BENCH}})
    trace = tmp_path / "trace.json"
    found = lightning.main(lightning.BenchConfig(quick=True, turns=3))
    rows = {row["arm"]: row for row in found["rows"]}
    assert rows.keys() == {"raw", "adapter"} and len(rows["raw"]["turns_ms"]) == 3
    assert found["left_out"]["broken"].startswith("broken: ")
    low, high = rows["adapter"]["more_loop_ms"][1:]
    assert low <= high and rows["adapter"]["beside"] == "raw"
    assert "this adapter, --no-modlee" in capsys.readouterr().out
    for _ in range(2):  # it takes the place of its like
        assert lightning.main(lightning.BenchConfig(profile=str(trace))) == {}
    events = json.loads(trace.read_text())["traceEvents"]
    steps = [event["name"] for event in events if event["name"].startswith("ProfilerStep")]
    assert len(set(steps)) == 10
    with pytest.raises(InputError, match="is not a report"):
        lightning.main(lightning.BenchConfig(profile=str(HERE / "run.py")))
    with pytest.raises(InputError, match="at least 3"):
        lightning.main(lightning.BenchConfig(turns=2))


def test_bench_is_a_script_that_nothing_imports(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main("bench", "--turns", "0") == 2
    assert "error: --turns must be at least 3" in capfd.readouterr().err
    for name in MODULES:
        source = (HERE / name).read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) benchmarks", source, re.MULTILINE), name
    code = "import os, sys; before = dict(os.environ); sys.stdout = sys.stdin = None; import run"
    assert python("-c", f"{code}; sys.exit(before != os.environ)", cwd=HERE).returncode == 0


def test_all_trainees_learn_the_same_task(prepared):
    """From the same start, the losses of those that do the task right are alike."""
    config = dataclasses.replace(tiny_model(dropout=0.0).config, vocab_size=400)
    for kind in ("buckets", "longest", "fixed"):
        batches, lengths = train_bench.cut_batches(prepared.train, kind, 600, 3, 1)
        real = sum(ids.ne(0).sum().item() for batch in batches for ids in batch)
        assert len(batches) == 3 and real == sum(map(sum, lengths))
    for name in ("ours", "torch", "marian", "tutorial"):
        torch.manual_seed(0)
        model = train_bench.TRAINEES[name].build(config)
        train_bench.same_scale(model, config.d_model)
        loss = model(*batches[0])
        loss.backward()
        wrong = name == "tutorial"  # its loss counts pads
        assert wrong or abs(loss.item() - math.log(400)) < 1, name


# ---- the wmt16 path ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub_home(tmp_path_factory, phrases) -> Path:
    """A Hugging Face home that answers offline to wmt16 / ro-en and to t5-small."""
    import datasets

    home, revision = tmp_path_factory.mktemp("hub"), "0" * 40
    rows = [{"translation": {"ro": ro, "en": en}} for en, ro in phrases[:250]]
    parts = {"train": rows[:200], "validation": rows[190:220], "test": rows[210:]}
    features = datasets.Features({"translation": datasets.Translation(["ro", "en"])})
    splits = {
        name: {"name": name, "num_bytes": 1, "num_examples": len(part), "dataset_name": "wmt16"}
        for name, part in parts.items()
    }
    info = {"features": {"translation": {"languages": ["ro", "en"], "_type": "Translation"}}}
    info |= {"builder_name": "parquet", "dataset_name": "wmt16", "config_name": "ro-en"}
    info |= {"version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0}}
    for name in ("wmt16", "wmt___wmt16"):
        folder = home / "datasets" / name / "ro-en" / "0.0.0" / revision
        folder.mkdir(parents=True)
        for split, part in parts.items():
            path = str(folder / f"wmt16-{split}.arrow")
            writer = datasets.arrow_writer.ArrowWriter(path=path, features=features)
            for row in part:
                writer.write(row)
            writer.finalize()
        (folder / "dataset_info.json").write_text(json.dumps(info | {"splits": splits}))
    model = home / "hub" / "models--t5-small"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(revision)
    sides = [text for pair in phrases[:200] for text in pair]
    data.train_tokenizer(sides, 400).save_pretrained(model / "snapshots" / revision)
    (model / "snapshots" / revision / "config.json").write_text('{"model_type": "t5"}')
    return home


def test_the_tutorials_calls_and_preset_run_on_a_cached_wmt16(hub_home, tmp_path):
    script = """
import sys, data, run, seq2seq
input_ids, decoder_input_ids, tokenizer = data.load_dataset_and_tokenize(60)
assert input_ids.shape == decoder_input_ids.shape == (60, 50), input_ids.shape
train, val = data.create_dataloaders(input_ids, decoder_input_ids)
assert len(train.dataset) == 48 and len(val.dataset) == 12
model = seq2seq.TransformerSeq2SeqModel(len(tokenizer), d_model=32, nhead=4,
    num_encoder_layers=1, num_decoder_layers=1, max_length=50)
source, labels = next(iter(train))
logits = model(source, seq2seq.shift_right(labels))
assert logits.shape == (16, labels.size(1), len(tokenizer))
sys.exit(run.main(sys.argv[1:]))
"""
    env = os.environ | {"HF_HOME": str(hub_home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)}
    more = ["--d-model", 32, "--dim-feedforward", 64, "--no-modlee", "--mlruns", "none"]
    more += ["--preset", "tutorial", "--output", "model"]
    done = python("-c", script, *more, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "model" / "metrics.json").read_text())
    assert metrics["pairs"] == {"train": 80, "validation": 20, "test": 0}
    assert metrics["steps"] == 5 and metrics["tokenizer"] == "t5-small"
    assert "wmt16/ro-en train[:80%]" in done.stdout


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
    assert "no split 'validation' (from the preset)" in done.stderr
    assert "20 validation pairs, greedy" in done.stdout


# ---- Modlee -----------------------------------------------------------------------------------


@needs_modlee
def test_importing_modlee_leaves_the_process_as_it_was():
    script = """
import logging, ssl, warnings, torch, modlee_record, run
run.import_lightning()
import mlflow, sklearn
def state():
    names = ["pytorch_lightning", "lightning.pytorch.core", "mlflow", "torchvision",
             "torch.nn", "sklearn", "pymfe", "numpy"]
    return (ssl._create_default_https_context, torch.get_rng_state().tolist(),
            list(logging.root.handlers), logging.root.level, list(warnings.filters),
            [(logging.getLogger(n).level, logging.getLogger(n).propagate) for n in names])
before = state()
assert modlee_record.import_modlee() is not None
after = state()
for one, other in zip(before, after):
    assert one == other, (one, other)
context = ssl._create_default_https_context()
assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname
"""
    done = python("-W", "ignore", "-c", script, cwd=HERE)
    assert done.returncode == 0, done.stderr


def test_a_snapshot_puts_everything_back():
    """What Modlee's callbacks change: random states, trainability, modes, print options."""
    model = tiny_model()
    model.embedding.weight.requires_grad_(False)
    model.dropout.eval()
    restore = modlee_record.snapshot(model)
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


FROZEN = ("encoder_layers.0.linear1.weight",)


@pytest.fixture(scope="module")
def recorded(prepared, tmp_path_factory):
    """Training with Modlee, in folders of its own: (model, hooks, record), folder."""
    folder = tmp_path_factory.mktemp("modlee")
    for name in ("work", "home"):
        (folder / name).mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder / "work")
        monkeypatch.setenv("HOME", str(folder / "home"))
        return fit(prepared, "lightning", True, folder, FROZEN), folder


@needs_modlee
def test_modlees_text_of_a_graph_is_unchanged():
    modlee = modlee_record.import_modlee()
    ours, theirs = modlee_record.small_converter(modlee), modlee.converter.Converter()
    parts = ["float", "_", "x", "1", " ", "\n", "float[2]", "a_b", "."]
    chance = random.Random(0)
    for _ in range(2000):
        text = "".join(chance.choices(parts, k=chance.randint(0, 12)))
        assert ours.convert_float(text) == theirs.convert_float(text), text


@needs_modlee
def test_modlee_does_not_change_the_weights(recorded, prepared):
    (model, hooks, _), _ = recorded
    raw, raw_hooks, _ = fit(prepared, freeze=FROZEN)
    assert same_weights(raw, model) and trained_alike(raw_hooks, hooks)
    start = tiny_model(vocab_size=model.config.vocab_size)
    (name,) = FROZEN
    assert not model.get_parameter(name).requires_grad, "it stays frozen"
    assert torch.equal(model.get_parameter(name), start.get_parameter(name))
    assert model.get_parameter("embedding.weight").requires_grad


@needs_modlee
def test_modlee_leaves_nothing_behind_but_its_run(recorded):
    from mlflow.utils.autologging_utils import get_autologging_config

    (_, _, record), folder = recorded
    assert not list((folder / "work").iterdir())
    assert not [p for p in (folder / "home").rglob("*") if p.name == "kwargs.txt"]
    assert Path(record.run_path).is_relative_to(folder / "mlruns")
    assert not list(folder.rglob("*.pth")) and not list(folder.rglob("*.ckpt"))
    assert torch._tensor_str.PRINT_OPTS.threshold == 1000
    root_handlers = [type(handler).__name__ for handler in logging.root.handlers]
    assert "StreamHandler" not in root_handlers
    assert get_autologging_config("pytorch", "disable") is True, "it ends with the fit"


@needs_modlee
def test_modlee_records_its_artifacts(recorded, prepared):
    (_, hooks, record), _ = recorded
    expected = "model.py model_graph.py model_graph.txt model_size model_metafeatures"
    expected = {*expected.split(), "data_metafeatures", "cached_vars", "model_summary.txt"}
    assert expected <= set(record.artifacts)
    artifacts = Path(record.run_path) / "artifacts"
    features = json.loads((artifacts / "data_metafeatures").read_text())
    assert features["dataset_size"] == len(prepared.train)
    logged = (Path(record.run_path) / "metrics" / "val_loss").read_text().split()
    loss = hooks.progress.history["validation"][-1][1]
    assert float(logged[-2]) == pytest.approx(loss, abs=1e-5)
    assert record.seconds > 0


@needs_modlee
def test_a_recorded_model_can_be_rebuilt(recorded):
    import mlflow
    import modlee

    (model, _, record), _ = recorded
    rebuilt = modlee.retriever.get_model(record.run_path)
    mlflow.pytorch.autolog(disable=True)  # its constructor switches it on
    rebuilt.model.load_state_dict(model.state_dict())
    source, target = random_ids(2, 6), random_ids(2, 5)
    assert torch.equal(rebuilt.model.eval()(source, target), model.eval()(source, target))


@needs_modlee
def test_a_store_that_fails_costs_the_record_and_not_the_run(
    prepared, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(run, "TRACKING_URI", "foo://bar")
    _, hooks, record = fit(prepared, "lightning", True, tmp_path, max_epochs=1)
    assert "Modlee records nothing: " in capsys.readouterr().err
    assert hooks.progress.epoch == 1 and not record.run_path


@needs_modlee
def test_a_callback_that_fails_costs_its_artifact_and_not_the_run(prepared, tmp_path, capsys):
    from modlee.model import callbacks

    fail = Mock(side_effect=OSError("No space left"))
    with patch.object(callbacks.LogCodeTextCallback, "on_train_start", fail):
        _, hooks, record = fit(prepared, "lightning", True, tmp_path, max_epochs=1)
    assert "Modlee's record is not complete: No space left" in capsys.readouterr().err
    assert hooks.progress.epoch == 1 and "model_metafeatures" in record.artifacts


@needs_modlee
def test_pushing_to_a_dead_server_does_not_lose_the_run(recorded, capsys, monkeypatch):
    (_, _, record), folder = recorded
    monkeypatch.setenv("MODLEE_API_KEY", "secret-key-7f3a")
    monkeypatch.chdir(folder / "work")
    reason = record.push()
    out = capsys.readouterr()
    assert reason and "secret-key-7f3a" not in out.out + out.err + reason
    assert not list((folder / "work").iterdir())


# ---- the README -------------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")


def run_readme_code(number: int, folder: Path, *files: str) -> str:
    """What a code block of the README prints, beside copies of these files."""
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]
    for name in files:
        shutil.copy(HERE / name, folder)
    (folder / "copied.py").write_text(code, encoding="utf-8")
    done = python("copied.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_code_in_the_readme_runs_as_printed(tmp_path):
    out = run_readme_code(1, tmp_path, *MODULES[:2])
    assert out == "desserts\n"
    out = run_readme_code(2, tmp_path, *MODULES)
    losses = [float(loss) for loss in re.findall(r", ([\d.]+)\)", out.splitlines()[-1])]
    assert len(losses) == 3 and losses[-1] < losses[0] < math.log(28)


TAGGER = """
class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.output = nn.Embedding(30, 16), nn.Linear(16, 30)

    def forward(self, input_ids, labels, label_smoothing):
        logits = self.output(self.embedding(input_ids))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return loss, labels.ne(0).sum()


ids = torch.randint(2, 30, (500, 7))
dataset = torch.utils.data.TensorDataset(ids, ids.flip(0) * 0 + ids)
train_loader = torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True)
validation_loader = torch.utils.data.DataLoader(dataset, batch_size=64)
progress = train_raw(Tagger(), train_loader, validation_loader, Config)
print(progress.history["validation"][-1][1])
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_raw_loop_runs_when_it_is_pasted(tmp_path, precision):
    """One block of at most 190 lines, with the imports of torch and the standard library above it,
    trains another module on plain loaders, and says how it goes."""
    source = (HERE / "run.py").read_text(encoding="utf-8")
    block = source[source.index("# ---- the raw loop -") :]
    block = block[: block.index("\n# ---- ", 10) + 1]
    assert block.count("\n") <= 190
    own = {*sys.stdlib_module_names, "torch"}
    lines = re.findall(r"^(?:from|import) [^(\n]*$", source, re.MULTILINE)
    imports = [line for line in lines if line.split()[1].split(".")[0] in own]
    fields = "max_epochs=2; accumulate=2; learning_rate=1e-2; weight_decay=0.1; clip_norm=1"
    fields += "; warmup=0.1; cooldown=0.3; label_smoothing=0.1; seed=0"
    config = f"class Config:\n    {fields}; precision={precision!r}\n"
    (tmp_path / "copied.py").write_text("\n".join([*imports, block, config, TAGGER]), "utf-8")
    done = python("copied.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *said, loss = done.stdout.splitlines()
    assert float(loss) < math.log(30) / 2
    points = [line.partition(",")[0] for line in said]
    assert points == ["validation (16", "train (20", "validation (32"]


def own_trainer(prepared, folder: Path, adapter=None, **arguments):
    """A fit of the adapter under a Trainer that is not ours: (adapter, hooks)."""
    lightning_package = run.import_lightning()
    config = run.TrainConfig(batch_size=64, max_epochs=2, seed=5, precision="fp32", accumulate=2)
    if adapter is None:
        model = tiny_model(vocab_size=len(prepared.tokenizer), dropout=0.1, activation="relu2")
        base = run.adapter_class(lightning_package.LightningModule)
        adapter = base(dataclasses.asdict(model.config), model)
    hooks = MemoryHooks(config, prepared)
    hooks.progress = run.Progress()
    adapter.attach(config, hooks.progress, hooks)
    loaders = run.build_loaders(config, prepared, torch.device("cpu"))
    plain = {"max_epochs": 2, "accumulate_grad_batches": 2, "accelerator": "cpu", "logger": False}
    plain |= {"enable_progress_bar": False, "default_root_dir": folder}
    more = {"ckpt_path": arguments.pop("ckpt_path", None)}
    trainer = lightning_package.Trainer(**(plain | arguments))
    trainer.fit(adapter, *loaders, **more)
    return adapter, hooks


@pytest.mark.filterwarnings("ignore")
def test_the_adapter_trains_alike_under_another_trainer(prepared, tmp_path):
    """With a sanity check and Lightning's checkpoints, from which the adapter can be loaded."""
    adapter, hooks = own_trainer(prepared, tmp_path)
    raw, raw_hooks, _ = fit(prepared, accumulate=2)
    assert same_weights(raw, adapter.model) and trained_alike(raw_hooks, hooks)
    (saved,) = tmp_path.rglob("*.ckpt")
    loaded = type(adapter).load_from_checkpoint(saved, map_location="cpu")
    assert same_weights(loaded.model, adapter.model) and loaded.model.config == raw.config


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "arguments",
    [
        {"max_epochs": 3},
        {"max_epochs": None},
        {"max_steps": 5},
        {"accumulate_grad_batches": 1},
        {"gradient_clip_val": 0.1},
        {"limit_train_batches": 3},
        {"limit_train_batches": 1},
        {"precision": "bf16-mixed"},
        {"val_check_interval": 0.5},
        {"check_val_every_n_epoch": 2},
        {"limit_val_batches": 0},
        {"ckpt_path": "last.ckpt"},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_a_trainer_that_would_train_otherwise_is_refused(prepared, tmp_path, arguments):
    (name,) = arguments
    if name == "ckpt_path":
        saving = run.import_lightning().callbacks.ModelCheckpoint(save_top_k=-1)
        own_trainer(prepared, tmp_path, callbacks=[saving])
        arguments = {name: next(tmp_path.rglob("epoch=0*.ckpt"))}
    name = {"limit_val_batches": "enable_validation", "ckpt_path": "ckpt_path is at"}.get(
        name, name
    )
    with pytest.raises(ValueError, match=name):
        own_trainer(prepared, tmp_path, enable_checkpointing=False, **arguments)


@pytest.mark.filterwarnings("ignore")
def test_the_learning_rate_finder_is_refused(prepared, tmp_path):
    lightning_package = run.import_lightning()

    class Find(lightning_package.Callback):
        def on_fit_start(self, trainer, module):
            module.lr = 0.1
            lightning_package.tuner.Tuner(trainer)
            finder = lightning_package.callbacks.LearningRateFinder()
            finder.on_fit_start(trainer, module)

    with pytest.raises(ValueError, match="the Trainer has max_steps=100"):
        own_trainer(prepared, tmp_path, callbacks=[Find()])


def readme_commands() -> list[str]:
    """The README's indented lines, except for the two commands that `.ci/run` runs."""
    lines = re.findall(r"^    ((?:\w+=\w+ )*\.venv/bin/.*)$", README, re.MULTILINE)
    in_ci = re.compile("pip install|mlflow")
    return [line.split("  #")[0] for line in lines if not in_ci.search(line)]


def test_every_test_that_the_readme_names_is_there():
    tests = [name for name in globals() if name.startswith("test_")]
    _, table = README.split("## Promises")
    names = re.findall(r"`(\w+)`", "".join(re.findall(r"\| (.*) \|$", table, re.MULTILINE)))
    promised = [name for name in names if not name.isupper() and "_" in name]
    assert len(promised) > 15
    for name in promised:
        assert any(name in test for test in tests), name


@pytest.fixture(scope="module")
def workshop(folder, tmp_path_factory) -> Path:
    """A folder with all files that the README's commands name."""
    root = tmp_path_factory.mktemp("readme")
    shutil.copytree(folder, root / "runs" / "NAME")
    for name in ("pairs", "rosts.en-ro", "tatoeba.en-ro"):
        write_pairs(root / f"{name}.tsv", list(data.phrasebook(400, seed=len(name))))
    (root / "lines.en").write_text("I see a dog.\n\nThe cat sleeps.\n")
    return root


BENCHES = {"bench": lightning.BenchConfig, "benchmarks.train": train_bench.TrainBench}
BENCHES |= {"benchmarks.decode": decode_bench.DecodeBench}
BENCHES |= {"benchmarks.quality": quality.QualityBench}


@pytest.mark.parametrize("line", readme_commands())
def test_every_command_of_the_readme_runs(line, workshop, hub_home, monkeypatch):
    """Made small by more flags. The benchmarks' flags are only parsed: `.ci/run` runs them."""
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("HF_HOME", str(hub_home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = line.replace(".venv/bin/torchrun", ".venv/bin/python -m torch.distributed.run")
    line, _, source = line.partition(" > ")[0].partition(" < ")
    words = shlex.split(line)
    flags = words[3:]
    if "--resume" in words or "--init" in words:
        words += [*SMALL[-2:], "--no-modlee"]
    elif not {"translate", "evaluate", "export", "bench", "attention"} & set(words):
        words += [*SMALL, "--no-modlee", "--device", "cpu", "--beam", "1"]
        words += ["--test-size", "20"] if "--test-size" in words else []
    if "ctranslate2" in words or "fast" in words:
        pytest.importorskip("ctranslate2")
    if words[-1] == "fast" and not Path("fast").is_dir() and "export" not in words:
        # The command before it may have run in another process, in a folder of its own.
        assert main("export", "--model", "runs/NAME", "fast") == 0
    if "benchmarks.figures" in words:
        assert figures.main(words[3:]) == 0
    elif words[2] in BENCHES:
        tyro.cli(BENCHES[words[2]], args=flags)
    elif source or "--preset" in words or "torch.distributed.run" in words:
        arguments = [str(HERE / word) if word == "run.py" else word for word in words[1:]]
        with open(source or os.devnull) as file:
            done = python(*arguments, stdin=file)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    elif "-m" not in words:
        assert main(*words[2:]) == 0
