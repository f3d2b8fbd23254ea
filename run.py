"""Train an English -> Romanian Transformer, score it, use it.

    python run.py                                    the demo: built-in corpus, a few minutes, no network
    python run.py --preset tutorial                  Modlee's Text2Text settings, with a correct model
    python run.py --preset small --dataset pairs.tsv 20,000 pairs of real sentences, 20 minutes
    python run.py --preset base                      WMT16, 610,000 pairs, on a GPU
    python run.py --loop raw                         the hand-written loop over the same model
    python run.py --resume runs/NAME.checkpoints     a run that was stopped or killed goes on
    python run.py --devices 2                        on two devices; or by torchrun
    python run.py translate --model DIR              lines on stdin -> lines on stdout
    python run.py evaluate --model DIR --dataset pairs.tsv
    python run.py export --model DIR --to ctranslate2 OUT    the same model for a fast engine
    python run.py export --model DIR --to hf OUT     or for transformers
    python run.py bench                              what Lightning and Modlee cost per step
    python run.py bench decode --model DIR           decoding speed beside theirs

The file reads from top to bottom: settings and command line, what both loops share, the raw loop,
the Lightning loop, Modlee, the model folder, what is seen of a run, export, translating, bench, and
the other commands.
"""

import os
import signal

# Until all is loaded, Ctrl-C must not raise: some import would swallow it or print a page.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import atexit
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import gc
import hashlib
import io
import json
import logging
import math
import multiprocessing
import pickle
import platform
import random
import re
import shlex
import shutil
import ssl
import sys
import tempfile
import time
import traceback
import typing
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, field
from datetime import datetime
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from statistics import median
from threading import RLock
from types import MethodType
from unittest.mock import patch
from urllib.parse import urlparse
from urllib.request import url2pathname

# ---- settings ---------------------------------------------------------------------------------
# One frozen dataclass per command. Its fields are the flags, its defaults the only defaults.


def option(default=MISSING, help: str = "", **more):
    """A field that is also a flag, or an argument without one where `flag=False`; the rest of
    `more` goes to argparse."""
    return field(default=default, metadata={"help": help, **more})


def device_option():
    return option("auto", "auto, cpu, cuda or mps")


def precision_option(*choices: str):
    help = "arithmetic; auto: what the device does well"
    return option("auto", help, choices=("auto", *choices))


def json_option():
    return option(None, "also write the figures to this file")


def check_counts(config, *names: str) -> None:
    """ValueError where one of the fields is below 1; None means no limit."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")


def check_sizes(config, *names: str) -> None:
    """ValueError where one of the fields is below 0, no number, or beyond all reason."""
    for name in names:
        if not 0 <= getattr(config, name) < 2**32:  # NaN fails too
            raise ValueError(f"--{name.replace('_', '-')} must be in [0, 2^32)")


@dataclass(frozen=True)
class TrainConfig:
    """Train a translator, score it, and leave a model folder."""

    preset: str = option(
        "demo",
        "named settings; flags given by hand win",
        choices=("demo", "tutorial", "small", "base"),
    )

    dataset: tuple[str, ...] = option(
        ("phrasebook",),
        "built-in phrasebook, hub name, data files, or two aligned text files",
    )
    subset: str | None = option(None, "subset of a hub data set, such as ro-en")
    split: str = option("train", "split of a hub data set, such as train[:80%%]")
    columns: tuple[str, str] | None = option(
        None, "source and target, by name or number, where names do not tell", nargs=2
    )
    source_lang: str = option("en", "language of the source, in any spelling")
    target_lang: str = option("ro", "language of the target")
    num_samples: int | None = option(None, "pairs to take after cleaning; default: all")
    validation_size: float = option(0.02, "source sentences held out: a share, or how many")
    validation_set: tuple[str, ...] | None = option(
        None, "instead: data files, or a split of the hub data set"
    )
    test_size: float = option(
        0.0, "held out likewise, to score the model on; 0: the validation pairs"
    )
    test_set: tuple[str, ...] | None = option(None, "instead, as --validation-set")
    tokenizer: str = option("train:800", "hub name, folder, or train:N to learn one")
    max_length: int = option(64, "tokens per sentence; longer pairs are dropped")

    d_model: int = option(128, "model width")
    nhead: int = option(4, "attention heads")
    num_encoder_layers: int = option(2, "encoder layers")
    num_decoder_layers: int = option(2, "decoder layers")
    dim_feedforward: int = option(512, "width of the feed-forward layers")
    dropout: float = option(0.1, "dropout rate")
    positional: str = option("sinusoidal", "sinusoidal, learned, rotary or none")
    norm_first: bool = option(True, "pre-LN; --no-norm-first: post-LN, as the paper")
    tie_embeddings: bool = option(True, "one matrix for source, target and output")

    compile: bool = option(False, "torch.compile the model; for --loop raw")
    loop: str = option("lightning", "who drives the training", choices=("lightning", "raw"))
    devices: int = option(1, "processes that train together, each on a device")
    strategy: str = option(
        "ddp",
        "of several: every one holds the model, or (Lightning alone) a part of it",
        choices=("ddp", "fsdp"),
    )
    max_epochs: int = option(2, "passes over the training pairs")
    batch_size: int = option(64, "pairs in a batch")
    batch_tokens: int | None = option(
        None, "instead: pairs x longest sentence in a batch, either side"
    )
    accumulate: int = option(1, "batches per optimizer step")
    learning_rate: float = option(3e-3, "peak learning rate of Adam")
    schedule: str = option(
        "cosine",
        "learning rate after warm-up; cooldown: constant, then to zero in the last 30%%",
        choices=("cosine", "cooldown", "constant"),
    )
    warmup: float = option(0.1, "share of the steps in which the learning rate rises")
    clip_norm: float = option(1.0, "largest gradient norm; 0 for no clipping")
    label_smoothing: float = option(0.0, "share of probability spread over the vocabulary")
    average: float = option(
        0.0, "weights are averaged over about this share of the steps; 0: they are not"
    )
    patience: int | None = option(
        None, "validations without a better loss before training ends; default: never"
    )
    bleu_pairs: int = option(
        100, "validation pairs translated after every epoch, for BLEU and samples"
    )
    beam: int = option(1, "hypotheses per sentence of the final score; 1 is greedy")

    device: str = device_option()
    precision: str = precision_option("fp32", "bf16", "fp16")
    seed: int = option(0, "of weights, split, order and dropout")
    modlee: bool = option(True, "record the run with Modlee, where it is installed")
    push: bool = option(False, "upload what Modlee recorded; needs MODLEE_API_KEY")
    mlruns: str = option("runs/mlruns", "where Modlee's and MLflow's records go; none: nowhere")
    tensorboard: str | None = option(None, "folder for curves in TensorBoard's format")
    output: str | None = option(None, "model folder to create; default: a fresh one under runs/")
    checkpoint_every: str = option(
        "10m", "steps, or minutes as in 10m, between checkpoints; 0 for none"
    )
    resume: str | None = option(None, "continue the run that left this folder of checkpoints")
    resume_anyway: bool = option(False, "resume with settings that differ")
    on_oom: str = option(
        "stop",
        "a batch for which memory does not suffice ends the run, or is left out",
        choices=("stop", "skip"),
    )

    def __post_init__(self) -> None:
        counts = "max_length max_epochs batch_size batch_tokens accumulate num_samples"
        check_counts(self, *counts.split(), "devices", "patience", "beam")
        self.checkpoint_interval()
        if self.output == "":
            raise ValueError("--output needs a name")
        if self.max_length > 65_536:
            raise ValueError("--max-length must not be above 65536")
        for name in ("validation_size", "test_size"):
            if getattr(self, name) >= 1 and getattr(self, name) % 1:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag}: a share below 1 or a whole number")
        sizes = ("validation_size", "test_size", "learning_rate", "clip_norm", "seed", "bleu_pairs")
        check_sizes(self, *sizes)
        for name in ("warmup", "label_smoothing", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be in [0, 1)")

    def checkpoint_interval(self) -> tuple[float, float]:
        """(steps, seconds) between checkpoints; one of them is infinite, both for none."""
        text = self.checkpoint_every
        number = text.removesuffix("m")
        if not (number.isascii() and number.isdigit()):
            raise ValueError("--checkpoint-every: a number of steps, or minutes (10m)")
        count = int(number) or math.inf
        return (math.inf, 60 * count) if text.endswith("m") else (count, math.inf)


# The "base" of Attention Is All You Need, which the tutorial takes as well.
PAPER_BASE = {"d_model": 512, "nhead": 8, "dim_feedforward": 2048}
PAPER_BASE |= {"num_encoder_layers": 6, "num_decoder_layers": 6}

PRESETS: dict[str, dict] = {
    "demo": {},  # the defaults above
    # Some 20,000 pairs of real sentences, 20 minutes on two CPU cores: bring the --dataset.
    "small": {
        "tokenizer": "train:4000",
        "max_length": 100,
        "d_model": 192,
        "num_encoder_layers": 3,
        "num_decoder_layers": 3,
        "dim_feedforward": 768,
        "dropout": 0.15,
        "positional": "rotary",  # sees who stands beside whom from the first epoch on
        "max_epochs": 16,
        "batch_tokens": 1024,
        "learning_rate": 2e-3,
        "schedule": "cooldown",
        "label_smoothing": 0.1,
        "beam": 4,
    },
    # The real WMT16, 610,000 pairs, on one GPU.
    "base": {
        "dataset": ("wmt16",),
        "subset": "ro-en",
        "validation_set": ("validation",),
        "test_set": ("test",),
        "tokenizer": "train:16000",
        "max_length": 128,
        **PAPER_BASE,
        "dropout": 0.1,
        "positional": "rotary",
        "max_epochs": 30,
        "batch_tokens": 25_000,
        "learning_rate": 1e-3,
        "label_smoothing": 0.1,
        "average": 0.05,
        "patience": 5,
        "beam": 4,
    },
    "tutorial": {
        "dataset": ("wmt16",),
        "subset": "ro-en",
        "split": "train[:80%]",
        "num_samples": 100,
        "validation_size": 0.2,
        "tokenizer": "t5-small",
        "max_length": 50,
        **PAPER_BASE,
        "dropout": 0.1,
        "max_epochs": 1,
        "batch_size": 16,
        "learning_rate": 5e-5,
        "schedule": "constant",
        "warmup": 0.0,
        "clip_norm": 0.0,
    },
}


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How lines are translated."""

    beam: int = option(1, "hypotheses kept per sentence; 1 is greedy")
    length_penalty: float = option(
        1.0, "exponent of the length by which a hypothesis' sum is divided"
    )
    batch_tokens: int = option(2048, "source tokens decoded together, pads and hypotheses counted")
    precision: str = option(
        "fp32",
        "bf16 halves the memory; on a CPU it can also be slower",
        choices=("fp32", "bf16"),
    )
    device: str = device_option()
    # Of these, only `translate` makes flags.
    num_return = 1
    scores = sample = False

    @property
    def width(self) -> int:
        """Rows in the decoder per sentence."""
        return max(self.beam, self.num_return)

    def __post_init__(self) -> None:
        check_counts(self, "beam", "batch_tokens")
        if self.beam > 1000:
            raise ValueError("--beam must not be above 1000")
        if not -10 <= self.length_penalty <= 10:
            raise ValueError("--length-penalty must be in [-10, 10]")


@dataclass(frozen=True, kw_only=True)
class TranslateConfig(DecodeOptions):
    """Translate lines: one line out per line in, in order, empty lines kept empty."""

    model: str = option(help="model folder", required=True)
    text: tuple[str, ...] = option(
        (), "sentences; without any, lines come from stdin", nargs="*", flag=False
    )
    num_return: int = option(1, "translations per line, each on a line of its own")
    scores: bool = option(
        False,
        "put log-probability / length ^ penalty and a tab before each translation",
    )
    sample: bool = option(False, "draw translations at random; not with --beam")
    temperature: float = option(1.0, "of --sample: below 1 safer, above 1 bolder")
    top_p: float = option(
        1.0, "of --sample: share of probability whose likeliest tokens may be drawn"
    )
    seed: int = option(0, "of --sample")
    attention: str | None = option(
        None, "picture (.png) of what the translation of one sentence looked at"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "num_return")
        if self.sample and (self.beam > 1 or self.scores):
            raise ValueError("--sample goes neither with --beam nor with --scores")
        if not self.sample and self.num_return > self.beam:
            raise ValueError("--num-return needs --sample or a --beam as large")
        if not (0 < self.temperature < math.inf and 0 < self.top_p <= 1):
            raise ValueError("--temperature must be above 0, --top-p in (0, 1]")
        if self.attention is not None and (len(self.text) != 1 or self.sample):
            raise ValueError("--attention needs one sentence as argument, not --sample")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DecodeOptions):
    """Translate the source side of a data set and score it against the target side."""

    model: str = option(help="model folder", required=True)
    dataset: tuple[str, ...] | None = option(
        None, "data files, or a hub name; default: what the training held out for the test"
    )
    subset: str | None = option(None, "subset of a hub data set")
    split: str = option("test", "split of a hub data set")
    columns: tuple[str, str] | None = option(
        None, "source and target, by name or number, where names do not tell", nargs=2
    )
    num_samples: int | None = option(None, "first pairs to score; default: all with two sides")
    against: str | None = option(None, "another model folder: is the difference more than chance?")
    sentences: str | None = option(
        None, "write every sentence with its chrF to this .tsv, the worst first"
    )
    json: str | None = json_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "num_samples")


@dataclass(frozen=True)
class ExportConfig:
    """Write the model in the format of another library."""

    output: str = option(help="folder to create", flag=False)
    model: str = option(help="model folder", required=True)
    to: str = option(
        "hf",
        "hf: a folder for transformers; ctranslate2: one that translate and evaluate run faster",
        choices=("hf", "ctranslate2"),
    )
    quantization: str | None = option(
        None,
        "of --to ctranslate2: smaller and faster weights; default: float32",
        choices=("int8", "int8_float16", "int16", "float16", "bfloat16"),
    )

    def __post_init__(self) -> None:
        if self.quantization and self.to != "ctranslate2":
            raise ValueError("--quantization is of --to ctranslate2")


@dataclass(frozen=True)
class BenchDecodeConfig:
    """Decoding speed: this program, transformers' generate and CTranslate2, same weights."""

    model: str | None = option(None, "model folder; without it, random weights of --size")
    size: str = option("demo", "of random weights, which never end", choices=("demo", "tutorial"))
    text: str | None = option(
        None, "file of source sentences for --model; default: the phrasebook's"
    )
    sentences: int = option(64, "how many sentences to decode; at most 16 batches")
    batch: tuple[int, ...] = option((1, 32), "sentences decoded together", type=int)
    beam: tuple[int, ...] = option((1, 4), "beam sizes; 1 is greedy", type=int)
    max_new_tokens: int = option(32, "where a translation is cut")
    repeats: int = option(5, "timed rounds; every round runs every library once")
    device: str = device_option()
    json: str | None = json_option()

    def __post_init__(self) -> None:
        check_counts(self, "sentences", "max_new_tokens", "repeats")
        if min(*self.batch, *self.beam, 1) < 1:
            raise ValueError("--batch and --beam must be at least 1")


@dataclass(frozen=True)
class BenchConfig:
    """What Lightning and Modlee cost per training step, beside the raw loop."""

    quick: bool = option(False, "five arms, one size, a few rounds")
    turns: int | None = option(None, "of 20 timed steps for each arm; default: 12, with --quick 4")
    device: str = device_option()
    precision: str = precision_option("fp32", "bf16", "fp16")
    picture: str = option("results/bench.png", "where the picture goes")
    json: str | None = json_option()
    profile: str | None = option(
        None, "only write a torch profiler trace of ten steps of the raw loop"
    )

    def __post_init__(self) -> None:
        if self.turns is not None and self.turns < 3:
            raise ValueError("--turns must be at least 3, or there is no interval")


@dataclass(frozen=True)
class BenchTrainConfig:
    """Training speed: how it grows, or with --peers beside other implementations."""

    peers: bool = option(
        False, "compare with nn.Transformer, Marian, x-transformers and the tutorial"
    )
    dataset: tuple[str, ...] = option(("phrasebook",), "what to train on, as for training")
    tokenizer: str = option("t5-small", "hub name, folder, or train:N")
    max_length: int = option(128, "tokens per sentence; longer pairs are dropped")
    size: str = option("tutorial", "of the model", choices=("demo", "wide", "tutorial", "widest"))
    batch_tokens: int | None = option(
        None, "pairs x longest sentence in a batch; default: 2048, on a GPU 25000"
    )
    steps: int = option(4, "different batches in a turn")
    turns: int = option(7, "timed turns; every turn runs everything once")
    compile: bool = option(False, "also ours with torch.compile")
    device: str = device_option()
    precision: str = precision_option("fp32", "bf16")
    picture: str = option("results/cost.png", "where the picture goes, without --peers")
    json: str | None = json_option()

    def __post_init__(self) -> None:
        check_counts(self, "max_length", "batch_tokens", "steps", "turns")
        if self.turns < 3:
            raise ValueError("--turns must be at least 3, or there is no interval")


CONFIGS = {
    "train": TrainConfig,
    "translate": TranslateConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "bench": BenchConfig,
    "bench decode": BenchDecodeConfig,
    "bench train": BenchTrainConfig,
}


class OneLineParser(argparse.ArgumentParser):
    """Errors in one line, with the nearest flag where one was misspelt."""

    def error(self, message: str) -> typing.NoReturn:
        hint = ""
        for word in message.split():
            close = difflib.get_close_matches(
                word.split("=")[0], self._option_string_actions, cutoff=0.7
            )
            if message.startswith("unrecognized") and word.startswith("-") and close:
                hint = f"; did you mean {close[0]}?"
        self.exit(2, f"error: {message}{hint} (see {self.prog} --help)\n")


def parse_command_line(arguments: list[str]):
    """(command, its configuration): flags beat the preset, the preset beats the defaults."""
    words = next((n for n in (2, 1) if " ".join(arguments[:n]) in CONFIGS), 0)
    command = " ".join(arguments[:words]) or "train"
    config_class = CONFIGS[command]
    if command == "train":
        usage = "python run.py"
        others = ", ".join(name for name in CONFIGS if name != "train")
        others = f"commands: {others} (each has its own --help)"
    else:
        usage, others = f"python run.py {command}", None
    parser = OneLineParser(
        usage, description=config_class.__doc__, epilog=others, allow_abbrev=False
    )
    hints = typing.get_type_hints(config_class)
    for entry in dataclasses.fields(config_class):
        more = dict(entry.metadata)
        kind = hints[entry.name]
        if type(None) in typing.get_args(kind):  # "int | None" takes an int
            kind = typing.get_args(kind)[0]
        if entry.default not in (MISSING, None, ()):
            shown = (
                " ".join(map(str, entry.default))
                if isinstance(entry.default, tuple)
                else entry.default
            )
            more["help"] += f" [{str(shown).replace('%', '%%')}]"
        if kind is bool:
            more["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            more.setdefault("nargs", "+")
            more["metavar"] = entry.name.upper()
        elif "choices" not in more:
            more |= {"type": kind, "metavar": kind.__name__.upper()}
        more["default"] = argparse.SUPPRESS  # only what was given by hand shows up
        is_flag = more.pop("flag", True)
        if not is_flag:
            more["metavar"] = entry.name.upper()
        name = f"--{entry.name.replace('_', '-')}" if is_flag else entry.name
        parser.add_argument(name, **more)
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(parser.parse_args(arguments[words:])).items()
    }
    try:
        if given.get("resume") is None:
            settings = PRESETS[given.get("preset", "demo")] if command == "train" else {}
        else:
            settings = resumed_settings(given)
        return command, config_class(**(settings | given))
    except ValueError as error:
        parser.error(str(error))


# Settings that may change when a run is resumed: they have no part in what is learnt, unless memory
# does not suffice.
MAY_CHANGE = {
    "output",
    "checkpoint_every",
    "resume",
    "resume_anyway",
    "modlee",
    "push",
    "mlruns",
    "on_oom",
    "tensorboard",
    "bleu_pairs",
    "beam",
}


def is_engine(folder: str | None) -> bool:
    """Whether it is a folder that was exported for CTranslate2."""
    return folder is not None and (Path(folder).expanduser() / "model.bin").is_file()


def resumed_settings(given: dict) -> dict:
    """The settings of the run to resume. ValueError where `given` has others."""
    path = Path(given["resume"]).expanduser() / "settings.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError):
        raise ValueError(f"--resume: no checkpoints in {given['resume']}") from None
    if settings.keys() != {entry.name for entry in dataclasses.fields(TrainConfig)}:
        raise ValueError(f"--resume: {path} is of another version of this program")
    for name in ("dataset", "columns", "validation_set", "test_set"):
        settings[name] = settings[name] and tuple(settings[name])
    differ = [
        f"--{name.replace('_', '-')} (was {settings[name]})"
        for name, value in given.items()
        if name not in MAY_CHANGE and settings[name] != value
    ]
    if differ and not given.get("resume_anyway"):
        raise ValueError(
            f"the run had other settings: {', '.join(differ)}; "
            "leave them out, or add --resume-anyway"
        )
    return settings


# `--help` and typing errors answer above this line, before torch takes seconds to load.
if __name__ == "__main__":
    COMMAND, CONFIG = parse_command_line(sys.argv[1:])
    # CTranslate2 shares torch's OpenMP, whose threads must not fall asleep between its operations;
    # read when it is loaded.
    if is_engine(getattr(CONFIG, "model", None)):
        os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")

# Memory in large pages, which torch asks Linux for if told so before it starts. A training step on
# a CPU takes a few per cent less; new memory, page by page, costs more than many an operation on it.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# MLflow 3 reports its use to its makers unless told not to, and wants a database in place of the
# folder of files that Modlee writes to.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
from data import InputError
from positional import sinusoidal_positional_encoding
from seq2seq import (
    VOCAB_MULTIPLE,
    Hypothesis,
    Seq2SeqConfig,
    TransformerSeq2SeqModel,
    beam_search,
    count_flops,
    cross_attention_weights,
    greedy_decode,
    sample_decode,
    shift_right,
)

COOLDOWN = 0.3  # share of the steps
LOG_EVERY = 20  # optimizer steps between points of the loss curve, and between host-device syncs
TRANSLATE_WINDOW = 2048  # lines sorted by length together
SHOWN = 6  # translations printed after training


# ---- what both loops share --------------------------------------------------------------------


@dataclass
class Data:
    """What a training run needs to know of its data."""

    tokenizer: object
    train: data.PairDataset
    validation: data.PairDataset
    validation_pairs: list[data.Pair]  # also those that are over-long
    test_pairs: list[data.Pair]  # may be empty
    dropped: dict[str, int]  # pairs lost, by reason
    round_trip_loss: tuple[float, float]  # of the training pairs, source and target


def whole_pairs(pairs: Iterable[data.Pair], name: str) -> list[data.Pair]:
    """Those that have two sides, which are all that is scored. Raises InputError without any."""
    found = [pair for pair in pairs if pair.source and pair.target]
    if not found:
        raise InputError(f"{name} holds no pair of two sides")
    return found


def prepare(
    pairs: Iterable[data.Pair],
    tokenizer: str,
    max_length: int,
    validation_size: float = 0.02,
    test_size: float = 0.0,
    num_samples: int | None = None,
    seed: int = 0,
    validation: Iterable[data.Pair] | None = None,
    test: Iterable[data.Pair] | None = None,
    languages: tuple[str, str] = ("en", "ro"),
) -> Data:
    """From sentence pairs to token ids of training and validation.

    Args:
        tokenizer: a hub name, a folder, or "train:N", a vocabulary of N learnt from the training
            pairs alone.
        max_length: tokens per sentence, eos included; longer pairs are dropped.
        validation_size, test_size: share of the source sentences held out, or their number; two
            that differ in case and punctuation alone (`data.text_key`) are one.
        num_samples: stop after this many pairs that survived cleaning.
        validation, test: pairs of their own, instead of some held out; whatever has a source in
            common with them is left out of training.

    Raises InputError where nothing is left.
    """
    dropped, over_long = Counter(), Counter()
    kind, _, size = tokenizer.partition(":")
    if kind == "train" and not size.isdecimal():
        raise InputError(f"--tokenizer {tokenizer}: write train:N, for example train:8000")
    validation = None if validation is None else whole_pairs(validation, "the validation set")
    test = None if test is None else whole_pairs(test, "the test set")
    held_out = {data.text_key(pair.source) for pair in chain(validation or (), test or ())}
    bar = partial(tqdm, unit=" pairs", unit_scale=True, leave=False, delay=2)
    kept = data.clean(bar(pairs, desc="read"), dropped, held_out)
    if kind != "train":
        tokenizer = data.load_tokenizer(tokenizer)
        if num_samples is not None:  # of those that are not over-long
            kept = (pair for pair, *_ in data.encode(kept, tokenizer, max_length, dropped))
    kept = list(islice(kept, num_samples))
    if not kept:
        raise InputError(f"no pairs left after cleaning{data.describe_dropped(dropped)}")
    if test is None and test_size:
        keys = [data.text_key(pair.source) for pair in kept]
        kept, test = data.hold_out(kept, keys, test_size, seed)
    if validation is None:
        keys = [data.text_key(pair.source) for pair in kept]
        kept, validation = data.hold_out(kept, keys, validation_size, seed)
    if kind == "train":
        tokenizer = data.train_tokenizer((text for pair in kept for text in pair[:2]), int(size))
    train = data.PairDataset(data.encode(bar(kept, desc="encode"), tokenizer, max_length, dropped))
    fitting = data.PairDataset(data.encode(validation, tokenizer, max_length, over_long))
    dropped["over-long validation"] = over_long["over-long"]
    if not len(train) or not len(fitting):
        raise InputError(f"training or validation is empty{data.describe_dropped(dropped)}")
    lost = (
        data.round_trip_loss([pair.source for pair in kept], tokenizer, languages[0]),
        data.round_trip_loss([pair.target for pair in kept], tokenizer, languages[1]),
    )
    return Data(tokenizer, train, fitting, validation, test or [], dict(dropped), lost)


# One definition each of loss, optimizer, schedule, clipping and randomness. A loop is only a loop.


def choose_device(name: str) -> torch.device:
    """auto: CUDA, else Apple's MPS, else the CPU. Raises InputError for what is not there."""
    has = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    if not has.get(name):
        found = ", ".join(kind for kind in has if has[kind])
        raise InputError(f"--device {name}: not here; found {found}")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """auto: bf16 (fp16 on older cards) where CUDA has the units for it, else fp32."""
    if name == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16 needs a GPU; on a CPU take fp32 or bf16")
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    # `is_bf16_supported` is true of older cards too, which emulate it.
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def use_tensor_cores(device: torch.device) -> None:
    """Let products in float32 go through TF32, where CUDA has it, while training: ten bits of the
    factors instead of 23, sums still in float32."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def autocast(device: torch.device, precision: str):
    """The context in which a forward pass runs; fp32 needs none (nor has every device one)."""
    if precision == "fp32":
        return contextlib.nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Make the random state (dropout) of an optimizer step a function of (seed, step, rank) alone."""
    # The CPU's generator takes the low 32 bits, so the seed must reach them.
    value = seed * 1_000_003 + step + rank * 97_000_003
    # Not torch.manual_seed: while CUDA sleeps, that notes the whole call stack, for half a
    # millisecond inside Lightning.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(value)


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    # Fused: one kernel, and after an overflow it skips the step without asking the host. On a CPU
    # torch has it from 2.4 on, in a quarter of the time.
    try:
        return torch.optim.Adam(model.parameters(), config.learning_rate, fused=True)
    except RuntimeError:
        return torch.optim.Adam(model.parameters(), config.learning_rate)


def build_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then constant, constant with a linear cooldown to near zero (Hägele et al. 2024),
    or a cosine that ends there; one call per step."""
    warmup_steps = int(config.warmup * total_steps)
    cooldown_steps = COOLDOWN * total_steps

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if config.schedule == "constant":
            return 1.0
        if config.schedule == "cooldown":
            return min(1.0, (total_steps - step) / cooldown_steps)
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def clip_gradients(model: nn.Module, config: TrainConfig) -> None:
    if config.clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)


def batch_loss(
    model: nn.Module, batch: tuple[Tensor, Tensor], label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(input_ids [B, S], labels [B, T]) -> (summed loss [], tokens []), by teacher forcing."""
    input_ids, labels = batch
    return model(input_ids, labels=labels, label_smoothing=label_smoothing)


def step_share(loss_sum: Tensor, sampler, index: int, accumulate: int) -> Tensor:
    """What batch `index` adds to its optimizer step's loss, times `accumulate`.

    Each token of the accumulation window counts the same, since the window's tokens are known in
    advance: no mean of means. Lightning divides every loss by `accumulate`; so does the raw loop,
    to round alike. Of several processes the gradients are averaged, hence `world`.
    """
    share = accumulate * sampler.world / sampler.window_tokens(index, accumulate)
    return loss_sum * share


def mean_loss(batches: list[tuple[Tensor, Tensor]]) -> float:
    """Nats per token over batches of (summed loss [], tokens []); waits for the device.

    Added up in Python's float64, which not every device has, over all processes.
    """
    losses, tokens = (torch.stack(column).tolist() for column in zip(*batches))
    loss, count = add_up(sum(losses), sum(tokens))
    return loss / count


def add_up(*values: float) -> list[float]:
    """Each value summed over all training processes."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return list(values)
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return total.tolist()


class Failed(Exception):
    """Training cannot go on. The message is one line and says what to do next."""


def is_first_process() -> bool:
    """Whether this is the only process, or the one of several that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Every device says it in words of its own; only CUDA's error has a class."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return any(word in str(error) for word in words)


class Progress:
    """Where training stands, the loss curves, and the wish to stop. Both loops report to it.

    Losses stay on the device until a point of the curve is due, so that a step never waits. That is
    also when a loss that is no number comes to light: `Failed`, unless `overflows` says that the
    gradient scaler of fp16 skips such steps.

    Attributes: step: optimizer steps done. epoch, batch: the batch to read next, from 0. train,
    validation: lists of (optimizer step, loss in nats per token); rates: of learning rates; bleu: of
    scores. best: the lowest validation loss and its step. epoch_loss: mean training loss over the
    tokens of the last epoch, finished or not. seconds: spent in steps and validation. watched:
    spent in `watch`, by the first process. left_out: batches for which memory did not suffice.
    """

    SAVED = ("step", "epoch", "batch", "train", "validation", "rates", "bleu", "best")
    SAVED += ("seconds", "watched", "epoch_loss", "epoch_sums", "sums", "left_out")

    def __init__(
        self,
        overflows: bool = False,
        save: Callable[[dict], Path] | None = None,
        every: tuple[float, float] = (math.inf, math.inf),
        on_oom: str = "stop",
        keep_best: Callable[[dict], object] | None = None,
        watch: Callable[["Progress", nn.Module], None] | None = None,
    ) -> None:
        """save: writes a checkpoint and returns its path; called every so many (steps, seconds).
        on_oom: a batch for which memory does not suffice may "stop" the run or be "skip"ped.
        keep_best: writes {"weights", "best"} whenever no weights were better. watch: called after
        each validation."""
        self.overflows, self._save, self._every = overflows, save, every
        self.places: list[str] = []  # where the training pairs were read
        self.on_oom, self.left_out = on_oom, 0
        self._average: WeightAverage | None = None
        self._keep_best, self._watch = keep_best, watch
        self.step = self.epoch = self.batch = self.total_steps = 0
        self.train: list[tuple[int, float]] = []
        self.validation: list[tuple[int, float]] = []
        self.rates: list[tuple[int, float]] = []
        self.bleu: list[tuple[int, float]] = []
        self.best = (math.inf, 0)
        self.epoch_loss = math.nan
        self.seconds = self.watched = 0.0
        self.sums = [0.0, 0]  # loss and tokens since the last point, of this process
        self.epoch_sums = [0.0, 0]  # and of this epoch's points, of all
        self.checkpoint: Path | None = None
        self._pending: list[tuple[Tensor, int, int, np.ndarray]] = []
        self._batches = 0
        self._due = False
        self._signal, self._handler = 0, None
        self._signals = 0  # of all processes, as of the last point
        self._started = self._saved = 0.0
        self._parts: dict = {}
        self._loaded: dict = {}

    def load(self, state: dict) -> None:
        """Go on from a checkpoint; what belongs to others waits for `begin`."""
        vars(self).update(state.pop("progress"))
        if not is_first_process():
            self.sums = [0.0, 0]  # those of all processes count once
        self._loaded = state

    def begin(self, config: TrainConfig, total_steps: int, **parts) -> None:
        """The first step of so many is about to run. parts: model, optimizer and so on, by name:
        what belongs into a checkpoint, and is put back from a loaded one."""
        self._parts, self.total_steps = parts, total_steps
        if config.average:
            # One every so many steps, and one at the end of an epoch.
            each = math.ceil(total_steps / config.max_epochs / LOG_EVERY)
            updates = config.average * config.max_epochs * each
            if updates <= 1 and is_first_process():
                print(
                    f"note: {total_steps} steps are too few for --average {config.average}: "
                    "nothing is averaged",
                    file=sys.stderr,
                )
            self._average = parts["average"] = WeightAverage(parts["model"], updates)
        for name in parts.keys() & self._loaded.keys():
            parts[name].load_state_dict(self._loaded.pop(name))
        if self._handler:
            # Once more: Lightning has put one before it that ends at once.
            signal.signal(signal.SIGTERM, self._handler)
        self._saved = time.perf_counter()
        self._started = self._saved - self.seconds

    def add(self, loss_sum: Tensor, sampler, index: int) -> None:
        """Batch number `index` was done; `loss_sum` [] may still be on its way."""
        rows, tokens = sampler.rows(index), sampler.target_tokens(index)
        self._pending.append((loss_sum.detach(), tokens, self.step + 1, rows))
        self._reach(sampler, index)

    def _reach(self, sampler, index: int) -> None:
        self.epoch, self.batch, self._batches = sampler.epoch, index + 1, len(sampler)

    def leave_out(self, error: RuntimeError, model: nn.Module, batch, sampler, index: int) -> None:
        """Batch number `index` has failed. Where memory was the reason, and such batches may be
        skipped, what its window has gathered so far is dropped; else this raises."""
        if not is_out_of_memory(error):
            raise error
        shapes = " and ".join(str(list(ids.shape)) for ids in batch)
        what = f"out of memory at step {self.step + 1}, with a batch of {shapes} tokens"
        if self.on_oom != "skip":
            raise Failed(
                f"{what}; lower --batch-size or --batch-tokens (and raise --accumulate), "
                "or leave such batches out: --on-oom skip"
            ) from None
        print(f"\nnote: {what}: it is left out", file=sys.stderr)
        self.left_out += 1
        self._reach(sampler, index)
        traceback.clear_frames(error.__traceback__)  # which hold the batch's tensors
        for parameter in model.parameters():
            # None lets the optimizer leave the step out, but fp16's scaler needs some gradient.
            parameter.grad = torch.zeros_like(parameter) if self.overflows else None
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def end_step(self) -> float | None:
        """An optimizer step was done. Returns the loss since the last point where one is due."""
        self.step += 1
        self.seconds = time.perf_counter() - self._started
        is_due = self.step % LOG_EVERY == 0
        point = self.flush() if is_due else None
        if self._average and (is_due or self.batch == self._batches):
            self._average.update()
        if self.step % self._every[0] == 0:
            self._due = True
        if self._due and self.batch < self._batches:  # else after the validation
            self.save()
        return point

    def save(self) -> None:
        """Write a checkpoint, if checkpoints are wanted. Raises Failed rather than a bad one."""
        self._due = False
        self._saved = time.perf_counter()
        if self._save is None:
            return
        self._settle()
        mine, self.sums = self.sums, add_up(*self.sums)
        for name, weight in self._parts["model"].state_dict().items():
            if not weight.isfinite().all():
                raise self._diverged(f"{name} after step {self.step} is no number")
        state = {name: part.state_dict() for name, part in self._parts.items()}
        state["progress"] = {name: getattr(self, name) for name in self.SAVED}
        self.checkpoint = self._save(state)
        self.sums = mine

    def _settle(self) -> None:
        """Wait for the losses that are on their way, and add them up."""
        if not self._pending:
            return
        losses = torch.stack([entry[0] for entry in self._pending]).tolist()
        for value, (_, tokens, step, rows) in zip(losses, self._pending):
            if math.isfinite(value):
                self.sums = [self.sums[0] + value, self.sums[1] + tokens]
            elif not self.overflows:
                what = f"the loss of step {step} is {value}"
                raise self._diverged(f"{what}; {describe_rows(rows, self.places)}")
        self._pending.clear()

    def _diverged(self, what: str) -> Failed:
        last = self.checkpoint or "none was written"
        advice = "try a lower --learning-rate"
        return Failed(f"{what}; last good checkpoint: {last}; {advice}")

    def flush(self) -> float | None:
        """Make a point of all batches since the last one; returns its loss."""
        self._settle()
        # Processes look at their clocks where they meet, and agree.
        late = time.perf_counter() - self._saved >= self._every[1]
        loss, tokens, self._signals, late = add_up(*self.sums, self._signal, late)
        self._due = self._due or late > 0
        self.sums = [0.0, 0]
        if not tokens:
            return None
        self.epoch_sums[0] += loss
        self.epoch_sums[1] += tokens
        self.epoch_loss = self.epoch_sums[0] / self.epoch_sums[1]
        self.train.append((self.step, loss / tokens))
        if "schedule" in self._parts:
            self.rates.append((self.step, self._parts["schedule"].get_last_lr()[0]))
        return loss / tokens

    @property
    def skipped(self) -> int:
        """Steps that fp16's scaler left out, because a gradient overflowed; waits for the device."""
        if not self.overflows or "optimizer" not in self._parts:
            return 0
        states = self._parts["optimizer"].state.values()
        return self.step - max((int(state["step"]) for state in states), default=0)

    def averaged(self):
        """The context in which the model has the weights to judge and to keep: the averaged ones,
        if weights are averaged."""
        if self._average and self._average.count:
            return self._average.in_place()
        return contextlib.nullcontext()

    def end_epoch(self, validation_loss: float) -> None:
        """The epoch's last step was done and the model, with `averaged` weights, validated."""
        self.flush()
        self.seconds = time.perf_counter() - self._started
        if not math.isfinite(validation_loss):
            what = f"the validation loss after step {self.step} is {validation_loss}"
            raise self._diverged(what)
        self.epoch_sums = [0.0, 0]
        self.validation.append((self.step, validation_loss))
        self.epoch, self.batch = self.epoch + 1, 0
        with self.averaged():
            model = self._parts["model"]
            if validation_loss < self.best[0]:
                self.best = (validation_loss, self.step)
                if self._keep_best:
                    weights = model.state_dict()
                    self._keep_best({"weights": weights, "best": self.best})
            if self._watch:
                started = time.perf_counter()
                self._watch(self, model)
                seconds = time.perf_counter() - started
                self.watched += seconds
                self._started += seconds
        if self._due:
            self.save()

    def has_lost_patience(self, config: TrainConfig) -> bool:
        """Whether the loss has not improved for as many validations as there is patience for."""
        worse = sum(step > self.best[1] for step, _ in self.validation)
        return config.patience is not None and worse >= config.patience

    @property
    def time_left(self) -> str:
        """Estimated from the steps so far, as 1:23:45."""
        seconds = (self.seconds + self.watched) / max(self.step, 1)
        seconds *= self.total_steps - self.step
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}"

    @property
    def stop(self) -> bool:
        """Whether to end early. Several processes must agree, which they do at points."""
        return (self._signals if "WORLD_SIZE" in os.environ else self._signal) != 0

    @property
    def stop_here(self) -> bool:
        """Whether to end after this step: not where an epoch is, which is validated first."""
        return self.stop and self.batch < self._batches

    @property
    def exit_code(self) -> int:
        return 128 + (self._signal or signal.SIGTERM) if self.stop else 0

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C or SIGTERM ends training after the current step, and what else stands in
        this context is done in peace. Before the first step it ends the program."""

        def handle(number: int, frame) -> None:
            if not self._started:
                raise_interrupted(number, frame)
            if not self._signal:
                print("\nstopping after this step ...", file=sys.stderr)
            self._signal = number

        previous = [signal.signal(number, handle) for number in STOP_SIGNALS]
        self._handler = handle
        try:
            yield
        finally:
            self._handler = None
            for number, handler in zip(STOP_SIGNALS, previous):
                signal.signal(number, handler)


class WeightAverage:
    """The exponential moving average of a model's weights (Polyak & Juditsky 1992, with the newest
    ones weighing most, as in Marian), which is better than any of them while they still jump."""

    def __init__(self, model: nn.Module, updates: float):
        """updates: how many of the newest weigh about two thirds."""
        self._parameters = list(model.parameters())
        self._averages = [weight.detach().clone() for weight in self._parameters]
        self._decay, self.count = 1 - 1 / max(updates, 1), 0

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        # At first the average is of few, or the random weights of the start would linger.
        decay = min(self._decay, 1 - 1 / self.count)
        torch._foreach_lerp_(self._averages, self._parameters, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average for its weights meanwhile."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for number, parameter in enumerate(self._parameters):
            average = self._averages[number]
            self._averages[number], parameter.data = parameter.data, average

    def state_dict(self) -> dict:
        return {"averages": self._averages, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]
        for average, saved in zip(self._averages, state["averages"]):
            average.copy_(saved)


def describe_rows(rows: np.ndarray, places: list[str]) -> str:
    listed = ", ".join(places[row] if places else str(row) for row in sorted(rows.tolist()))
    return f"its batch holds {listed}"


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal, with its exit code. No KeyboardInterrupt, which Lightning swallows."""


def raise_interrupted(number: int, frame) -> typing.NoReturn:
    raise Interrupted(128 + number)


# ---- the raw loop -----------------------------------------------------------------------------


# The first process translates samples, which may make its position table longer than the others'.
DDP_OPTIONS = {"broadcast_buffers": False}


def train_raw(
    model: nn.Module,
    train_loader,
    validation_loader,
    config: TrainConfig,
    progress: Progress,
) -> None:
    """Plain PyTorch: autocast, loss scaling, accumulation, clipping, schedule, validation, and
    one process per device under torchrun."""
    from torch.nn.parallel import DistributedDataParallel

    device = next(model.parameters()).device
    in_precision = autocast(device, config.precision)
    # Enabled for fp16 alone: small gradients would vanish there. Otherwise it does nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    sampler, accumulate = train_loader.batch_sampler, config.accumulate
    batches = len(train_loader)
    optimizer = build_optimizer(model, config)
    total_steps = config.max_epochs * math.ceil(batches / accumulate)
    schedule = build_schedule(optimizer, config, total_steps)
    network = model
    if sampler.world > 1:
        network = DistributedDataParallel(model, **DDP_OPTIONS)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    progress.begin(config, total_steps, **parts, scaler=scaler)
    for epoch in range(progress.epoch, config.max_epochs):
        if progress.stop or progress.has_lost_patience(config):
            return
        sampler.set_epoch(epoch)
        model.train()
        first, silent = progress.batch, sampler.rank > 0
        title = f"epoch {epoch + 1}/{config.max_epochs}"
        bar = tqdm(desc=title, unit="batch", total=batches, initial=first, disable=silent)
        for index, batch in enumerate(prefetch(train_loader, device), first):
            ends_window = (index + 1) % accumulate == 0 or index + 1 == batches
            if index % accumulate == 0:
                seed_step(config.seed, progress.step, sampler.rank)
                optimizer.zero_grad(set_to_none=True)
            # Processes exchange gradients once per step, not once per batch.
            alone = network is model or ends_window
            with contextlib.nullcontext() if alone else network.no_sync():
                try:
                    with in_precision:
                        loss_sum, _ = batch_loss(network, batch, config.label_smoothing)
                    progress.add(loss_sum, sampler, index)
                    loss = step_share(loss_sum, sampler, index, accumulate)
                    scaler.scale(loss / accumulate).backward()
                except RuntimeError as error:
                    loss_sum = loss = None  # or their graph would live on
                    progress.leave_out(error, model, batch, sampler, index)
            bar.update()
            if not ends_window:
                continue
            scaler.unscale_(optimizer)
            clip_gradients(model, config)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            if (mean := progress.end_step()) is not None:
                bar.set_postfix(train_loss=f"{mean:.3f}", left=progress.time_left)
            if progress.stop_here:
                bar.close()
                return
        bar.close()
        with progress.averaged():
            loss = validate(model, validation_loader, in_precision)
        progress.end_epoch(loss)


def prefetch(loader, device: torch.device) -> Iterator[list[Tensor]]:
    """Batches on the device; on a GPU the next one is copied while the last one is computed with."""
    if device.type != "cuda":
        for batch in loader:
            yield [ids.to(device) for ids in batch]
        return
    copying, ready = torch.cuda.Stream(device), None
    for batch in loader:
        with torch.cuda.stream(copying):
            coming = [ids.pin_memory().to(device, non_blocking=True) for ids in batch]
        if ready is not None:
            yield ready
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        for ids in coming:
            ids.record_stream(computing)  # or its memory could be reused too early
        ready = coming
    if ready is not None:
        yield ready


def compile_model(model: nn.Module) -> bool:
    """Compile in place, once for all shapes; where that cannot be done, say so and go on.
    Returns whether it was done."""
    device = next(model.parameters()).device
    try:
        # Older ones compile anew for every batch: shapes inside of `Unpadded` are constants to them.
        if torch.__version__ < (2, 5):
            raise RuntimeError("torch 2.5 or newer would be needed")
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except RuntimeError as error:  # all of torch's complaints about a missing compiler
        print(f"note: --compile is left out: {data.one_line(error)}", file=sys.stderr)
        return False
    # Layer by layer: all layers of a kind share one graph, and what depends on how many pads a batch
    # has stays outside.
    for layer in (*model.encoder_layers, *model.decoder_layers):
        layer.compile(dynamic=True)
    return True


def count_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


@torch.no_grad()
def validate(model: nn.Module, loader, in_precision) -> float:
    """Loss in nats per token over a loader, without dropout or smoothing."""
    device = next(model.parameters()).device
    model.eval()
    losses = []
    for batch in loader:
        with in_precision:
            losses.append(batch_loss(model, [ids.to(device) for ids in batch]))
    return mean_loss(losses)


# ---- the Lightning loop -----------------------------------------------------------------------


def import_lightning():
    """lightning.pytorch, without the word on setuptools with which 2.3 greets its users."""

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*pkg_resources.*")
        import lightning.pytorch
    return lightning.pytorch


def adapter_class(base: type) -> type:
    """The LightningModule around a model; `base` is LightningModule or Modlee's subclass of it.

    Modlee copies the source of __init__ and forward into a file that must stand alone, hence the
    import inside and the names that do without this module.
    """

    class TextToTextAdapter(base):
        def __init__(self, model_config=None, model=None, *args, **kwargs):
            super().__init__()
            from seq2seq import TransformerSeq2SeqModel

            self.model_config = model_config  # plain, so that Modlee keeps it
            self.model = model or TransformerSeq2SeqModel(**model_config)

        def forward(self, input_ids, decoder_input_ids=None):
            return self.model(input_ids, decoder_input_ids)

        def attach(self, config: TrainConfig, progress: Progress) -> None:
            """What training needs and rebuilding does not."""
            self.run_config, self.progress = config, progress
            self.after_callbacks = None  # called once every callback has had its start
            # Where processes hold a part each: the weights at the end.
            self.whole = None
            self._names = [name for name, _ in self.model.named_parameters()]
            self._validation = []

        def configure_model(self) -> None:
            if self.run_config.strategy == "fsdp":
                from torch.distributed.fsdp.wrap import wrap

                # By hand, because Lightning would look for a GPU.
                self.model = wrap(self.model, device_id=self.trainer.strategy.root_device)

        def configure_optimizers(self):
            config = self.run_config
            optimizer = build_optimizer(self.model, config)
            total_steps = self.trainer.estimated_stepping_batches
            schedule = build_schedule(optimizer, config, total_steps)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

        def configure_gradient_clipping(self, optimizer, *args, **kwargs) -> None:
            # Lightning leaves unscaling to a fused optimizer, which would do it after clipping.
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            if scaler is not None and optimizer.param_groups[0].get("fused"):
                if not self._has_loss:
                    return  # it takes no step then, and unscaled gradients must not be again
                scaler.unscale_(optimizer)
            if self.run_config.strategy != "fsdp":
                clip_gradients(self.model, self.run_config)
            elif self.run_config.clip_norm > 0:  # a process knows its part of the norm
                self.model.clip_grad_norm_(self.run_config.clip_norm)

        def on_train_start(self) -> None:
            if self.after_callbacks:
                self.after_callbacks()
            model, optimizer = self.model, self.trainer.optimizers[0]
            if self.run_config.strategy == "fsdp":
                model, optimizer = (
                    Sharded(self.model, self._names, of) for of in (None, optimizer)
                )
            self._whole_model = model
            parts = {
                "model": model,
                "optimizer": optimizer,
                "schedule": self.trainer.lr_scheduler_configs[0].scheduler,
            }
            if scaler := getattr(self.trainer.precision_plugin, "scaler", None):
                parts["scaler"] = scaler
            total_steps = self.trainer.estimated_stepping_batches
            self.progress.begin(self.run_config, total_steps, **parts)

        def training_step(self, batch, batch_idx):
            config, sampler = (
                self.run_config,
                self.trainer.train_dataloader.batch_sampler,
            )
            if batch_idx % config.accumulate == 0:
                seed_step(config.seed, self.progress.step, sampler.rank)
            self._batch = batch, sampler, batch_idx
            self._has_loss = True
            try:
                loss_sum, _ = batch_loss(self.model, batch, config.label_smoothing)
            except RuntimeError as error:
                self.progress.leave_out(error, self.model, *self._batch)
                self._has_loss = False
                return None
            self.progress.add(loss_sum, sampler, batch_idx)
            return step_share(loss_sum, sampler, batch_idx, config.accumulate)

        def backward(self, loss, *args, **kwargs) -> None:
            try:
                super().backward(loss, *args, **kwargs)
            except RuntimeError as error:
                self.progress.leave_out(error, self.model, *self._batch)

        def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
            if self.progress.step == self.global_step:
                return  # inside an accumulation window
            if (loss := self.progress.end_step()) is not None:
                self.log("train_loss", loss, prog_bar=True)
            if self.progress.stop_here:
                self.trainer.should_stop = True
                self.trainer.limit_val_batches = 0  # it would validate before it stops

        def on_train_end(self) -> None:
            if self.run_config.strategy == "fsdp":
                self.whole = self._whole_model.state_dict()
            if self.progress.stop:
                self.progress.save()

        def on_validation_epoch_start(self) -> None:
            self._judged = self.progress.averaged()
            self._judged.__enter__()

        def validation_step(self, batch, batch_idx) -> None:
            self._validation.append(batch_loss(self.model, batch))

        def on_validation_epoch_end(self) -> None:
            self._judged.__exit__(None, None, None)
            loss = mean_loss(self._validation)
            self._validation.clear()
            # It is the mean over all processes already.
            self.log("val_loss", loss, prog_bar=True, rank_zero_only=True)
            self.progress.end_epoch(loss)
            if self.progress.stop or self.progress.has_lost_patience(self.run_config):
                self.trainer.should_stop = True

    return TextToTextAdapter


class Sharded:
    """A model of which every process holds a part (FSDP), or its optimizer, as one process would
    save and load it. Only the first process gets to see the whole."""

    def __init__(self, root: nn.Module, names: list[str], optimizer=None):
        """root: the wrapped model. names: its parameters, in the order of the plain one."""
        from torch.distributed.checkpoint import state_dict

        self._api, self._root, self._names = state_dict, root, names
        self._optimizer = optimizer
        on_cpu = next(root.parameters()).device.type == "cpu"  # torch would crash there
        self._options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=not on_cpu)

    @property
    def state(self) -> dict:
        return self._optimizer.state

    def state_dict(self) -> dict:
        if self._optimizer is None:
            return self._api.get_model_state_dict(self._root, options=self._options)
        whole = self._api.get_optimizer_state_dict(
            self._root, self._optimizer, options=self._options
        )
        if not whole["state"]:
            return whole
        numbers = {name: number for number, name in enumerate(self._names)}
        state = {numbers[name]: part for name, part in whole["state"].items()}
        (group,) = whole["param_groups"]
        return {
            "state": state,
            "param_groups": [group | {"params": list(numbers.values())}],
        }

    def load_state_dict(self, whole: dict) -> None:
        """Of the optimizer; the model was loaded before it was taken apart."""
        (group,) = whole["param_groups"]
        state = {self._names[number]: part for number, part in whole["state"].items()}
        self._api.set_optimizer_state_dict(
            self._root,
            self._optimizer,
            {"state": state, "param_groups": [group | {"params": self._names}]},
            options=self._api.StateDictOptions(full_state_dict=True),
        )


def fsdp_strategy():
    """Lightning's FSDP, in which every process holds a part of the weights, gradients and moments."""
    from lightning.pytorch.strategies import FSDPStrategy

    class OnAnyDevice(FSDPStrategy):
        """A class of its own, because Lightning refuses that one on a CPU."""

    return OnAnyDevice()


def continue_from(progress: Progress, trainer) -> None:
    """Let the next `fit` begin at progress.epoch and progress.batch, as a checkpoint of Lightning's
    own would."""
    state = trainer.fit_loop.state_dict()

    def count(key: str, **counts: int) -> None:
        for span in ("total", "current"):
            state[key][span].update(counts)

    begun = progress.epoch + (progress.batch > 0)
    finished = {"processed": progress.epoch, "completed": progress.epoch}
    count("epoch_progress", ready=begun, started=begun, **finished)
    stages = ("ready", "started", "processed", "completed")
    count("epoch_loop.batch_progress", **dict.fromkeys(stages, progress.batch))
    optimizer = state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    optimizer["step"]["total"].update(ready=progress.step, completed=progress.step)
    state["epoch_loop.state_dict"]["_batches_that_stepped"] = progress.step
    trainer.fit_loop.load_state_dict(state)
    # Restarting means in the middle of an epoch; at its begin it would validate first.
    trainer.fit_loop.restarting = progress.batch > 0


LIGHTNING_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def train_lightning(
    adapter,
    train_loader,
    validation_loader,
    config: TrainConfig,
    device: torch.device,
    **changes,
) -> None:
    """`Trainer.fit` on the adapter; the progress bar goes to stderr. changes: of the Trainer's
    arguments."""

    progress = adapter.progress
    if progress.epoch >= config.max_epochs or progress.has_lost_patience(config):
        progress.begin(config, progress.step, model=adapter.model)
        return  # it was resumed after its last step of all

    import_lightning()
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import TQDMProgressBar
    from lightning.pytorch.strategies import DDPStrategy

    for name in ("lightning.pytorch", "pytorch_lightning"):  # it logs under either
        logging.getLogger(name).setLevel(logging.WARNING)

    class Bar(TQDMProgressBar):
        def get_metrics(self, trainer, module) -> dict:
            more = {"left": module.progress.time_left} if module.progress.step else {}
            return super().get_metrics(trainer, module) | more

    bar = Bar(refresh_rate=10)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", config.devices))
    settings = {
        "accelerator": "gpu" if device.type == "cuda" else device.type,
        "devices": here,
        "num_nodes": config.devices // here,
        "strategy": DDPStrategy(**DDP_OPTIONS) if config.devices > 1 else "auto",
        "precision": LIGHTNING_PRECISION[config.precision],
        "max_epochs": config.max_epochs,
        "accumulate_grad_batches": config.accumulate,
        "callbacks": [bar],
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # the batch sampler is already ours
    }
    if config.strategy == "fsdp":
        settings["strategy"] = fsdp_strategy()
    trainer = Trainer(**(settings | changes))
    if progress.step:
        continue_from(progress, trainer)
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        # Collating a few rows takes less than handing them over from a process.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        # Our batch sampler begins where it should.
        warnings.filterwarnings("ignore", ".*dataloader is not resumable.*")
        # Of the newest Lightning's own making.
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        # The trainer's loop index is not the optimizer's: torch suspects the order.
        warnings.filterwarnings("ignore", ".*lr_scheduler.step.*optimizer.step.*")
        try:
            trainer.fit(adapter, train_loader, validation_loader)
        except Failed:
            for name in ("train_progress_bar", "val_progress_bar"):
                with contextlib.suppress(TypeError):  # where there is none
                    getattr(bar, name).close()  # or it would wipe the message away
            print(file=sys.stderr)
            raise


# ---- Modlee -----------------------------------------------------------------------------------
# Modlee 0.0.5 describes a run (code, graph, metafeatures) at the start of a fit. What follows keeps
# that and takes back its side effects, each named where it is dealt with.


def import_modlee():
    """The package, or None where it is not installed. The process is left as it was."""

    if find_spec("modlee") is None:
        return None
    # These configure their own loggers, which must not be mistaken for Modlee's doing.
    import_lightning()
    import mlflow  # noqa: F401
    import sklearn  # noqa: F401

    # Modlee turns TLS verification off, calls basicConfig, and silences these.
    https_context = ssl._create_default_https_context
    root_handlers, root_level = logging.root.handlers[:], logging.root.level
    names = "pytorch_lightning lightning.pytorch.core mlflow torchvision torch.nn"
    names += " sklearn pymfe numpy"
    loggers = [logging.getLogger(name) for name in names.split()]
    levels = [(logger, logger.level, logger.propagate) for logger in loggers]
    random_state = torch.get_rng_state()  # it draws a dummy image
    try:
        with warnings.catch_warnings():  # it adds 36 filters
            import modlee
    finally:
        ssl._create_default_https_context = https_context
        logging.root.handlers[:] = root_handlers
        logging.root.setLevel(root_level)
        for logger, level, propagate in levels:
            logger.setLevel(level)
            logger.propagate = propagate
        torch.set_rng_state(random_state)
    return modlee


def modlee_base() -> type:
    """The text-to-text class, whichever spelling this release has."""
    from modlee import model

    for name in ("TextTexttotextModleeModel", "TextTextToTextModleeModel"):
        if hasattr(model, name):
            return getattr(model, name)
    raise InputError("this Modlee has no text-to-text model; install modlee==0.0.5 or --no-modlee")


def snapshot(module: nn.Module) -> Callable[[], None]:
    """A function that puts back what Modlee's callbacks change: the random states, which parameters
    are trainable (its graph export ends by making all of them so), which modules are in training
    mode, and torch's print options."""

    printing = torch._tensor_str.PRINT_OPTS  # there is no public way to read them
    print_options = copy.copy(vars(printing))
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    trainable = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    modes = [(child, child.training) for child in module.modules()]

    def restore() -> None:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        torch.cuda.set_rng_state_all(cuda_states)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        for child, training in modes:
            child.training = training
        vars(printing).update(print_options)

    return restore


def small_converter(modlee) -> object:
    """Modlee's model-to-code converter without its expensive habits and its leftovers."""

    import networkx

    class SmallConverter(modlee.converter.Converter):
        def torch_model2onnx_graph(self, torch_model, input_dummy=None, **kwargs):
            # It would leave .tmp_model.onnx in the working directory.
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "model.onnx")
                return super().torch_model2onnx_graph(torch_model, input_dummy, path, **kwargs)

        torch2onnx = torch_model2onnx_graph

        def onnx_graph2onnx_nx(self, onnx_graph, prune=True):
            # It would draw the graph with pydot, a sixth of the time, for nobody.
            return networkx.DiGraph()

        def tensor2init_code(self, input_tensor, tensor_type=None):
            # It would build set(tensor.tolist()) of every weight: minutes for a model of 60 M.
            if not isinstance(input_tensor, Tensor):
                return input_tensor
            shape = tuple(input_tensor.shape)
            flat = input_tensor.flatten()
            if flat.numel() and bool((flat == flat[0]).all()):
                return f"torch.ones({shape})*{flat[0].item()}"
            if tensor_type is None and flat.numel() <= 1000:
                return f"torch.tensor({input_tensor.tolist()})"
            return f"torch.{tensor_type or 'randn'}({shape})"

        def dict2code(self, kwarg_dict):
            # It would exec() every string to see whether it is code, and append to ~/kwargs.txt.
            items = [
                f"{key!r}:{value if str(value).startswith('torch.') else repr(value)}"
                for key, value in kwarg_dict.items()
            ]
            return f"{{{','.join(items)}}}"

    return SmallConverter()


class ModleeRecord:
    """One training run recorded by Modlee.

    Attributes: run_path: folder of the run. artifacts: names of the files in it.
    seconds: what Modlee took.
    """

    def __init__(self, modlee, config: TrainConfig, prepared: Data):
        self.modlee, self.config, self.prepared = modlee, config, prepared
        self.seconds = 0.0
        self.run_path, self.artifacts = "", []

    def fit(self, adapter, fit: Callable[[], None]) -> None:
        """Run `fit` inside an MLflow run, with Modlee's callbacks on the adapter."""

        import mlflow

        # Advice on signatures and schemas that nobody asked for.
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        self.modlee.set_run_path(str(mlruns_folder(self.config.mlruns)))
        # The constructor has asked for models and checkpoints to be stored once more.
        mlflow.pytorch.autolog(log_datasets=False, log_models=False, checkpoint=False)
        restore = contextlib.ExitStack()
        callbacks = self.callbacks(adapter, restore)
        adapter.configure_callbacks = lambda: callbacks
        # Its calls of logging.info() add a handler that prints what all others log.
        root_handlers = logging.root.handlers[:]
        try:
            with self.modlee.start_run():
                fit()
                self.run_path = self.modlee.last_run_path()
        finally:
            restore.close()
            # It has patched Trainer.fit for the whole process.
            mlflow.pytorch.autolog(disable=True)
            logging.root.handlers[:] = root_handlers
        root = Path(self.run_path) / "artifacts"
        files = (path for path in root.rglob("*") if path.is_file())
        self.artifacts = sorted(str(path.relative_to(root)) for path in files)
        if self.config.push:
            self.push()

    def callbacks(self, adapter, restore: contextlib.ExitStack) -> list:
        """Modlee's own, behind one that notes the state they are going to change."""

        from lightning.pytorch.callbacks import Callback
        from modlee.model import callbacks as stock

        record = self

        class Begin(Callback):
            def on_train_start(self, trainer, module):
                print("\nModlee describes the run ...", file=sys.stderr)
                started = time.perf_counter()
                quiet = contextlib.ExitStack()
                quiet.callback(snapshot(module))
                # pymfe and the tracer warn by the dozen
                quiet.enter_context(warnings.catch_warnings())
                quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
                warnings.simplefilter("ignore")
                restore.push(quiet)  # also where a callback fails

                def finish() -> None:
                    quiet.close()
                    record.seconds += time.perf_counter() - started

                module.after_callbacks = finish

        def source(model, **more) -> str:
            # It names the modules of base classes and does not import them.
            text = self.modlee.get_code_text_for_model(model, **more)
            return "import positional, seq2seq\n" + text

        converter = small_converter(self.modlee)
        features = self.modlee.model_metafeatures
        restore.enter_context(patch.object(features, "converter", converter))
        restore.enter_context(patch.object(stock, "modlee_converter", converter))
        restore.enter_context(patch.object(stock, "get_code_text_for_model", source))
        adapter.data_metafeatures_callback.DataMetafeatures = self.metafeatures_class()
        dropped = (
            stock.LogOutputCallback,  # overwrites the module's own val_loss
            stock.LogParamsCallback,  # asks the loader for a fixed batch size
            stock.PushServerCallback,  # uploads unasked, and crashes without a key
        )
        kept = type(adapter).configure_callbacks(adapter)
        kept = [callback for callback in kept if not isinstance(callback, dropped)]
        # Each would run a whole training batch; two short rows show as much.
        ids = torch.ones(2, 8, dtype=torch.long)
        for callback in kept:
            callback.get_input = lambda trainer, module, *_: [ids.to(module.device)] * 2
        return [Begin(), *kept]

    def metafeatures_class(self) -> type:
        """Modlee's data metafeatures of a bounded, fixed-length view of the pairs.

        The stock class reads the data 2 N + 200 times, and fetches GPT-2's tokenizer
        with retries that last minutes where there is no network.
        """
        from modlee import data_metafeatures as stock
        from torch.utils.data import DataLoader, TensorDataset

        train, own = self.prepared.train, self.prepared.tokenizer
        rows = [train[row] for row in range(min(len(train), 200))]
        matrices = data.pad_batch(rows, own.pad_token_id)
        view = DataLoader(TensorDataset(*matrices), batch_size=2)
        tokenizer = modlee_tokenizer(own)

        class BoundedMetafeatures(stock.DataMetafeatures):
            def __init__(self, dataloader):
                dataset = stock.ModleeStandardizedTextDataset(view, own, tokenizer)
                super().__init__(DataLoader(dataset, batch_size=2))
                self.properties["dataset_size"] = len(dataloader.dataset)

        return BoundedMetafeatures

    def push(self) -> None:
        """Upload the run. A server that does not answer costs seconds, not the run."""

        say("modlee", "uploading source, graphs, parameters, metrics and paths")
        key, here = os.environ["MODLEE_API_KEY"], os.getcwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # it writes logs.json into the working directory
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    sent = self.modlee.save_run_as_json(self.run_path)
                reason = "the server did not accept it"
            except Exception as error:  # noqa: BLE001 - whatever its client raises
                sent, reason = False, str(error).replace(key, "***")
            finally:
                os.chdir(here)
        say("modlee", "uploaded" if sent else f"not uploaded: {reason}")


def modlee_tokenizer(own):
    """The tokenizer for data metafeatures: GPT-2's, as Modlee's is, where it can be had."""
    from transformers import GPT2Tokenizer

    for only_cached in (True, False):
        if not only_cached and not data.hub_reachable():
            break
        with contextlib.suppress(OSError):
            tokenizer = GPT2Tokenizer.from_pretrained("gpt2", local_files_only=only_cached)
            tokenizer.pad_token = tokenizer.eos_token
            return tokenizer
    return own


# ---- the model folder -------------------------------------------------------------------------


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write the tokenizer's files such that transformers 4 and 5 both load them."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    text = path.read_text(encoding="utf-8")
    # Version 5 renamed the class, and reads the old name; version 4 knows no other.
    text = text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
    path.write_text(text, encoding="utf-8")


# model.safetensors, config.json, the tokenizer's files, metrics.json, loss.png; last.safetensors
# where the last weights were not the best. Beside it, while it trains, NAME.checkpoints: states,
# best.pt, loss.png.


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Create or replace a file whole: `write` fills a neighbour that is synced, then renamed."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the new name must outlast a loss of power as well
            entry = os.open(path.parent, os.O_RDONLY)
            os.fsync(entry)
            os.close(entry)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def was_interrupted(folder: Path) -> bool:
    """Whether it is the model folder of a run that was stopped, which its end may replace."""
    try:
        return json.loads((folder / "metrics.json").read_text("utf-8"))["interrupted"]
    except (OSError, ValueError, LookupError):
        return False


def nearest_existing(path: Path) -> Path:
    """The path itself or the first of its parents that is there."""
    return next(part for part in (path, *path.parents) if part.exists())


def check_output(folder: Path, replaceable: bool = False) -> None:
    """InputError where a model folder cannot appear without something being lost. `replaceable`:
    that of an interrupted run may stand there."""
    folder = folder.resolve()  # what a link or ".." leads to
    free = folder.is_dir() and not any(folder.iterdir())
    free = free or (replaceable and was_interrupted(folder))
    if folder == Path.cwd() or (folder.exists() and not free):
        raise InputError(f"{folder} exists already; give another name")
    parent = nearest_existing(folder.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"cannot write to {parent}; give another place")


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Create a folder that appears under its name only when `fill` has completed it."""

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="model.", dir=folder.parent))
    try:
        fill(temporary)
        for path in temporary.iterdir():  # mkdtemp is private, a model need not be
            path.chmod(0o644)
        temporary.chmod(0o755)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        if was_interrupted(folder):
            os.replace(folder, temporary / "before")
            os.replace(temporary, folder.resolve())
            shutil.rmtree(folder / "before")
        else:
            os.replace(temporary, folder.resolve())
    except OSError as error:  # someone else has made the folder meanwhile
        reason = f"cannot become {folder} ({error.strerror})"
        raise InputError(f"the model is complete in {temporary} but {reason}") from None


def checkpoint_folder(config: TrainConfig) -> Path:
    """Where a run's checkpoints stand: settings.json and the newest two states. InputError where
    they cannot."""
    if config.resume is not None:
        return Path(config.resume).expanduser()
    folder = Path(f"{config.output}.checkpoints")
    if any(folder.glob("step-*.pt")):
        raise InputError(f"{folder} is of an unfinished run: give --resume {folder}, or delete it")
    return folder


def write_checkpoint(
    folder: Path, config: TrainConfig, digest: str, rank: int, state: dict
) -> Path:
    """Write a state of training, whole or not at all; the one before is kept. digest: of the data."""
    path = folder / f"step-{state['progress']['step']:09}.pt"
    if rank > 0:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".[0-9]*"):  # of a process that was killed in a write
        left_over.unlink()
    content = {"settings": dataclasses.asdict(config), "data": digest}
    with failing_in_one_line(path):
        write_json(folder / "settings.json", content)
        write_file(path, partial(torch.save, state))
    for old in sorted(folder.glob("step-*.pt"))[:-2]:
        old.unlink()
    return path


def write_best(folder: Path, rank: int, state: dict) -> None:
    """Keep the weights of the best validation so far, and which that is, beside the checkpoints."""
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with failing_in_one_line(folder / "best.pt"):
            write_file(folder / "best.pt", partial(torch.save, state))


@contextlib.contextmanager
def failing_in_one_line(path: Path) -> Iterator[None]:
    """Failed where a state cannot be written, with the one that is intact."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's writer
        reason = data.one_line(error)
        last = max(path.parent.glob("step-*.pt"), default=None)
        then = f"{last} is intact: make room, then --resume {path.parent}"
        then = then if last else "there is none before it"
        raise Failed(f"cannot write {path}: {reason}; {then}") from None


def read_state(path: Path) -> dict | None:
    """What `torch.save` wrote; None, and a note, where that is damaged. Nothing in it is executed."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        ValueError,
        EOFError,
        RuntimeError,
        pickle.PickleError,
        zipfile.BadZipFile,
    ) as error:
        reason = data.one_line(error)
        print(f"note: {path} cannot be read ({reason})", file=sys.stderr)
        return None


def digest_pairs(pairs: data.PairDataset) -> str:
    """The same for the same token ids in the same order, and for no others."""
    content = hashlib.sha256()
    for ids in (*pairs.lengths, *pairs.sources, *pairs.targets):
        content.update(ids.tobytes())
    return content.hexdigest()


def read_checkpoint(folder: Path, digest: str) -> dict:
    """The newest state that can be read. Raises InputError."""
    if json.loads((folder / "settings.json").read_text("utf-8"))["data"] != digest:
        raise InputError(f"the pairs are not those of {folder}")
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        if (state := read_state(path)) is not None:
            return state
    raise InputError(f"no checkpoint in {folder} can be read")


def save_model(
    folder: Path,
    model: nn.Module,
    tokenizer,
    config: TrainConfig,
    metrics: dict,
    progress: Progress,
    best: dict | None = None,
    parts: dict[str, list] | None = None,
) -> None:
    """Write a model folder, and leave `best`, the weights in it, in the model. None: those that it
    has; otherwise these are kept beside them, as last.safetensors. parts: name -> pairs held out."""
    from safetensors.torch import save_model as save_weights

    content = {
        "format": 1,
        "source_lang": config.source_lang,
        "target_lang": config.target_lang,
        "model": dataclasses.asdict(model.config),
        "training": dataclasses.asdict(config),
    }

    def fill(temporary: Path) -> None:
        save_tokenizer(tokenizer, temporary)
        if best is not None:
            save_weights(model, str(temporary / "last.safetensors"))
            model.load_state_dict(best)
        save_weights(model, str(temporary / "model.safetensors"))
        write_json(temporary / "config.json", content)
        write_json(temporary / "metrics.json", metrics)
        for name, pairs in (parts or {}).items():
            lines = [(config.source_lang, config.target_lang), *(pair[:2] for pair in pairs)]
            text = "".join(f"{source}\t{target}\n" for source, target in lines)
            (temporary / f"{name}.tsv").write_text(text, encoding="utf-8")
        draw_curves(temporary / "loss.png", progress)

    write_folder(folder, fill)


def load_model(folder: str, device: torch.device):
    """(model in eval mode, tokenizer, (source language, target language)). Raises InputError.

    The weights are mapped from the file into the model, without being initialised or copied.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder).expanduser()
    engine = is_engine(folder)
    try:
        file = path / (ENGINE_FILE if engine else "config.json")
        content = json.loads(file.read_text(encoding="utf-8"))
        languages = content["source_lang"], content["target_lang"]
        if engine:
            tokenizer = data.load_tokenizer(str(path))
            model_config = Seq2SeqConfig(**content["model"])
            tokens = tokenizer.convert_ids_to_tokens(range(model_config.vocab_size))
            return Engine(path, model_config, tokens, device.type), tokenizer, languages
        with torch.device("meta"):
            model = TransformerSeq2SeqModel(**content["model"])
        weights = load_file(path / "model.safetensors", device=str(device))
        weights.pop("positions.table", None)  # in folders of before it was computed
        if model.config.tie_embeddings:  # stored once
            weights["output.weight"] = weights["embedding.weight"]
        model.load_state_dict(weights, assign=True)
        model.tie_embeddings()
    except FileNotFoundError as error:
        missing = Path(error.filename or path / "model.safetensors").name
        raise InputError(f"{folder} is no model folder: {missing} is missing") from None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        reason = data.one_line(error)
        raise InputError(f"{folder} is no model folder of this program: {reason}") from None
    return model.eval(), data.load_tokenizer(str(path)), languages


# ---- what is seen of a run ----------------------------------------------------------------------


def draw_curves(path: Path, progress: Progress) -> None:
    """Over optimizer steps: losses above, BLEU and the learning rate below."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(7, 6), layout="constrained")
    losses, scores = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    rates = scores.twinx()
    lines = []
    for axes, points, label, style in (
        (
            losses,
            progress.train,
            "training (with dropout and smoothing)",
            {"color": "tab:blue", "marker": "."},
        ),
        (
            losses,
            progress.validation,
            "validation",
            {"color": "#d55e00", "marker": "o"},
        ),
        (scores, progress.bleu, "BLEU", {"color": "#009e73", "marker": "o"}),
        (rates, progress.rates, "learning rate", {"color": "tab:gray"}),
    ):
        if points:
            lines += axes.plot(*zip(*points), label=label, **style)
    losses.set(ylabel="loss (nats per token)", yscale="log")
    losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    losses.yaxis.set_major_formatter("{x:g}")  # 0.1 and not 10^-1
    losses.yaxis.set_minor_formatter(NullFormatter())
    if math.isfinite(progress.best[0]):
        loss, step = progress.best
        losses.annotate(
            f"best: {loss:.3g}",
            (step, loss),
            (0, 10),
            textcoords="offset points",
            ha="right",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    scores.set(xlabel="optimizer step", ylabel="BLEU (greedy)", ylim=(0, None))
    rates.set(ylabel="learning rate", ylim=(0, None))
    rates.ticklabel_format(axis="y", scilimits=(-2, 2))
    for axes in (losses, scores):
        axes.grid(alpha=0.3, which="both")
    losses.legend(handles=lines)
    write_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


class Monitor:
    """Shows a run while it trains, after each validation: a line with the time left and samples on
    stderr, the curves in loss.png, and all points in MLflow and, where asked for, TensorBoard."""

    SAMPLES = 2

    def __init__(self, config: TrainConfig, folder: Path, prepared: Data):
        """folder: where loss.png goes."""
        self.config, self.tokenizer = config, prepared.tokenizer
        # From all over the set, which may have been put together from several.
        count = len(prepared.validation_pairs)
        rows = np.linspace(0, count - 1, min(config.bleu_pairs, count)).astype(int)
        if config.strategy == "fsdp":  # no process has a whole model to translate with
            rows = []
        pairs = [prepared.validation_pairs[row] for row in rows]
        self.sources, self.references = ([pair[side] for pair in pairs] for side in (0, 1))
        self.recorders = [Picture(folder / "loss.png")]
        if config.mlruns != "none" and find_spec("mlflow"):
            self.recorders.append(MlflowRun(config))
        if config.tensorboard is not None:
            self.recorders.append(TensorBoard(config))

    def __call__(self, progress: Progress, model: nn.Module) -> None:

        step, loss = progress.validation[-1]
        best = " (best)" if progress.best[1] == step else ""
        said = f"epoch {progress.epoch}/{self.config.max_epochs}: train "
        said += f"{progress.epoch_loss:.3f}, validation {loss:.3f}{best}, "
        samples = ""
        if self.sources:
            languages = (self.config.source_lang, self.config.target_lang)
            translator = Translator(model, self.tokenizer, languages, DecodeOptions(), silent=True)
            found = translator.first(self.sources)
            bleu = score(found, self.references)["bleu"]
            progress.bleu.append((step, bleu))
            said += f"BLEU {bleu:.1f} of {len(found)} pairs, "
            for source, target in list(zip(self.sources, found))[: self.SAMPLES]:
                samples += f"\n    {source}\n    {target}"
        tqdm.write(f"{said}{progress.time_left} left{samples}", file=sys.stderr)
        self.update(progress)

    def update(self, progress: Progress) -> None:
        """Record what is new."""
        self._tell("update", progress)

    def keep(self, folder: Path, metrics: dict) -> None:
        """The model folder is complete."""
        self._tell("keep", folder, metrics)

    @contextlib.contextmanager
    def recording(self, progress: Progress) -> Iterator[None]:
        """What happens meanwhile is the run."""
        state = "FAILED"
        try:
            yield
            state = "KILLED" if progress.stop else "FINISHED"
        except Interrupted:
            state = "KILLED"
            raise
        finally:
            self._tell("end", state)

    def _tell(self, what: str, *arguments) -> None:
        """Call a method of every recorder. One that fails is said and left out: a full disk, or a
        store of another version, ends no training."""
        for recorder in list(self.recorders):
            try:
                getattr(recorder, what)(*arguments)
            except Exception as error:  # noqa: BLE001 - of whatever kind a store may raise
                reason = data.one_line(error)
                name = type(recorder).__name__
                print(f"\nnote: no more records: {name}: {reason}", file=sys.stderr)
                self.recorders.remove(recorder)


class Recorder:
    """A place to which a run's curves go."""

    def __init__(self):
        self._sent: dict[str, int] = {}

    def new_points(self, progress: Progress) -> Iterator[tuple[str, list]]:
        """(name of a curve, its points (step, value) since the last call)."""
        curves = {
            "train/loss": progress.train,
            "train/learning_rate": progress.rates,
            "validation/loss": progress.validation,
            "validation/BLEU": progress.bleu,
        }
        for name, points in curves.items():
            new = points[self._sent.get(name, 0) :]
            self._sent[name] = len(points)
            if new:
                yield name, new

    def update(self, progress: Progress) -> None:
        """A validation was done."""

    def keep(self, folder: Path, metrics: dict) -> None:
        """The model folder is complete, scored or not."""

    def end(self, state: str) -> None:
        """The run is over; `state` is one of MLflow's."""


class Picture(Recorder):
    """loss.png beside the checkpoints, while there is no model folder yet."""

    PAUSE = 10  # seconds between two versions, or short epochs would wait for them

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.drawn = path, -math.inf

    def update(self, progress: Progress) -> None:
        if time.perf_counter() - self.drawn >= self.PAUSE:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draw_curves(self.path, progress)
            self.drawn = time.perf_counter()


def mlruns_folder(name: str) -> Path:
    """The folder of a store that MLflow and Modlee share."""
    folder = Path(name).expanduser().resolve()
    if folder.name != "mlruns":  # Modlee would append it
        folder = folder / "mlruns"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # An empty folder would be taken for a store without its default experiment.
    with contextlib.suppress(OSError):
        folder.rmdir()
    return folder


class MlflowRun(Recorder):
    """A run in MLflow: Modlee's where one is active, else one of its own."""

    def __init__(self, config: TrainConfig):
        super().__init__()
        self.config, self.client = config, None
        self.run_id, self.is_own = None, False

    def _begin(self) -> None:
        import mlflow

        folder = mlruns_folder(self.config.mlruns)
        self.client = mlflow.MlflowClient(folder.as_uri())
        run = mlflow.active_run()
        self.is_own = run is None
        if self.is_own:
            found = self.client.get_experiment_by_name("Default")
            where = found.experiment_id if found else self.client.create_experiment("Default")
            name = Path(self.config.output).name
            run = self.client.create_run(where, run_name=name)
        self.run_id = run.info.run_id
        for name, value in dataclasses.asdict(self.config).items():
            self.client.log_param(self.run_id, name, value)

    def update(self, progress: Progress) -> None:
        if self.client is None:
            self._begin()
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for name, points in self.new_points(progress):
            metrics = [Metric(name, value, now, step) for step, value in points]
            for some in chunks(metrics, 1000):  # as many as a call may have
                self.client.log_batch(self.run_id, some)

    def keep(self, folder: Path, metrics: dict) -> None:
        """The scores, the picture and the model folder, whose files are not written twice."""

        for name in ("bleu", "chrf"):
            if metrics[name] is not None:
                self.client.log_metric(self.run_id, f"final/{name}", metrics[name])
        self.client.log_artifact(self.run_id, folder / "loss.png")
        uri = self.client.get_run(self.run_id).info.artifact_uri
        target = Path(url2pathname(urlparse(uri).path)) / "model"

        def link(source: str, copy: str) -> None:
            try:
                os.link(source, copy)
            except OSError:  # on another disk
                shutil.copy2(source, copy)

        shutil.copytree(folder, target, copy_function=link)

    def end(self, state: str) -> None:
        if self.is_own:
            self.client.set_terminated(self.run_id, state)


class TensorBoard(Recorder):
    """A folder of its own in the one that `tensorboard --logdir` is given."""

    def __init__(self, config: TrainConfig):
        from torch.utils.tensorboard import SummaryWriter

        super().__init__()
        folder = Path(config.tensorboard).expanduser() / Path(config.output).name
        # A resumed run writes its curves once more, from the start.
        self.writer = SummaryWriter(str(folder), purge_step=0)

    def update(self, progress: Progress) -> None:
        for name, points in self.new_points(progress):
            for step, value in points:
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def end(self, state: str) -> None:
        self.writer.close()


# ---- export -----------------------------------------------------------------------------------

EXPORTED_POSITIONS = 1024  # rows of the position table in an exported folder
ENGINE_FILE = "seq2seq.json"  # what CTranslate2's own files do not say
ENGINE_HINT = "CTranslate2 is not installed: pip install ctranslate2"


def transformers_settings(config: Seq2SeqConfig, vocab_size: int) -> dict:
    """Ours in the words of transformers' Pegasus and Marian."""
    settings = {
        "vocab_size": vocab_size,
        "d_model": config.d_model,
        "encoder_layers": config.num_encoder_layers,
        "decoder_layers": config.num_decoder_layers,
        "max_position_embeddings": EXPORTED_POSITIONS,
        "tie_word_embeddings": config.tie_embeddings,
        "activation_function": "relu",
        "scale_embedding": True,
        "dropout": config.dropout,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "pad_token_id": config.pad_id,
        "eos_token_id": config.eos_id,
        "decoder_start_token_id": config.pad_id,
    }
    for side in ("encoder", "decoder"):
        settings[f"{side}_attention_heads"] = config.nhead
        settings[f"{side}_ffn_dim"] = config.dim_feedforward
    return settings


def to_transformers(model: TransformerSeq2SeqModel):
    """The same model as transformers' Pegasus (pre-LN) or Marian (post-LN), weights copied.

    Their sinusoidal table has all sines first, then all cosines; ours takes turns (as the paper
    does). So the channels of the residual stream are permuted wherever a weight reads or writes
    them. Raises InputError for positions that neither of them has.
    """
    import transformers

    config = model.config
    if config.positional != "sinusoidal":
        raise InputError(
            f"transformers has no model of this shape with {config.positional} positions; "
            "train with --positional sinusoidal to export"
        )
    kind = "Pegasus" if config.norm_first else "Marian"
    # CTranslate2 cuts the last row off Marian's vocabulary, where other models keep their pad.
    spare = 0 if config.norm_first else 1
    settings = transformers_settings(config, config.vocab_size + spare)
    if spare:
        settings["decoder_vocab_size"] = settings["vocab_size"]
    exported_config = getattr(transformers, f"{kind}Config")(
        **settings,
        normalize_before=config.norm_first,  # this and the next are read by CTranslate2
        normalize_embedding=False,
        forced_eos_token_id=None,
    )
    name = {"Pegasus": "PegasusForConditionalGeneration", "Marian": "MarianMTModel"}
    exported = getattr(transformers, name[kind])(exported_config)

    width = config.d_model
    channels = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])
    state = {}

    def put(name: str, weight: Tensor, bias: Tensor, reads: bool, writes: bool) -> None:
        """A linear layer that reads from, or writes to, the residual stream."""
        weight = weight[:, channels] if reads else weight
        state[f"model.{name}.weight"] = weight[channels] if writes else weight
        state[f"model.{name}.bias"] = bias[channels] if writes else bias

    def put_norm(name: str, norm: nn.LayerNorm) -> None:
        state[f"model.{name}.weight"] = norm.weight[channels]
        state[f"model.{name}.bias"] = norm.bias[channels]

    def put_attention(name: str, attention: nn.Module) -> None:
        weights, biases = (
            attention.in_proj.weight.chunk(3),
            attention.in_proj.bias.chunk(3),
        )
        for part, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases):
            put(f"{name}.{part}", weight, bias, reads=True, writes=False)
        out = attention.out_proj
        put(f"{name}.out_proj", out.weight, out.bias, reads=False, writes=True)

    for side in ("encoder", "decoder"):
        for index, layer in enumerate(getattr(model, f"{side}_layers")):
            place = f"{side}.layers.{index}"
            put_attention(f"{place}.self_attn", layer.self_attention)
            put_norm(f"{place}.self_attn_layer_norm", layer.self_attention_norm)
            if side == "decoder":
                put_attention(f"{place}.encoder_attn", layer.cross_attention)
                put_norm(f"{place}.encoder_attn_layer_norm", layer.cross_attention_norm)
            first, second = layer.linear1, layer.linear2
            put(f"{place}.fc1", first.weight, first.bias, reads=True, writes=False)
            put(f"{place}.fc2", second.weight, second.bias, reads=False, writes=True)
            put_norm(f"{place}.final_layer_norm", layer.feed_forward_norm)
        if config.norm_first:
            put_norm(f"{side}.layer_norm", getattr(model, f"{side}_norm"))

    def vocabulary(weight: Tensor) -> Tensor:
        rows = weight[: config.vocab_size, channels]
        return torch.cat([rows, rows.new_zeros(spare, width)])

    embedding = vocabulary(model.embedding.weight)
    for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens"):
        state[f"model.{name}.weight"] = embedding
    state["lm_head.weight"] = vocabulary(model.output.weight)
    bias = torch.zeros(1, config.vocab_size + spare)
    bias[:, config.vocab_size :] = -1e9  # the spare row is no token
    state["final_logits_bias"] = bias
    missing, unexpected = exported.load_state_dict(state, strict=False)
    # The position tables are made by the class and not always stored.
    missing = [name for name in missing if "embed_positions" not in name]
    assert not missing and not unexpected, (missing, unexpected)

    generation = exported.generation_config
    generation.max_length = EXPORTED_POSITIONS // 2  # else 20 tokens
    generation.num_beams = 1
    generation.suppress_tokens = [config.pad_id]  # the start token is no translation
    return exported.eval()


def to_ctranslate2(
    model: TransformerSeq2SeqModel,
    tokens: list[str],
    folder: Path,
    quantization: str | None = None,
    unk_token: str | None = None,
) -> None:
    """Write the model into `folder` in CTranslate2's own format, by its `specs`.

    tokens: the vocabulary, in the order of the ids. Raises InputError without the package.
    """
    try:
        from ctranslate2 import specs
    except ImportError:
        raise InputError(ENGINE_HINT) from None
    config = model.config
    layers, heads = (config.num_encoder_layers, config.num_decoder_layers), config.nhead
    # Post-LN stacks end normalised, and so they have no final norm in either format.
    more = {"pre_norm": config.norm_first, "no_final_norm": not config.norm_first}
    if config.positional == "rotary":
        more |= {"rotary_dim": 0, "rotary_interleave": False}  # of whole heads, in halves
    encoder = specs.TransformerEncoderSpec(layers[0], heads, **more)
    decoder = specs.TransformerDecoderSpec(layers[1], heads, **more)
    spec = specs.TransformerSpec(encoder, decoder)
    arrays: dict[int, np.ndarray] = {}

    def array(weight: Tensor) -> np.ndarray:
        # One array for tied weights, which are stored once then.
        key = weight.data_ptr(), len(weight)
        if key not in arrays:
            arrays[key] = weight.detach().float().cpu().numpy().copy()
        return arrays[key]

    def put(target, source: nn.Module, rows: slice = slice(None)) -> None:
        """A linear layer (of which some rows), or a layer norm."""
        name = "gamma" if isinstance(source, nn.LayerNorm) else "weight"
        setattr(target, name, array(source.weight[rows]))
        setattr(target, "beta" if name == "gamma" else "bias", array(source.bias[rows]))

    width = config.d_model
    for side, part in (("encoder", encoder), ("decoder", decoder)):
        embeddings = part.embeddings[0] if side == "encoder" else part.embeddings
        embeddings.weight = array(model.embedding.weight[: config.vocab_size])
        if config.positional == "learned":
            part.position_encodings.encodings = array(model.positions.embedding.weight)
        elif config.positional != "rotary":
            table = sinusoidal_positional_encoding(EXPORTED_POSITIONS, width)
            table = table if config.positional == "sinusoidal" else torch.zeros_like(table)
            part.position_encodings.encodings = table.numpy()
        if config.norm_first:
            put(part.layer_norm, getattr(model, f"{side}_norm"))
        for target, layer in zip(part.layer, getattr(model, f"{side}_layers")):
            put(target.self_attention.layer_norm, layer.self_attention_norm)
            put(target.self_attention.linear[0], layer.self_attention.in_proj)
            put(target.self_attention.linear[1], layer.self_attention.out_proj)
            if side == "decoder":
                attention = layer.cross_attention
                put(target.attention.layer_norm, layer.cross_attention_norm)
                put(target.attention.linear[0], attention.in_proj, slice(width))
                put(target.attention.linear[1], attention.in_proj, slice(width, None))
                put(target.attention.linear[2], attention.out_proj)
            put(target.ffn.layer_norm, layer.feed_forward_norm)
            put(target.ffn.linear_0, layer.linear1)
            put(target.ffn.linear_1, layer.linear2)
    decoder.projection.weight = array(model.output.weight[: config.vocab_size])
    bias = np.zeros(config.vocab_size, np.float32)
    bias[config.pad_id] = -1e9  # the start token is no translation
    decoder.projection.bias = bias
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    spec.config.decoder_start_token = tokens[config.pad_id]
    spec.config.eos_token = tokens[config.eos_id]
    spec.config.bos_token = tokens[config.pad_id]
    spec.config.unk_token = unk_token or tokens[config.pad_id]
    spec.validate()
    spec.optimize(quantization=quantization)
    spec.save(str(folder))


class Engine:
    """A folder exported for CTranslate2, in the place of a model. No torch computes in here: its
    threads and the engine's would wait for each other.

    Attributes: config: that of the model it was made of.
    """

    def __init__(self, folder: Path, config: Seq2SeqConfig, tokens: list[str], device: str):
        try:
            import ctranslate2
        except ImportError:
            raise InputError(ENGINE_HINT) from None
        self.config, self.tokens = config, tokens
        self.numbers = {token: i for i, token in enumerate(tokens)}
        threads = torch.get_num_threads()
        self.translator = ctranslate2.Translator(str(folder), device, intra_threads=threads)

    def decode(self, rows: list[list[int]], options: "DecodeOptions") -> list[list[Hypothesis]]:
        """The hypotheses of each row of token ids, best first, cut as `greedy_decode` cuts."""
        config = self.config
        limits = [2 * len(row) + 10 for row in rows]
        if config.positional == "learned":
            limits = [min(limit, config.max_length) for limit in limits]
        found = self.translator.translate_batch(
            [[self.tokens[i] for i in row] for row in rows],
            beam_size=options.beam,
            num_hypotheses=options.num_return,
            length_penalty=options.length_penalty,
            # `beam_search` ends when nothing that runs could get onto its list, which is later.
            patience=2 if options.beam > 1 else 1,
            max_decoding_length=max(limits),
            max_input_length=0,
            return_scores=options.scores,
            return_end_token=True,
        )
        hypotheses = []
        for result, limit in zip(found, limits):
            hypotheses.append([])
            for place, tokens in enumerate(result.hypotheses):
                ids, log_probs, score = [self.numbers[token] for token in tokens][:limit], [], None
                if options.scores:  # of the whole; what each token adds is not told
                    score = result.scores[place]
                    count = max(1, len(tokens))  # none for a source that is eos alone
                    log_probs = [score * count**options.length_penalty / count] * len(tokens)
                hypotheses[-1].append(Hypothesis(ids, log_probs, score))
        return hypotheses


def complete_tokenizer(tokenizer, max_length: int) -> None:
    """Make the tokenizer do by itself what this module does around it: normalise the text, end it
    in eos, leave spaces alone when it decodes."""
    from tokenizers import Regex, normalizers, processors

    eos, tokenizer.model_max_length = tokenizer.eos_token, max_length
    tokenizer.clean_up_tokenization_spaces = False
    # No token types, which such models do not take; both places, for transformers 4 and 5.
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    backend = tokenizer.backend_tokenizer
    if tokenizer("a")["input_ids"][-1] != tokenizer.eos_token_id:
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {eos}", special_tokens=[(eos, tokenizer.eos_token_id)]
        )
    if backend.normalizer is None:
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        steps = [normalizers.NFC(), spaces, normalizers.Strip()]
        backend.normalizer = normalizers.Sequence(steps)


def export(config: ExportConfig) -> int:
    output = Path(config.output).expanduser()
    check_output(output)
    model, tokenizer, languages = load_model(config.model, torch.device("cpu"))
    if isinstance(model, Engine):
        raise InputError(f"{config.model} is an exported folder: give the one it was made of")
    if config.to == "hf":
        exported = to_transformers(model)
        complete_tokenizer(tokenizer, EXPORTED_POSITIONS)
        what = f"{type(exported).__name__}, float32, for transformers"
    else:
        tokens = tokenizer.convert_ids_to_tokens(range(model.config.vocab_size))
        what = f"CTranslate2, {config.quantization or 'float32'}"

    def fill(folder: Path) -> None:
        save_tokenizer(tokenizer, folder)
        if config.to == "hf":
            exported.save_pretrained(folder)
            return
        to_ctranslate2(model, tokens, folder, config.quantization, tokenizer.unk_token)
        content = {"source_lang": languages[0], "target_lang": languages[1]}
        content["model"] = dataclasses.asdict(model.config)
        write_json(folder / ENGINE_FILE, content)
        for part in ("validation.tsv", "test.tsv"):  # for `evaluate`
            path = Path(config.model).expanduser() / part
            if path.is_file():
                shutil.copy(path, folder / part)

    write_folder(output, fill)
    say("exported", f"{what}: {output}")
    return 0


# ---- translating and scoring ------------------------------------------------------------------


class Translator:
    """A model that turns lines into lines.

    Lines are decoded in windows of `TRANSLATE_WINDOW`, so that memory does not grow with the input;
    in a window they are sorted by length and batched by tokens, so that batches hold little padding.
    What is longer than the model was trained for is split at the ends of sentences, clauses or
    words, and translated in pieces.

    Attributes: notes: what happened -> (how many lines, numbers of the first of them, from 1).
    """

    def __init__(self, model, tokenizer, languages: tuple[str, str], options, silent=False):
        """options: a `DecodeOptions`. silent: without a bar."""
        self.model, self.tokenizer, self.languages = model, tokenizer, languages
        self.options, self.silent = options, silent or None
        self.notes: dict[str, tuple[int, list[int]]] = {}

    def __call__(
        self, lines: Iterable[str], total: int | None = None, window: int = 0
    ) -> Iterator[list[tuple[str, float | None]]]:
        """For every line, in order, its `num_return` translations (text, score), best first; the
        score is None unless asked for. An empty line stays empty. `window`: lines to wait for.

        Should `lines` fail, what came before is translated first.
        """

        numbered = enumerate(lines, 1)
        with tqdm(desc="translate", total=total, unit="line", disable=self.silent) as bar:
            failure = None
            while failure is None:
                part = []
                try:
                    part.extend(islice(numbered, window or TRANSLATE_WINDOW))
                except InputError as error:
                    failure = error
                yield from self._translate(part, bar)
                if not part:
                    break
            if failure:
                raise failure

    def _translate(self, lines: list[tuple[int, str]], bar) -> Iterator[list]:
        options, limit = self.options, self.model.config.max_length
        pieces = []  # (number of the line, token ids)
        for number, line in lines:
            text = data.normalize(line, self.languages[0])
            parts = split_text(text, self.tokenizer, limit) if text else []
            if len(parts) > 1:
                self.note(f"longer than {limit} tokens, translated in pieces", number)
            pieces += [(number, ids) for ids in parts]
        order = sorted(range(len(pieces)), key=lambda i: len(pieces[i][1]))
        found: list[list[Hypothesis]] = [[] for _ in pieces]
        for rows in batch_by_tokens(
            order,
            [len(ids) for _, ids in pieces],
            options.batch_tokens // options.width,
        ):
            for row, hypotheses in zip(rows, self.decode([pieces[i] for i in rows])):
                found[row] = hypotheses
            bar.update(len(rows) * len(lines) / len(pieces))
        by_line: dict[int, list] = {number: [] for number, _ in lines}
        for (number, _), hypotheses in zip(pieces, found):
            by_line[number].append(hypotheses)
        for number, parts in by_line.items():
            ends = (part[0].tokens[-1:] for part in parts)
            if any(end != [self.model.config.eos_id] for end in ends):
                self.note("the translation did not end and was cut off", number)
            yield [self._join([part[i] for part in parts]) for i in range(options.num_return)]
        bar.refresh()

    def decode(self, pieces: list[tuple[int, list[int]]]) -> list[list[Hypothesis]]:
        """The hypotheses of each piece (number of its line, token ids), best first."""

        options = self.options
        if isinstance(self.model, Engine):
            return self.model.decode([ids for _, ids in pieces], options)
        device = next(self.model.parameters()).device
        pad_id, count = self.model.config.pad_id, options.num_return
        batch = data.pad_side([torch.tensor(ids) for _, ids in pieces], pad_id).to(device)
        if options.beam > 1 or options.scores:
            return beam_search(self.model, batch, options.beam, options.length_penalty, count)
        if options.sample:
            # What a line becomes depends on its number and the seed, not on its batch.
            seeds = [
                random.Random(f"{options.seed} {number} {i} {ids}").getrandbits(32)
                for number, ids in pieces
                for i in range(count)
            ]
            output = sample_decode(
                self.model,
                batch.repeat_interleave(count, dim=0),
                seeds,
                options.temperature,
                options.top_p,
            )
        else:
            output = greedy_decode(self.model, batch)
        rows = [[i for i in row if i != pad_id] for row in output.tolist()]
        return [[Hypothesis(row, [], None) for row in part] for part in chunks(rows, count)]

    def _join(self, parts: list[Hypothesis]) -> tuple[str, float | None]:
        texts = data.decode_ids([part.tokens for part in parts], self.tokenizer, self.languages[1])
        text = " ".join(text for text in texts if text)
        if not self.options.scores or not parts:
            return text, None
        log_probs = [value for part in parts for value in part.log_probs]
        return text, sum(log_probs) / max(len(log_probs), 1) ** self.options.length_penalty

    def first(self, lines: list[str]) -> list[str]:
        """The best translation of each line."""
        return [best[0][0] for best in self(lines, len(lines))]

    def report(self, unit: str = "line", by: str = "") -> None:
        """Say on stderr what did not go the usual way. `unit`: what was counted."""
        for what, (count, first) in self.notes.items():
            numbers = ", ".join(map(str, first)) + (" ..." if count > len(first) else "")
            which = f"{unit} {numbers}" if count == 1 else f"{count:,} {unit}s ({numbers})"
            print(f"note: {which}: {what}{by}", file=sys.stderr)

    def note(self, what: str, number: int) -> None:
        count, first = self.notes.get(what, (0, []))
        self.notes[what] = (count + 1, (first + [number])[:5])


def split_text(text: str, tokenizer, max_length: int) -> list[list[int]]:
    """Token ids of a text in pieces of at most `max_length` tokens, eos included.

    Cut where it hurts least: into sentences, and what is still too long between clauses, else
    between words, else anywhere. A text that fits is one piece.
    """
    (ids,) = data.encode_texts([text], tokenizer)
    if len(ids) <= max_length:
        return [ids]
    pieces = re.split(r"(?<=[.!?…])\s+(?=[^a-zăâîșț])", text)  # one sentence, one piece
    for boundary in (r"(?<=[,;:)–—])\s+", r"\s+"):
        if len(pieces) > 1:
            break
        pieces, current, size = [], [], 0  # as much as fits is one piece
        parts = re.split(boundary, text)
        for part, part_ids in zip(parts, data.encode_texts(parts, tokenizer)):
            # Its eos makes up for the space that it lost.
            if current and size + len(part_ids) > max_length:
                pieces.append(" ".join(current))
                current, size = [], 0
            current.append(part)
            size += len(part_ids)
        pieces.append(" ".join(current))
    if len(pieces) > 1:
        return [ids for piece in pieces for ids in split_text(piece, tokenizer, max_length)]
    body, step = ids[:-1], max(max_length - 1, 1)
    return [[*body[i : i + step], ids[-1]] for i in range(0, len(body), step)]


def batch_by_tokens(rows: list[int], lengths: list[int], most: int) -> Iterator[list[int]]:
    """Cut `rows`, sorted by rising length, into batches of at most `most` tokens, pads included."""
    batch: list[int] = []
    for row in rows:
        if batch and (len(batch) + 1) * lengths[row] > most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def load_translator(options: DecodeOptions) -> Translator:
    """The `Translator` of a model folder."""
    model, tokenizer, languages = load_model(options.model, choose_device(options.device))
    if isinstance(model, Engine):
        for name in ("sample", "attention"):
            if getattr(options, name, None):
                raise InputError(f"--{name} needs the model folder that this one was made of")
    elif options.precision == "bf16":
        model.to(torch.bfloat16)
    return Translator(model, tokenizer, languages, options)


def draw_attention(path: Path, translator: Translator, text: str) -> None:
    """Cross-attention of the last decoder layer while a sentence is translated: a panel for the
    mean over heads and one per head, source tokens across, output tokens down."""
    from matplotlib.figure import Figure

    model, tokenizer, languages = (
        translator.model,
        translator.tokenizer,
        translator.languages,
    )
    pieces = split_text(data.normalize(text, languages[0]), tokenizer, model.config.max_length)
    if not pieces:
        raise InputError("--attention needs a sentence that is not empty")
    if len(pieces) > 1:
        translator.note(f"the picture shows the first of {len(pieces)} pieces", 1)
    source = pieces[0]
    (best, *_) = translator.decode([(1, source)])[0]
    device = next(model.parameters()).device
    weights = cross_attention_weights(
        model,
        torch.tensor([source], device=device),
        torch.tensor([best.tokens], device=device),
    )[-1, 0]  # [H, T, S]
    heads = len(weights)
    labels = [
        [tokenizer.decode([i]).strip() or repr(tokenizer.decode([i])) for i in ids]
        for ids in (source, best.tokens)
    ]
    panels = [("mean of heads", weights.mean(dim=0))]
    panels += [(f"head {i + 1}", head) for i, head in enumerate(weights)]
    columns = min(len(panels), 3 if heads <= 5 else 5)
    lines = math.ceil(len(panels) / columns)
    cell = 0.28
    width, height = (cell * len(ids) + 1.0 for ids in (source, best.tokens))
    figure = Figure(
        figsize=(columns * max(width, 2.2), lines * max(height, 2.0)),
        layout="constrained",
    )
    for axes in figure.subplots(lines, columns, squeeze=False).flat:
        axes.set_visible(False)
    for (title, weight), axes in zip(panels, figure.axes):
        axes.set_visible(True)
        image = axes.imshow(weight.float().cpu(), cmap="Blues", vmin=0, vmax=1)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(source)), labels[0], rotation=90, fontsize=8)
        axes.set_yticks(range(len(best.tokens)), labels[1], fontsize=8)
        axes.tick_params(length=0)
    figure.colorbar(image, ax=figure.axes, shrink=0.6, label="attention")
    figure.suptitle("where each output token (row) looked, last decoder layer")
    write_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def score(hypotheses: list[str], references: list[str]) -> dict:
    """sacreBLEU's BLEU and chrF (Post 2018) with their signatures, of normalised texts."""
    from sacrebleu.metrics import BLEU, CHRF

    bleu, chrf = BLEU(), CHRF()
    return {
        "bleu": round(bleu.corpus_score(hypotheses, [references]).score, 2),
        "chrf": round(chrf.corpus_score(hypotheses, [references]).score, 2),
        "signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
    }


def versions() -> dict[str, str | None]:

    found = {"python": sys.version.split()[0]}
    for name in (
        "torch",
        "lightning",
        "modlee",
        "transformers",
        "tokenizers",
        "datasets",
        "sacrebleu",
        "ctranslate2",
        "x-transformers",
    ):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


# ---- bench decode -----------------------------------------------------------------------------


def reference_case(config: BenchDecodeConfig, device: torch.device):
    """(model, its vocabulary, ids of the sentences) of a benchmark."""

    if config.model is None:
        sizes = {"demo": TrainConfig(), "tutorial": TrainConfig(**PRESETS["tutorial"])}
        vocabulary = {"demo": 800, "tutorial": 32_100}[config.size]
        model_config = dataclasses.replace(choose_model(sizes[config.size]), vocab_size=vocabulary)
        torch.manual_seed(0)
        model = TransformerSeq2SeqModel(**dataclasses.asdict(model_config)).to(device)
        with torch.no_grad():  # eos never wins: every sentence is as long as allowed
            model.embedding.weight[model_config.eos_id] = 0
        tokens = [str(i) for i in range(vocabulary)]
        lengths = torch.randint(5, 25, (config.sentences,)).tolist()
        ids = [
            [*torch.randint(3, vocabulary, (length,)).tolist(), model_config.eos_id]
            for length in lengths
        ]
        return model.eval(), tokens, ids
    model, tokenizer, languages = load_model(config.model, device)
    if config.text is None:
        lines = (english for english, _ in data.phrasebook(config.sentences, seed=1))
    else:
        lines = Path(config.text).expanduser().read_text("utf-8").splitlines()
    texts = (data.normalize(line, languages[0]) for line in lines)
    texts = list(islice((text for text in texts if text), config.sentences))
    if not texts:
        raise InputError(f"no sentences in {config.text}")
    tokens = tokenizer.convert_ids_to_tokens(range(model.config.vocab_size))
    return model, tokens, data.encode_texts(texts, tokenizer)


# A library to compare, loaded: (ids of a batch, beam size) -> ids of each translation without eos.
Decoder = Callable[[list[list[int]], int], list[list[int]]]


def load_ours(model, tokens: list[str], limit: int, threads: int) -> Decoder:
    """greedy_decode and beam_search."""
    torch.set_num_threads(threads)
    pad_id, eos_id = model.config.pad_id, model.config.eos_id
    device = next(model.parameters()).device

    def decode(rows: list[list[int]], beam: int) -> list[list[int]]:
        input_ids = pad_rows(rows, pad_id, device)
        if beam == 1:
            output = greedy_decode(model, input_ids, limit).tolist()
            return [without_ends(row, pad_id, eos_id) for row in output]
        found = beam_search(model, input_ids, beam, max_new_tokens=limit)
        return [without_ends(best.tokens, pad_id, eos_id) for best, *_ in found]

    return decode


def load_transformers(model, tokens: list[str], limit: int, threads: int) -> Decoder:
    """`generate`, with its cache, of the exported model."""
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    pad_id, eos_id = model.config.pad_id, model.config.eos_id
    device = next(model.parameters()).device
    exported = to_transformers(model).to(device)
    exported.generation_config.max_length = None  # max_new_tokens decides

    @torch.inference_mode()
    def decode(rows: list[list[int]], beam: int) -> list[list[int]]:
        input_ids = pad_rows(rows, pad_id, device)
        output = exported.generate(
            input_ids=input_ids,
            attention_mask=input_ids.ne(pad_id).long(),
            max_new_tokens=limit,
            num_beams=beam,
            do_sample=False,
        )[:, 1:].tolist()  # without the start token
        return [without_ends(row, pad_id, eos_id) for row in output]

    return decode


def load_ctranslate2(
    model, tokens: list[str], limit: int, threads: int, quantization: str | None = None
) -> Decoder:
    """CTranslate2, through our export, searching as `Engine` does."""
    import ctranslate2

    with tempfile.TemporaryDirectory() as folder:
        to_ctranslate2(model, tokens, Path(folder), quantization)
        translator = ctranslate2.Translator(
            folder,
            device=next(model.parameters()).device.type,
            inter_threads=1,
            intra_threads=threads,
        )
    number = {token: i for i, token in enumerate(tokens)}

    def decode(rows: list[list[int]], beam: int) -> list[list[int]]:
        results = translator.translate_batch(
            [[tokens[i] for i in row] for row in rows],
            beam_size=beam,
            patience=2 if beam > 1 else 1,
            max_decoding_length=limit,
        )
        return [[number[token] for token in r.hypotheses[0]] for r in results]

    return decode


LIBRARIES = {
    "ours": load_ours,
    "transformers": load_transformers,
    "ctranslate2": load_ctranslate2,
    "ctranslate2 int8": partial(load_ctranslate2, quantization="int8"),
}


def pad_rows(rows: list[list[int]], pad_id: int, device: torch.device) -> Tensor:
    """[B, S] int64."""
    return data.pad_side([torch.tensor(row) for row in rows], pad_id).to(device)


def without_ends(row: list[int], pad_id: int, eos_id: int) -> list[int]:
    row = [token for token in row if token != pad_id]
    return row[: row.index(eos_id)] if eos_id in row else row


def serve_library(name: str, config: BenchDecodeConfig, pipe) -> None:
    """A library in this process, which is its own: says None once loaded (or an InputError), then
    answers (batch size, beam size, passes) until the other end closes.

    Without passes it is the first run: (outputs, seconds, MiB more than before at the peak). With
    passes: seconds of one, the mean of several over the same batches.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the process that asks
    device, threads = choose_device(config.device), torch.get_num_threads()
    # CTranslate2 ends up with torch's OpenMP. Had torch started threads of its own, all together
    # would count as too many for the cores and fall asleep after every operation, which makes a
    # small model twenty times as slow.
    torch.set_num_threads(1)
    try:
        model, tokens, sentences = reference_case(config, device)
        library = LIBRARIES[name](model, tokens, config.max_new_tokens, threads)
    except InputError as error:
        pipe.send(error)
        return
    pipe.send(None)

    def decode(batches: list) -> tuple[list, float]:
        started = time.perf_counter()
        outputs = [output for rows in batches for output in library(rows, beam)]
        synchronize(device)
        return outputs, time.perf_counter() - started

    with contextlib.suppress(EOFError):
        while True:
            batch, beam, passes = pipe.recv()
            batches = bench_batches(sentences, batch)
            if not passes:
                before = memory_peak(device, reset=True)
                outputs, seconds = decode(batches)
                peak = before and round((memory_peak(device) - before) / 2**20, 1)
                pipe.send((outputs, seconds, peak))
                continue
            # Threads and caches had time to fall asleep.
            warm = time.perf_counter() + 0.2
            while time.perf_counter() < warm:
                decode([batches[0][:1]])
            pipe.send(decode(batches * passes)[1] / passes)


def bench_batches(sentences: list, batch: int) -> list[list]:
    return list(chunks(sentences, batch))[:16]


def begin_service(target: Callable, *arguments) -> None:
    """The first thing in a process that `serving` begins, and will kill."""
    # tqdm's own lock is a semaphore, which a killed process leaves behind.
    tqdm.set_lock(RLock())
    target(*arguments)


@contextlib.contextmanager
def serving(target: Callable, jobs: dict[str, tuple]) -> Iterator[dict[str, Callable]]:
    """Run target(*arguments, pipe) in a process of its own for each name -> arguments of `jobs`.

    Yields name -> function that sends what it is given, if anything, and returns the answer. A
    process that answers with an InputError, or dies, raises it here.
    """

    context = multiprocessing.get_context("spawn")
    processes, pipes = [], {}

    def ask(name: str, *question):
        if question:
            pipes[name].send(question)
        try:
            found = pipes[name].recv()
        except EOFError:
            raise RuntimeError(f"{name} died; what it said stands above") from None
        if isinstance(found, InputError):
            raise found
        return found

    try:
        for name, arguments in jobs.items():
            pipes[name], other_end = context.Pipe()
            arguments = (target, *arguments, other_end)
            processes.append(context.Process(target=begin_service, args=arguments))
            processes[-1].start()
            other_end.close()
        yield {name: partial(ask, name) for name in jobs}
    finally:
        for process in processes:
            process.kill()


def choose_libraries(device: torch.device) -> list[str]:
    names = [name for name in LIBRARIES if name == "ours" or find_spec(name.split()[0])]
    # CTranslate2 does not know MPS.
    return [name for name in names if "ctranslate2" not in name or device.type != "mps"]


def machine_rates(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """(matmul rate in FLOP/s, copy bandwidth in bytes/s, read and written): the best seen."""

    def best(function: Callable[[], object]) -> float:
        seconds = []
        for _ in range(12):
            started = time.perf_counter()
            function()
            synchronize(device)
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    size = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    source = torch.ones(2**26, device=device)  # 256 MiB, more than any cache
    target = torch.zeros_like(source)
    copied = 2 * source.numel() * source.element_size()
    return (
        2 * size**3 / best(lambda: a @ b),
        copied / best(lambda: target.copy_(source)),
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def memory_peak(device: torch.device, reset: bool = False) -> int | None:
    """Peak memory in bytes since the last reset: of the device, or of this process on Linux."""

    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    try:
        if reset:
            # Give back what others have freed, or this one would seem to need nothing.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except (OSError, AttributeError):  # no Linux, or another libc
        return None
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def bench_decode(config: BenchDecodeConfig) -> int:
    """Every library in turn, round by round."""

    check_reports(config, "json")
    device = choose_device(config.device)
    model, _, sentences = reference_case(config, device)
    rates = machine_rates(device)
    cases = [(batch, beam) for batch in config.batch for beam in config.beam]
    jobs = {name: (name, config) for name in choose_libraries(device)}
    rows = []
    with (
        serving(serve_library, jobs) as libraries,
        tqdm(
            desc="bench",
            total=len(cases) * len(libraries) * (config.repeats + 1),
            unit="run",
            disable=None,
        ) as bar,
    ):
        for ask in libraries.values():
            ask()  # until it is loaded
        for batch, beam in cases:
            outputs, peaks, first = {}, {}, {}
            for name, ask in libraries.items():
                outputs[name], first[name], peaks[name] = ask(batch, beam, 0)
                bar.update()
            # A stall weighs less in a longer window.
            passes = math.ceil(0.5 / first["ours"])
            seconds = {name: [] for name in libraries}
            for turn in range(config.repeats):
                order = list(libraries)
                for name in order if turn % 2 == 0 else reversed(order):
                    seconds[name].append(libraries[name](batch, beam, passes))
                    bar.update()
            limit, found = config.max_new_tokens, outputs["ours"]
            tokens = sum(min(len(row) + 1, limit) for row in found)  # with eos
            for name, taken in seconds.items():
                ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], taken)]
                middle = median(taken)
                rows.append(
                    {
                        "batch": batch,
                        "beam": beam,
                        "library": name,
                        "sentences": len(found),
                        "same_output": sum(map(list.__eq__, found, outputs[name])),
                        "tokens": tokens,
                        "tokens_per_second": round(tokens / middle, 1),
                        "ms_per_sentence": round(middle / len(found) * 1e3, 3),
                        "peak_extra_mib": peaks[name],
                        "ours_times_faster": round(median(ratios), 2),
                        "ours_times_faster_range": [
                            round(function(ratios), 2) for function in (min, max)
                        ],
                        "passes": passes,
                        "seconds": [round(value, 5) for value in taken],
                    }
                )
    report = {
        **describe_bench(device),
        "model": dataclasses.asdict(model.config),
        "sentences": len(sentences),
        "matmul_gflops": round(rates[0] / 1e9, 1),
        "copy_gb_per_second": round(rates[1] / 1e9, 1),
        "rows": rows,
    }
    say("machine", report["machine"])
    say(
        "rates",
        f"{rates[0] / 1e9:.0f} GFLOP/s matmul, {rates[1] / 1e9:.1f} GB/s copied",
    )
    say("sentences", f"{len(sentences)}, at most {config.max_new_tokens} tokens each")
    columns = "library,batch,beam,same,tokens/s,ms/sentence,+MiB,ours is faster"
    lines = [columns.split(",")]
    for row in rows:
        low, high = row["ours_times_faster_range"]
        ratio = f"{row['ours_times_faster']:.2f} x ({low:.2f} to {high:.2f})"
        names = ("library", "batch", "beam", "same_output")
        lines.append(
            [
                *(str(row[name]) for name in names),
                f"{row['tokens_per_second']:.0f}",
                f"{row['ms_per_sentence']:.1f}",
                f"{row['peak_extra_mib'] or 0:.0f}",
                "" if row["library"] == "ours" else ratio,
            ]
        )
    print()
    print_table(lines)
    if config.json:
        write_json(Path(config.json).expanduser(), report)
    return 0


def print_table(lines: list[list[str]]) -> None:
    """The first column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        rest = [cell.rjust(width) for cell, width in zip(line, widths)][1:]
        print("  ".join([line[0].ljust(widths[0]), *rest]))


def chunks(items: list, size: int) -> Iterator[list]:
    return (items[start : start + size] for start in range(0, len(items), size))


def describe_machine(device: torch.device) -> str:

    if device.type == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{platform.system()} {platform.machine()}, {threads} CPU threads"


def describe_bench(device: torch.device) -> dict:
    """What every report begins with."""
    command = " ".join(["python", "run.py", *sys.argv[1:]])
    machine = describe_machine(device)
    return {"command": command, "machine": machine, "versions": versions()}


SENTENCES = "chrF\tpair\tsource\ttranslation\treference"  # the table's first line

# The flags that name a report: how its file begins, and what is found soon after.
REPORTS = {
    "json": (b"{", b'"versions": {'),
    "sentences": (SENTENCES.encode(), b""),
    "picture": (b"\x89PNG", b"Matplotlib"),
    "attention": (b"\x89PNG", b"Matplotlib"),
    "profile": (b"{", b'"schemaVersion"'),  # torch's
}


def check_reports(config, *flags: str) -> None:
    """InputError where a report could not be written at the end, would take the place of a file
    that is no earlier report of its kind, or of another of these reports."""
    taken: dict[Path, str] = {}
    for flag in flags:
        if not getattr(config, flag):
            continue
        path = Path(getattr(config, flag)).expanduser().absolute()
        said = f"--{flag} {getattr(config, flag)}"
        if (path.exists() and not path.is_file()) or not path.parent.is_dir():
            raise InputError(f"{said}: no file can be written there")
        if path.exists() and not is_report(path, flag):
            raise InputError(f"{said} exists already and is no such report; give another name")
        other = taken.setdefault(path.resolve(), flag)
        if other != flag:
            raise InputError(f"{said}: that is the file of --{other}; give another")


def is_report(path: Path, flag: str) -> bool:
    """Whether it is empty, or a report of the kind of `flag`, which a new one may replace."""
    alike = path.name in ("metrics.json", "loss.png")
    if alike and (path.parent / "model.safetensors").exists():
        return False  # a model folder's own
    with open(path, "rb") as file:
        head = file.read(2**16)
    start, mark = REPORTS[flag]
    return not head or (head.startswith(start) and mark in head)


# ---- bench: what Lightning and Modlee cost per step ---------------------------------------------

WINDOW = LOG_EVERY  # steps in a turn of an arm: all that is periodic comes round once
FRAMEWORK = {"d_model": 64, "nhead": 4, "dim_feedforward": 256}
FRAMEWORK |= {"num_encoder_layers": 1, "num_decoder_layers": 1, "batch_size": 16}
WIDE = {"d_model": 256, "nhead": 8, "dim_feedforward": 1024}
WIDE |= {"num_encoder_layers": 2, "num_decoder_layers": 2, "batch_size": 64}
WIDEST = PAPER_BASE | {"d_model": 1024, "nhead": 16, "dim_feedforward": 4096}
# Name -> settings of three models; the middle one is the one whose costs are itemised. A GPU gets
# larger ones: about 25,000 target tokens in a batch.
SIZES = {
    "cpu": {"small": FRAMEWORK, "demo": {}, "wide": WIDE},
    "cuda": {
        "demo": {"batch_size": 512},
        "tutorial": PAPER_BASE | {"batch_size": 2048},
        "widest": WIDEST | {"batch_size": 2048},
    },
}


@dataclass(frozen=True)
class Arm:
    """A way to train. features: what is switched on; modlee: parts of its names of callbacks, or
    None where the run is not recorded."""

    label: str
    loop: str = "lightning"
    features: tuple[str, ...] = ()
    modlee: tuple[str, ...] | None = None


ARMS = {
    "raw": Arm("raw loop", "raw"),
    "compiled": Arm("raw loop, --compile", "raw", ("compile",)),
    "barebones": Arm("Lightning, barebones", features=("barebones",)),
    "off": Arm("Lightning, all switched off"),
    "bar": Arm("progress bar", features=("bar",)),
    "log": Arm("logging every step", features=("log",)),
    "checkpoint": Arm("checkpoint every 20 steps", features=("checkpoint",)),
    "clip": Arm("clipping by Trainer", features=("clip",)),
    "autolog": Arm("mlflow autolog", modlee=()),
    "modlee-data": Arm("Modlee: data", modlee=("Data", "Transforms")),
    "modlee-model": Arm("Modlee: model", modlee=("ModelMeta", "Code")),
    "modlee-output": Arm("Modlee: outputs", modlee=("Output",)),
    "everything": Arm(
        "Lightning, all of these at once",
        features=("bar", "log", "checkpoint", "clip"),
        modlee=("Data", "Transforms", "ModelMeta", "Code", "Output"),
    ),
    "defaults": Arm("Lightning as it comes", features=("defaults",)),
    "shipped": Arm("this adapter, --no-modlee", features=("shipped",)),
    "modlee": Arm(
        "this adapter with Modlee",
        features=("shipped",),
        modlee=("Data", "Transforms", "ModelMeta", "Code"),
    ),
}
# What is switched on alone, and the arm beside which that is all.
ITEMS = {
    **dict.fromkeys(("bar", "log", "checkpoint", "clip", "autolog"), "off"),
    **dict.fromkeys(("modlee-data", "modlee-model", "modlee-output"), "autolog"),
}
# Arms that take turns, few enough to be close in time, each with what it is compared to. The first
# group is all that --quick and the other sizes have.
GROUPS = (
    ("raw", "barebones", "defaults", "shipped", "modlee"),
    ("raw", "compiled", "off", "clip", "everything"),
    ("off", "bar", "log", "checkpoint", "autolog"),
    ("autolog", "modlee-data", "modlee-model", "modlee-output"),
)


class Interval(typing.NamedTuple):
    """A figure with its bootstrapped 95 % interval."""

    value: float
    low: float
    high: float


class Gate:
    """What stands in the way of an arm that asks for its next batch, so that arms take turns.

    A sampler calls it with the number of the batch. Every WINDOW batches it waits for the device,
    answers with what the window took, and goes on when it is asked to.
    """

    def __init__(self, pipe, device: torch.device, progress: Progress):
        self.pipe, self.device, self.progress = pipe, device, progress
        self.waited = 0.0  # seconds in here
        self.parts: dict[str, float] = {}
        self.events = None
        if device.type == "cuda":
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def clock(self) -> float:
        """Seconds, which stand still while the gate is closed."""
        return time.perf_counter() - self.waited

    def __call__(self, index: int) -> None:
        if index % WINDOW:
            return
        closed = time.perf_counter()
        self.pipe.send(self.measure() if index else None)
        try:
            self.pipe.recv()
        except EOFError:
            os._exit(0)
        gc.collect()  # which no arm does by itself
        self.wake()
        memory_peak(self.device, reset=index == WINDOW)
        self.parts.clear()
        if self.events:
            self.events[0].record()
        self.waited += time.perf_counter() - closed
        self.started = self.clock()

    def wake(self) -> None:
        """Threads fall asleep while others have their turn, and clocks go down."""
        until = time.perf_counter() + 0.1
        a = torch.ones(256, 256, device=self.device)
        while time.perf_counter() < until:
            a @ a
        synchronize(self.device)

    def measure(self) -> dict:
        enqueued = self.clock() - self.started
        if self.events:
            self.events[1].record()
        synchronize(self.device)
        seconds = self.clock() - self.started
        device_seconds = None
        if self.events:
            device_seconds = self.events[0].elapsed_time(self.events[1]) / 1e3
        return {
            "seconds": seconds,
            "enqueue_seconds": enqueued,
            "device_seconds": device_seconds,
            "peak": memory_peak(self.device),
            "parts": dict(self.parts),
            "points": list(self.progress.train),
        }


class GatedSampler(data.BucketBatchSampler):
    """The same WINDOW batches over and over in one long epoch, so that any two turns are the same
    work. `gate` is called with the number of each batch before it is handed out."""

    gate: Callable[[int], None] = staticmethod(lambda index: None)
    windows = 1000

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        kinds = [self.batches[i % len(self.batches)] for i in range(WINDOW)]
        tokens = [int(self.target_lengths[rows].sum()) for rows in kinds]
        self.batches, self._tokens = kinds * self.windows, tokens * self.windows

    def __iter__(self) -> Iterator[list[int]]:
        for index, rows in enumerate(super().__iter__()):
            self.gate(index)
            yield rows


def trainer_changes(features: tuple[str, ...], config: TrainConfig, folder: str) -> dict:
    """Arguments of the Trainer for what is switched on."""
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    if "shipped" in features:
        return {}
    if "barebones" in features:
        return {"barebones": True, "callbacks": []}
    changes = {"callbacks": [], "default_root_dir": folder}
    if "defaults" in features:
        names = ("logger", "enable_checkpointing", "enable_model_summary")
        return changes | dict.fromkeys(names, True)

    class LogEveryStep(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            module.log("step_loss", outputs["loss"])

    changes["enable_progress_bar"] = "bar" in features
    if "log" in features:
        changes |= {"logger": CSVLogger(folder), "log_every_n_steps": 1}
        changes["callbacks"].append(LogEveryStep())
    if "checkpoint" in features:
        saving = ModelCheckpoint(folder, every_n_train_steps=LOG_EVERY)
        changes["callbacks"].append(saving)
        changes["enable_checkpointing"] = True
    if "clip" in features:
        changes["gradient_clip_val"] = config.clip_norm
    return changes


def bench_adapter(arm: Arm, model, config: TrainConfig, progress: Progress):
    """The adapter around a model, as an arm wants it."""

    module = import_lightning().LightningModule
    if arm.modlee is not None:
        import_modlee()
    base = module if arm.modlee is None else modlee_base()
    adapter = adapter_class(base)(dataclasses.asdict(model.config), model)
    adapter.attach(config, progress)
    if "clip" in arm.features:
        theirs = MethodType(module.configure_gradient_clipping, adapter)
        adapter.configure_gradient_clipping = theirs
    return adapter


class PartialRecord(ModleeRecord):
    """With some of Modlee's callbacks, also of those that this program leaves out."""

    wanted: tuple[str, ...] = ()

    def callbacks(self, adapter, restore) -> list:
        from modlee.model.callbacks import LogOutputCallback

        begin, *kept = super().callbacks(adapter, restore)
        kept.append(LogOutputCallback())
        names = [(type(callback).__name__, callback) for callback in kept]
        return [begin] + [
            callback for name, callback in names if any(word in name for word in self.wanted)
        ]


def bench_case(config: TrainConfig, prepared: Data, device: torch.device):
    """(model, loaders, progress): the same in every arm."""
    model = build_model(config, prepared.tokenizer).to(device)
    pad_id = model.config.pad_id
    sampler = GatedSampler(*prepared.train.lengths, config.batch_size, config.seed)
    collate = partial(data.pad_batch, pad_id=pad_id)
    train_loader = torch.utils.data.DataLoader(
        prepared.train, batch_sampler=sampler, collate_fn=collate
    )
    validation_loader = data.make_loader(prepared.validation, config.batch_size, pad_id)
    progress = Progress(config.precision == "fp16")
    return model, [train_loader, validation_loader], progress


@contextlib.contextmanager
def taken_apart(gate: Gate, wait: bool) -> Iterator[None]:
    """Note in gate.parts how long is spent in what every arm calls: loading, forward, backward,
    clipping, Adam. What is left of a step is the loop around it. wait: for the device, each time."""

    from torch.utils.data.dataloader import _BaseDataLoaderIter

    parts = {
        "data": (_BaseDataLoaderIter, "__next__"),
        "backward": (Tensor, "backward"),
        "clipping": (torch.nn.utils, "clip_grad_norm_"),
        "optimizer": (sys.modules[torch.optim.Adam.__module__], "adam"),
    }

    def timed(name: str, function: Callable) -> Callable:
        def wrapper(*arguments, **more):
            started = gate.clock()
            result = function(*arguments, **more)
            if wait:
                synchronize(gate.device)
            gate.parts[name] = gate.parts.get(name, 0.0) + gate.clock() - started
            return result

        return wrapper

    with contextlib.ExitStack() as patches:
        forward = timed("forward", batch_loss)
        patches.enter_context(patch.dict(globals(), batch_loss=forward))
        for name, (owner, function) in parts.items():
            whole = timed(name, getattr(owner, function))
            patches.enter_context(patch.object(owner, function, whole))
        yield


def profile_steps(config: TrainConfig, prepared: Data, device, path: Path) -> None:
    """Write a trace of ten steps of the raw loop, after a window of warming up."""
    from torch.profiler import ProfilerActivity, profile, schedule

    model, loaders, progress = bench_case(config, prepared, device)
    sampler = loaders[0].batch_sampler
    sampler.windows = 2
    sampler.set_epoch(0)

    def save(profiler) -> None:
        write_file(path, lambda part: profiler.export_chrome_trace(str(part)))

    kinds = [ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    ten = schedule(wait=0, warmup=WINDOW, active=10, repeat=1)
    with profile(
        activities=kinds, schedule=ten, on_trace_ready=save, record_shapes=True
    ) as profiler:
        sampler.gate = lambda index: profiler.step() if index else None
        train_raw(model, *loaders, config, progress)


def retire(config: TrainConfig) -> None:
    """Let this process live in the folder of a benchmark, and write and draw its bars there."""

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the process that asks
    os.chdir(Path(config.mlruns).parent)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())


def serve_arm(
    arm: Arm,
    config: TrainConfig,
    prepared: Data,
    device_name: str,
    apart: bool,
    pipe,
) -> None:
    """An arm in this process, which is its own. Answers None once it could begin, and then, each
    time it is asked, what the next WINDOW steps took. apart: waiting for the device in between."""
    retire(config)
    device = choose_device(device_name)
    try:
        model, loaders, progress = bench_case(config, prepared, device)
        gate = loaders[0].batch_sampler.gate = Gate(pipe, device, progress)
        gc.disable()
        if "compile" in arm.features and not compile_model(model):
            pipe.send("nothing can compile here")
            return
        with taken_apart(gate, apart):
            run_arm(arm, model, loaders, config, progress, prepared)
    except Exception as error:  # noqa: BLE001 - whatever it is, the asking process must hear of it
        reason = f"{type(error).__name__}: {error}"
        pipe.send(InputError(f"the arm {arm.label!r} failed: {reason}"))


def run_arm(arm: Arm, model, loaders, config: TrainConfig, progress, prepared) -> None:
    """Train as the arm does, in the current folder."""
    if arm.loop == "raw":
        train_raw(model, *loaders, config, progress)
        return
    device = next(model.parameters()).device
    adapter = bench_adapter(arm, model, config, progress)
    changes = trainer_changes(arm.features, config, os.getcwd())

    def fit() -> None:
        train_lightning(adapter, *loaders, config, device, **changes)

    if arm.modlee is None:
        fit()
    else:
        record = PartialRecord(import_modlee(), config, prepared)
        record.wanted = arm.modlee
        record.fit(adapter, fit)


class Described(Exception):
    """Modlee has described the run: no need to train."""


def serve_start(stock: bool, config: TrainConfig, prepared: Data, device_name: str, pipe) -> None:
    """Answers what Modlee does before the first step: name -> (seconds, what went wrong). stock:
    as Modlee comes, fed as its tutorial feeds it, but without the upload."""
    retire(config)
    os.environ["HOME"] = os.getcwd()  # where it leaves a file
    found: dict[str, tuple[float, str]] = {}

    def timed(name: str, function: Callable) -> Callable:
        def wrapper(*arguments):
            started, trouble = time.perf_counter(), ""
            try:
                function(*arguments)
            except Exception as error:  # noqa: BLE001 - a stock callback may raise anything
                trouble = f"{type(error).__name__}: {data.one_line(error, 80)}"
            found[name] = (time.perf_counter() - started, trouble)

        return wrapper

    def end() -> None:
        raise Described

    device = choose_device(device_name)
    timed("import", import_modlee)()
    modlee = import_modlee()
    model, loaders, progress = bench_case(config, prepared, device)
    record = ModleeRecord(modlee, config, prepared)
    adapter = bench_adapter(ARMS["modlee"], model, config, progress)
    adapter.on_train_start = end
    ours = record.callbacks

    def callbacks(adapter, restore) -> list:
        made = type(adapter).configure_callbacks(adapter) if stock else ours(adapter, restore)
        kept = []
        for callback in made:
            name = type(callback).__name__
            if name != "PushServerCallback":
                if name != "Begin":
                    callback.on_train_start = timed(name, callback.on_train_start)
                kept.append(callback)
        return kept

    record.callbacks = callbacks
    if stock:
        rows = [prepared.train[row] for row in range(200)]
        sides = data.pad_batch(rows, model.config.pad_id)
        fixed = torch.utils.data.TensorDataset(*sides)
        loaders[0] = torch.utils.data.DataLoader(fixed, batch_size=16)
        loaders[0].initial_tokenizer = prepared.tokenizer
    with contextlib.suppress(Described):
        record.fit(adapter, lambda: train_lightning(adapter, *loaders, config, device))
    pipe.send(found)


def outside(answer: dict) -> float:
    """Seconds of a window in none of the parts that every arm calls."""
    return answer["seconds"] - sum(answer["parts"].values())


def paired_difference(windows: np.ndarray, reference: np.ndarray) -> Interval:
    """How much longer a step takes, seconds: the median over pairs of windows, of which every one
    was the same work, and 95 % of 2,000 resamplings of the pairs. Both [windows] seconds."""
    return median_interval((windows - reference) / WINDOW)


def median_interval(values: np.ndarray) -> Interval:
    """values [N]"""
    picks = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return Interval(float(np.median(values)), float(low), float(high))


def describe_work(sampler: GatedSampler, config: Seq2SeqConfig) -> dict:
    """What a step has to do, on average over a window: tokens and FLOPs without pads."""
    batches = sampler.batches[:WINDOW]
    sides = (sampler.source_lengths, sampler.target_lengths)
    source, target = (sum(int(side[rows].sum()) for rows in batches) for side in sides)
    padded = sum(len(rows) * int(side[rows].max()) for rows in batches for side in sides)
    pairs = [(int(sides[0][row]), int(sides[1][row])) for rows in batches for row in rows]
    flops = 3 * sum(count_flops(config, *pair) for pair in pairs)
    return {
        "source_tokens": source / WINDOW,
        "target_tokens": target / WINDOW,
        "padding_share": round(1 - (source + target) / padded, 4),
        "flops": flops / WINDOW,
    }


def take_turns(names: list[str], serve: dict, turns: int, bar) -> dict[str, dict]:
    """Time arms in turn, each order and then its reverse. Returns name -> its answers [turns], after
    comparing their losses over a first window that warms up."""
    first = {}
    for name in names:
        first[name] = serve[name](True)
        bar.update()
    (_, expected), *_ = first[names[0]]["points"]
    for name in names:
        # Bit for bit where it can be: compiled code and GPUs add in another order.
        exact = name != "compiled" and not torch.cuda.is_available()
        (_, loss), *_ = first[name]["points"]
        if abs(loss - expected) > (0 if exact else 1e-2 * expected):
            raise InputError(
                f"{ARMS[name].label!r} trains differently (a loss of {loss} where "
                f"{ARMS[names[0]].label!r} has {expected}); nothing was timed"
            )
    found = {name: {"warm_up": first[name]["seconds"], "answers": []} for name in names}
    for turn in range(turns):
        for name in names if turn % 2 == 0 else reversed(names):
            found[name]["answers"].append(serve[name](True))
            bar.update()
    return found


def bench(config: BenchConfig) -> int:
    """Group by group of arms and size by size; then the table, the figures and the picture."""

    check_reports(config, "json", "picture", "profile")
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    use_tensor_cores(device)
    sizes = SIZES["cuda" if device.type == "cuda" else "cpu"]
    middle = list(sizes)[1]
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            size: TrainConfig(
                **changes,
                max_epochs=1,
                precision=precision,
                num_samples=max(6400, 25 * changes.get("batch_size", 64)),
                mlruns=f"{folder}/mlruns",
            )
            for size, changes in sizes.items()
        }
        prepared = prepare_data(settings[middle])
        if config.profile:
            path = Path(config.profile).expanduser()
            profile_steps(settings[middle], prepared, device, path)
            say("profile", f"ten steps of the raw loop, {middle} size: {path}")
            return 0
        plan = [(middle, group) for group in GROUPS[: 1 if config.quick else None]]
        if not config.quick:
            plan += [(size, GROUPS[0]) for size in sizes if size != middle]
        has_modlee = find_spec("modlee") is not None
        left_out = {}
        if not has_modlee:
            left_out["modlee"] = "not installed"
            plan = [
                (size, [name for name in group if ARMS[name].modlee is None])
                for size, group in plan
            ]
            plan = [(size, group) for size, group in plan if len(group) > 1]
        data.hub_reachable()  # or Modlee would try for minutes
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        peak = machine_rates(device, dtype[precision])[0]
        turns = config.turns or (4 if config.quick else 12)
        report = {
            **describe_bench(device),
            "precision": precision,
            "matmul_gflops": round(peak / 1e9, 1),
            "steps_per_turn": WINDOW,
            "turns": turns,
            "sizes": {},
            "left_out": left_out,
        }
        rows = []
        total = sum((turns + 1) * len(group) for _, group in plan)
        with tqdm(desc="bench", total=total, unit="turn", disable=None) as bar:
            for size, group in plan:
                common = (settings[size], prepared, config.device)
                jobs = {name: (ARMS[name], *common, False) for name in group}
                with serving(serve_arm, jobs) as serve:
                    for name in list(group):
                        if reason := serve[name]():
                            left_out[name] = reason
                            del serve[name]
                    found = take_turns(list(serve), serve, turns, bar)
                if not rows:
                    parts = found["raw"]["answers"]
                model, loaders, _ = bench_case(settings[size], prepared, device)
                work = describe_work(loaders[0].batch_sampler, model.config)
                report["sizes"][size] = {
                    "model": dataclasses.asdict(model.config),
                    **work,
                }
                rows += describe_arms(size, found, work, peak, device)
        if device.type != "cpu":  # where the arms never wait between parts
            apart = (ARMS["raw"], settings[middle], prepared, config.device, True)
            with serving(serve_arm, {"apart": apart}) as serve:
                serve["apart"]()
                parts = [serve["apart"](True) for _ in range(4)][1:]
        report["breakdown"] = describe_breakdown(parts)
        report["start"] = {}
        if has_modlee and not config.quick:
            common = (settings[middle], prepared, config.device)
            for name, stock in (("ours", False), ("stock", True)):
                with serving(serve_start, {name: (stock, *common)}) as serve:
                    report["start"][name] = serve[name]()
    report["rows"] = rows
    report["sum"] = describe_sum(rows, middle)
    print_bench(report)
    picture = Path(config.picture).expanduser()
    draw_bench(picture, report, middle)
    say("picture", f"{picture}")
    if config.json:
        write_json(Path(config.json).expanduser(), report)
    return 0


def describe_arms(
    size: str, found: dict, work: dict, peak: float, device: torch.device
) -> list[dict]:
    """The figures of a group: each arm beside the first, or beside the one that ITEMS names."""

    def windows(name: str, figure: Callable[[dict], float]) -> np.ndarray:
        values = [figure(answer) for answer in found[name]["answers"]]
        return np.array(values)

    def whole(answer: dict) -> float:
        return answer["seconds"]

    first = next(iter(found))
    rows = []
    for name, arm in found.items():
        base = ITEMS.get(name, first)
        if base not in found or (name == first != "raw"):
            continue  # only there for others to be compared to
        seconds, base_seconds = (
            float(np.median(windows(arm, whole))) / WINDOW for arm in (name, base)
        )
        # On a CPU one thing happens after the other, so a step splits into parts that all arms
        # share and the loop around them. The shared ones make most of the noise.
        figures = {"whole": whole}
        if device.type == "cpu" and name != "compiled":
            figures["loop"] = outside
        differences = {
            kind: paired_difference(windows(name, figure), windows(base, figure))
            for kind, figure in figures.items()
        }
        peaks = [answer["peak"] for answer in arm["answers"] if answer["peak"]]
        row = {
            "size": size,
            "arm": name,
            "label": ARMS[name].label,
            "beside": base,
            "ms": seconds * 1e3,
            "beside_ms": base_seconds * 1e3,
            "more_ms": {kind: [v * 1e3 for v in d] for kind, d in differences.items()},
            "source_tokens_per_second": work["source_tokens"] / seconds,
            "target_tokens_per_second": work["target_tokens"] / seconds,
            "gflops": work["flops"] / seconds / 1e9,
            "mfu": work["flops"] / seconds / peak,
            "peak_mib": max(peaks) / 2**20 if peaks else None,
            "warm_up_seconds": arm["warm_up"],
            "window_seconds": windows(name, whole).tolist(),
        }
        if device.type == "cuda":
            for kind in ("device", "enqueue"):
                values = [answer[f"{kind}_seconds"] for answer in arm["answers"]]
                row[f"{kind}_ms"] = float(np.median(values)) / WINDOW * 1e3
        rows.append(row)
    return rows


def describe_breakdown(answers: list[dict]) -> dict[str, float]:
    """Milliseconds of a step that each part of the raw loop takes."""
    parts = {
        name: float(np.median([answer["parts"][name] for answer in answers]))
        for name in answers[0]["parts"]
    }
    parts["the loop"] = float(np.median([outside(answer) for answer in answers]))
    return {name: seconds / WINDOW * 1e3 for name, seconds in parts.items()}


def best_difference(row: dict) -> list[float]:
    """What an arm costs more, ms (value, low, high): outside the shared parts where that is known."""
    return row["more_ms"].get("loop", row["more_ms"]["whole"])


def describe_sum(rows: list[dict], size: str) -> dict | None:
    """Whether the single costs add up to that of everything at once, in ms per step."""
    found = {row["arm"]: best_difference(row) for row in rows if row["size"] == size}
    if "everything" not in found:
        return None
    parts = [found[name] for name in ("off", *ITEMS)]
    half = math.sqrt(sum(((high - low) / 2) ** 2 for _, low, high in parts))
    total = sum(value for value, _, _ in parts)
    together = found["everything"]
    return {"parts": [total, total - half, total + half], "together": together}


def print_bench(report: dict) -> None:
    say("machine", f"{report['machine']}, {report['precision']}")
    peak = f"{report['matmul_gflops']:,.0f} GFLOP/s"
    say("peak", f"{peak}, the rate of a large matmul in that precision")
    for what, reason in report["left_out"].items():
        say("left out", f"{what}: {reason}")
    for size, about in report["sizes"].items():
        rows = [row for row in report["rows"] if row["size"] == size]
        model = about["model"]
        print(
            f"\n{size}: {model['d_model']} wide, {model['num_encoder_layers']}+"
            f"{model['num_decoder_layers']} layers; a step: {about['source_tokens']:.0f} "
            f"source and {about['target_tokens']:.0f} target tokens, "
            f"{about['padding_share']:.1%} padding, {about['flops'] / 1e9:.1f} GFLOP"
        )
        print(
            f"{'':34}{'ms a step':>9}  src tok/s  tgt tok/s  GFLOP/s   MFU  peak MiB"
            f"  first {WINDOW} steps"
        )
        for row in rows:
            if row["arm"] not in ITEMS:
                print(
                    f"  {row['label']:32}{row['ms']:9.2f}"
                    f"  {row['source_tokens_per_second']:9,.0f}"
                    f"  {row['target_tokens_per_second']:9,.0f}"
                    f"  {row['gflops']:7.0f}  {row['mfu']:4.0%}"
                    f"  {row['peak_mib'] or 0:8.0f}  {row['warm_up_seconds']:.1f} s"
                )
                if "device_ms" in row:
                    times = row["device_ms"], row["enqueue_ms"]
                    print("{:34}device {:.2f} ms, enqueued in {:.2f} ms".format("", *times))
        print(
            f"{'costs more, ms a step (95 %)':34}{'whole step':24}    share  "
            f"{'outside the model':24}    share  beside"
        )
        for row in rows:
            if row["beside"] == row["arm"]:
                continue
            cells = [
                f"{say_interval(values)}  {values[0] / row['beside_ms']:7.2%}"
                for values in row["more_ms"].values()
            ]
            print(f"  {row['label']:32}{'  '.join(cells)}  {ARMS[row['beside']].label}")
    if report["sum"]:
        print(f"\n{'all off, and each thing: the sum':34}{say_interval(report['sum']['parts'])}")
        print(f"{'all at once':34}{say_interval(report['sum']['together'])}")
    parts = ", ".join(f"{name} {ms:.2f}" for name, ms in report["breakdown"].items())
    print(f"\na step of the raw loop, ms: {parts}")
    if report["start"]:
        print(f"\n{'Modlee before the first step, s':34}{'here':>8}    as it comes")
        for name in report["start"]["stock"] | report["start"]["ours"]:
            ours, stock = (say_start(report["start"][kind].get(name)) for kind in ("ours", "stock"))
            print(f"  {name:32}{ours:>8}    {stock}")
    print()
    widths = [
        (high - low) / 2 / row["beside_ms"]
        for row in report["rows"]
        for _, low, high in [row["more_ms"]["whole"]]
        if row["ms"] >= 50
    ]
    if widths and max(widths) > 0.01:
        say(
            "noise",
            f"the machine was too noisy for whole steps: intervals up to ±{max(widths):.1%}",
        )


def say_interval(values: list[float]) -> str:
    value, low, high = values
    return f"{value:7.3f} ({low:7.3f} to {high:7.3f})"


def say_start(found: tuple[float, str] | None) -> str:
    if found is None:
        return "-"
    seconds, trouble = found
    return f"{seconds:.2f}" + (f"  fails: {trouble}" if trouble else "")


def draw_bench(path: Path, report: dict, middle: str) -> None:
    """Left: what each thing costs per step, with its interval. Right: the same for three sizes."""
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if row["arm"] not in ("raw", "compiled")]
    items = [row for row in rows if row["size"] == middle]
    items.sort(key=lambda row: list(ARMS).index(row["arm"]), reverse=True)
    raw = next(row for row in report["rows"] if row["size"] == middle and row["arm"] == "raw")
    figure = Figure(figsize=(12, 1.6 + 0.34 * max(len(items), 8)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    colours = {"raw": "tab:blue", "off": "tab:orange", "autolog": "tab:green"}
    for place, row in enumerate(items):
        value, low, high = best_difference(row)
        error = [[value - low], [high - value]]
        left.barh(place, value, color=colours[row["beside"]], alpha=0.6)
        left.errorbar(value, place, xerr=error, color="black", capsize=3)
    left.set_yticks(range(len(items)), [row["label"] for row in items])
    left.axvline(0, color="black", linewidth=0.8)
    where = " outside the model" if "loop" in raw["more_ms"] else ""
    left.set_xlabel(f"ms more per step{where}")
    left.set_title(f"itemised: {middle} size, a step of the raw loop takes {raw['ms']:.1f} ms")
    share = left.secondary_xaxis(
        "top",
        functions=(
            lambda ms: ms / raw["ms"] * 100,
            lambda share: share * raw["ms"] / 100,
        ),
    )
    share.set_xlabel("% of a step")
    beside = {"raw": "the raw loop", "off": "Lightning, all switched off"}
    beside["autolog"] = "mlflow autolog"
    for name in dict.fromkeys(row["beside"] for row in reversed(items)):
        left.barh(0, 0, color=colours[name], alpha=0.6, label=f"beside {beside[name]}")
    left.legend(loc="lower right", fontsize=8)
    sizes = list(report["sizes"])
    sizes.sort(key=lambda size: report["sizes"][size]["flops"])
    raws = {}
    for row in report["rows"]:
        if row["arm"] == "raw":
            raws.setdefault(row["size"], row["ms"])
    for name in GROUPS[0][1:]:
        points = [
            row for size in sizes for row in rows if row["arm"] == name and row["size"] == size
        ]
        if points:
            values, lows, highs = zip(*(best_difference(row) for row in points))
            errors = [np.subtract(values, lows), np.subtract(highs, values)]
            times = [raws[row["size"]] for row in points]
            right.errorbar(times, values, errors, marker="o", capsize=3, label=ARMS[name].label)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xscale("log")
    right.set_xticks(
        [raws[size] for size in sizes],
        [f"{size}\n{raws[size]:.0f} ms" for size in sizes],
    )
    right.minorticks_off()
    right.set_xlabel("a step of the raw loop")
    right.set_ylabel(f"ms more per step{where}")
    right.set_title("by size of the model")
    right.legend(fontsize=8)
    found = report["versions"]
    figure.suptitle(
        f"What Lightning costs: {report['machine']}, {report['precision']}, torch "
        f"{found['torch']}, lightning {found['lightning']}, modlee {found['modlee'] or 'absent'}"
        "\nmedians with bootstrapped 95 % intervals of paired differences",
        fontsize=10,
    )
    write_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


# ---- bench train: training throughput -----------------------------------------------------------

MODEL_SIZES = {"demo": {}, "wide": WIDE, "tutorial": PAPER_BASE, "widest": WIDEST}
TUTORIAL_LENGTH = 50  # tokens to which the tutorial pads and cuts every sentence


def sinusoids(x: Tensor) -> Tensor:
    """x [B, T, D] -> the position table [T, D] that `nn.Transformer` comes without."""
    return sinusoidal_positional_encoding(x.size(1), x.size(2)).to(x)


def torch_layers(config: Seq2SeqConfig, **more) -> nn.Transformer:
    return nn.Transformer(
        config.d_model,
        config.nhead,
        config.num_encoder_layers,
        config.num_decoder_layers,
        config.dim_feedforward,
        batch_first=True,
        **more,
    )


class TorchTransformer(nn.Module):
    """`nn.Transformer` with what it needs to translate: embeddings, positions, masks, tied output."""

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        self.scale, self.pad_id = math.sqrt(config.d_model), config.pad_id
        self.vocab_size = config.vocab_size
        rows = data.round_up(config.vocab_size, VOCAB_MULTIPLE)
        self.embedding = nn.Embedding(rows, config.d_model, config.pad_id)
        self.dropout = nn.Dropout(config.dropout)
        self.transformer = torch_layers(config, dropout=config.dropout, norm_first=True)

    def embed(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) * self.scale  # [B, T, D]
        return self.dropout(x + sinusoids(x))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        pads = input_ids.eq(self.pad_id)  # here True means "may not attend"
        causal = nn.Transformer.generate_square_subsequent_mask(
            labels.size(1), device=labels.device, dtype=torch.bool
        )
        hidden = self.transformer(
            self.embed(input_ids),
            self.embed(shift_right(labels, self.pad_id)),
            tgt_mask=causal,
            src_key_padding_mask=pads,
            memory_key_padding_mask=pads,
            tgt_is_causal=True,
        )
        logits = nn.functional.linear(hidden, self.embedding.weight)[..., : self.vocab_size]
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=self.pad_id
        )


class TutorialTransformer(nn.Module):
    """The tutorial's model as it was written, but that its batches come first: no masks, a loss over
    pads, the decoder fed with what it is to write."""

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.transformer = torch_layers(config)
        self.output = nn.Linear(config.d_model, config.vocab_size)

    def embed(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)  # [B, T, D]
        return x + sinusoids(x)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.transformer(self.embed(input_ids), self.embed(labels))
        logits = self.output(hidden)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Marian(nn.Module):
    """transformers' Marian: the same layers with norms after the sums."""

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        from transformers import MarianConfig, MarianMTModel

        rows = data.round_up(config.vocab_size, VOCAB_MULTIPLE)
        settings = MarianConfig(**transformers_settings(config, rows), use_cache=False)
        try:
            settings._attn_implementation = "sdpa"
            self.model = MarianMTModel(settings)
        except ValueError:  # before transformers 4.5x Marian has no such attention
            settings._attn_implementation = "eager"
            self.model = MarianMTModel(settings)
        self.pad_id = config.pad_id

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        found = self.model(
            input_ids=input_ids,
            attention_mask=input_ids.ne(self.pad_id),
            decoder_input_ids=shift_right(labels, self.pad_id),
            labels=labels.masked_fill(labels.eq(self.pad_id), -100),
        )
        return found.loss


class XTransformer(nn.Module):
    """x-transformers' encoder-decoder with its flash attention."""

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        from x_transformers import XTransformer as Library

        sides = {}
        for side, layers in (
            ("enc", config.num_encoder_layers),
            ("dec", config.num_decoder_layers),
        ):
            sides |= {
                f"{side}_num_tokens": data.round_up(config.vocab_size, VOCAB_MULTIPLE),
                f"{side}_depth": layers,
                f"{side}_heads": config.nhead,
                f"{side}_attn_dim_head": config.d_model // config.nhead,
                f"{side}_max_seq_len": 1024,
                f"{side}_ff_mult": config.dim_feedforward // config.d_model,
                f"{side}_ff_dropout": config.dropout,
                f"{side}_attn_flash": True,
            }
        self.pad_id = config.pad_id
        self.model = Library(dim=config.d_model, tie_token_emb=True, **sides)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        start = torch.full_like(labels[:, :1], self.pad_id)
        target = torch.cat([start, labels], dim=1)
        target = target.masked_fill(target.eq(self.pad_id), -100)
        target[:, 0] = self.pad_id  # read, never predicted
        return self.model(input_ids, target, mask=input_ids.ne(self.pad_id))


class Ours(TransformerSeq2SeqModel):
    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        loss_sum, tokens = super().forward(input_ids, labels=labels)
        return loss_sum / tokens


@dataclass(frozen=True)
class Trainee:
    """A model in `bench train` and what its batches are: "buckets" (ours), "longest" (shuffled pairs,
    as many, padded to the longest) or "fixed" (the tutorial's, to 50 tokens)."""

    label: str
    build: type
    batches: str
    compile: bool = False


TRAINEES = {
    "ours": Trainee("ours", Ours, "buckets"),
    "compiled": Trainee("ours, --compile", Ours, "buckets", True),
    "tutorial": Trainee("the tutorial as written", TutorialTransformer, "fixed"),
    "torch": Trainee("nn.Transformer", TorchTransformer, "longest"),
    "torch-buckets": Trainee("nn.Transformer, our batches", TorchTransformer, "buckets"),
    "marian": Trainee("transformers Marian", Marian, "longest"),
    "marian-buckets": Trainee("transformers Marian, our batches", Marian, "buckets"),
    "x": Trainee("x-transformers", XTransformer, "longest"),
    "x-buckets": Trainee("x-transformers, our batches", XTransformer, "buckets"),
}


def same_scale(model: nn.Module, width: int) -> None:
    """Start every model alike: Glorot-uniform matrices, embeddings with deviation 1 / sqrt(D)."""
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    for parameter in model.parameters():
        if not parameter.requires_grad:  # Marian's table of positions
            continue
        if any(parameter is weight for weight in embeddings):
            nn.init.normal_(parameter, std=width**-0.5)
        elif parameter.dim() == 2:
            nn.init.xavier_uniform_(parameter)


def serve_trainee(
    trainee: Trainee,
    config: Seq2SeqConfig,
    batches: list[tuple[Tensor, Tensor]],
    device_name: str,
    precision: str,
    pipe,
) -> None:
    """Answers, whenever asked, what a turn over the batches took; first of all None, or why this
    trainee is left out."""

    warnings.filterwarnings("ignore", "enable_nested_tensor")  # of nn.Transformer
    device = choose_device(device_name)
    use_tensor_cores(device)
    torch.manual_seed(0)
    try:
        if trainee.build is Ours:
            model = Ours(**dataclasses.asdict(config))
        else:
            model = trainee.build(config)
    except ImportError as error:
        pipe.send(f"not installed ({error})")
        return
    same_scale(model, config.d_model)
    model.to(device).train()
    if trainee.compile and not compile_model(model):
        pipe.send("nothing can compile here")
        return
    optimizer = build_optimizer(model, TrainConfig(learning_rate=1e-4))
    in_precision = autocast(device, precision)
    batches = [[ids.to(device) for ids in batch] for batch in batches]
    pipe.send(None)
    while pipe.recv():
        memory_peak(device, reset=True)
        started, losses = time.perf_counter(), []
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            with in_precision:
                loss = model(*batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        synchronize(device)
        seconds = time.perf_counter() - started
        pipe.send(
            {
                "seconds": seconds,
                "memory": memory_peak(device),
                "loss": torch.stack(losses).mean().item(),
                "graphs": count_graphs(),
            }
        )


def trainee_batches(
    dataset: data.PairDataset, kind: str, budget: int, steps: int, multiple: int
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[int, int]]]:
    """`steps` batches of a kind (see Trainee) that stand for an epoch, and the lengths of the pairs
    in them."""
    sampler = data.BucketBatchSampler(*dataset.lengths, batch_tokens=budget, multiple=multiple)
    if kind == "buckets":  # from short to long, each for an equal share of the tokens
        order = sorted(sampler.batches, key=lambda rows: dataset.lengths[1][rows].mean())
        middles = (np.arange(steps) + 0.5) / steps
        chosen = [order[int(middle * len(order))] for middle in middles]
    else:
        size = max(1, len(dataset) // len(sampler))
        size = max(1, budget // TUTORIAL_LENGTH) if kind == "fixed" else size
        rows = np.random.default_rng(0).permutation(len(dataset))
        chosen = [rows[i * size : (i + 1) * size] for i in range(steps)]
    limit = TUTORIAL_LENGTH if kind == "fixed" else None
    pairs = [[tuple(ids[:limit] for ids in dataset[row]) for row in rows] for rows in chosen]
    lengths = [(len(source), len(target)) for rows in pairs for source, target in rows]
    if kind == "fixed":
        batches = [data.pad_batch(rows, 0, TUTORIAL_LENGTH) for rows in pairs]
    else:
        batches = [data.pad_batch(rows, 0, multiple) for rows in pairs]
    return batches, lengths


def describe_trainee(
    label: str, answers: list[dict], batches: list, lengths: list, config, peak: float
) -> dict:
    """The figures of a row; medians over the turns."""
    tokens = sum(map(sum, lengths))
    padded = sum(ids.numel() for batch in batches for ids in batch)
    flops = 3 * sum(count_flops(config, *pair) for pair in lengths)
    seconds = float(np.median([answer["seconds"] for answer in answers]))
    memory = [answer["memory"] for answer in answers if answer["memory"]]
    return {
        "label": label,
        "tokens_per_second": round(tokens / seconds, 1),
        "step_ms": round(1e3 * seconds / len(batches), 1),
        "tokens_per_step": round(tokens / len(batches), 1),
        "padding_share": round(1 - tokens / padded, 4),
        "memory_mib": round(max(memory) / 2**20) if memory else None,
        "mfu": round(flops / seconds / peak, 4),
        "graphs": answers[-1]["graphs"],
        "turn_seconds": [round(answer["seconds"], 4) for answer in answers],
    }


def compare_trainees(answers: list[dict], tokens: int, our_tokens: int) -> list[float]:
    """How many times as long a real token takes as with ours in the same turn."""
    seconds = np.array([answer["seconds"] for answer in answers]) / tokens
    ours = np.array([answer["ours"]["seconds"] for answer in answers]) / our_tokens
    return [round(value, 3) for value in median_interval(seconds / ours)]


def bench_train(config: BenchTrainConfig) -> int:
    """Everything in turn, turn by turn, each in a process of its own."""

    flags = ("json",) if config.peers else ("json", "picture")
    check_reports(config, *flags)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    budget = config.batch_tokens or (25_000 if device.type == "cuda" else 2048)
    settings = TrainConfig(
        dataset=config.dataset, tokenizer=config.tokenizer, max_length=config.max_length
    )
    prepared = prepare_data(settings)
    multiple = 8 if device.type == "cuda" else 1
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if config.peers:
        cases = peer_cases(config, prepared, budget, multiple)
    else:
        cases = growth_cases(config, prepared, budget, multiple, device)
    jobs = {
        name: (trainee, model, batches, config.device, precision)
        for name, (trainee, model, batches, _) in cases.items()
    }
    # Few at a time, which need not share the memory and are close in time; ours is always there.
    if config.peers:
        groups = [[name for name in cases if cases[name][0].build is Ours]]
        for build in dict.fromkeys(cases[name][0].build for name in cases):
            if build is not Ours:
                group = [name for name in cases if cases[name][0].build is build]
                groups.append(["ours", *group])
        groups = [group for group in groups if len(group) > 1]
    else:
        groups = [[name] for name in cases]
    found, left_out = {name: [] for name in cases}, {}
    peak = 0.0  # the best that the machine did at any time, or a slow moment would flatter all
    total = (config.turns + 1) * sum(map(len, groups))
    with tqdm(desc="bench train", total=total, unit="turn", disable=None) as bar:
        for group in groups:
            peak = max(peak, machine_rates(device, dtype)[0])
            with serving(serve_trainee, {name: jobs[name] for name in group}) as serve:
                for name in group:
                    if reason := serve[name]():
                        left_out[name] = reason
                        del serve[name]
                for turn in range(config.turns + 1):
                    answers = {}
                    for name in serve if turn % 2 else reversed(list(serve)):
                        answers[name] = serve[name](True)
                        bar.update()
                    for name in serve if turn else ():  # the first one warms up
                        beside = answers.get("ours")
                        found[name].append(answers[name] | {"ours": beside})
    rows = {}
    for name, answers in found.items():
        if answers:
            trainee, model, batches, lengths = cases[name]
            rows[name] = describe_trainee(trainee.label, answers, batches, lengths, model, peak)
            if config.peers:
                rows[name]["ours_is_faster"] = compare_trainees(
                    answers, sum(map(sum, lengths)), sum(map(sum, cases["ours"][3]))
                )
    report = {
        **describe_bench(device),
        "precision": precision,
        "matmul_gflops": round(peak / 1e9, 1),
        "size": config.size,
        "batch_tokens": budget,
        "rows": rows,
        "left_out": left_out,
    }
    print_bench_train(report)
    if not config.peers:
        picture = Path(config.picture).expanduser()
        draw_growth(picture, report)
        say("picture", f"{picture}")
    if config.json:
        write_json(Path(config.json).expanduser(), report)
    return 0


def model_config(size: str, vocab_size: int) -> Seq2SeqConfig:
    """One of MODEL_SIZES."""
    chosen = choose_model(
        TrainConfig(**{k: v for k, v in MODEL_SIZES[size].items() if k != "batch_size"})
    )
    return dataclasses.replace(chosen, vocab_size=vocab_size, max_length=1024)


def peer_cases(config: BenchTrainConfig, prepared: Data, budget: int, multiple: int) -> dict:
    """name -> (trainee, its model, its batches, the lengths in them)."""
    model = model_config(config.size, len(prepared.tokenizer))
    wanted = [name for name in TRAINEES if name != "compiled" or config.compile]
    return {
        name: (
            TRAINEES[name],
            model,
            *trainee_batches(
                prepared.train, TRAINEES[name].batches, budget, config.steps, multiple
            ),
        )
        for name in wanted
    }


def growth_cases(
    config: BenchTrainConfig, prepared: Data, budget: int, multiple: int, device
) -> dict:
    """One thing changes at a time: the budget, the length of all sentences, the model."""
    vocab_size, cases = len(prepared.tokenizer), {}
    model = model_config(config.size, vocab_size)
    for factor in (0.125, 0.25, 0.5, 1, 2, 4):
        tokens = int(budget * factor)
        found = trainee_batches(prepared.train, "buckets", tokens, config.steps, multiple)
        cases[f"budget {tokens}"] = (TRAINEES["ours"], model, *found)
    for length in (8, 16, 32, 64, 128, 256):
        count = max(1, budget // length)
        ids = torch.arange(count * length).view(count, length) % (vocab_size - 2) + 2
        pair = (ids, ids.flip(0))
        lengths = [(length, length)] * count
        cases[f"length {length}"] = (TRAINEES["ours"], model, [pair], lengths)
    sizes = list(MODEL_SIZES) if device.type == "cuda" else list(MODEL_SIZES)[:3]
    for size in sizes:
        found = trainee_batches(prepared.train, "buckets", budget, config.steps, multiple)
        cases[f"size {size}"] = (
            TRAINEES["ours"],
            model_config(size, vocab_size),
            *found,
        )
    return cases


def print_bench_train(report: dict) -> None:
    """The table; ratios before rates, because the machine decides the rates."""
    head = f"{report['machine']}, {report['precision']}, {report['size']} size, "
    head += f"{report['batch_tokens']:,} tokens per batch; "
    print(f"\n{head}matmul {report['matmul_gflops']:,.0f} GFLOP/s\n")
    with_ratio = any("ours_is_faster" in row for row in report["rows"].values())
    columns = ["", "real tokens/s", "ms per step", "pads", "memory MiB", "MFU"]
    lines = [columns + ["ours is faster by"] * with_ratio]
    for name, row in report["rows"].items():
        label = row["label"] if with_ratio else name
        if row["graphs"]:
            label += f" ({row['graphs']} graphs)"
        line = [
            label,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['step_ms']:,.0f}",
            f"{row['padding_share']:.1%}",
            f"{row['memory_mib']:,}" if row["memory_mib"] else "",
            f"{row['mfu']:.0%}",
        ]
        if with_ratio:
            value, low, high = row["ours_is_faster"]
            line.append("" if name == "ours" else f"{value:.2f} ({low:.2f}-{high:.2f})")
        lines.append(line)
    print_table(lines)
    print("pads: of all places in the batches; ours computes them in attention alone")
    for name, reason in report["left_out"].items():
        print(f"left out: {TRAINEES[name].label}: {reason}")


def draw_growth(path: Path, report: dict) -> None:
    """Tokens per second and memory over budget, length and size."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(10, 5.2), layout="constrained")
    titles = {
        "budget": "tokens per batch",
        "length": "tokens per sentence, all alike",
        "size": "model",
    }
    axes = figure.subplots(2, 3, sharey="row", sharex="col")
    for column, (kind, title) in enumerate(titles.items()):
        found = {
            name.split()[1]: row for name, row in report["rows"].items() if name.startswith(kind)
        }
        x = list(found)
        speeds = [row["tokens_per_second"] for row in found.values()]
        memory = [row["memory_mib"] or math.nan for row in found.values()]
        turns = [np.array(row["turn_seconds"]) for row in found.values()]
        # The fastest and the slowest turn, beside the median.
        fastest = [np.median(turn) / turn.min() - 1 for turn in turns] * np.array(speeds)
        slowest = [1 - np.median(turn) / turn.max() for turn in turns] * np.array(speeds)
        axes[0][column].errorbar(
            x, speeds, (slowest, fastest), marker="o", capsize=3, color="#1f5a96"
        )
        axes[1][column].plot(x, memory, marker="o", color="#b3541e")
        axes[1][column].set_xlabel(title)
        for axis in axes[:, column]:
            axis.grid(alpha=0.3, which="both")
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:,.0f}")
            axis.yaxis.set_minor_formatter(NullFormatter())
    axes[0][0].set_ylabel("real tokens per second")
    axes[1][0].set_ylabel("peak memory, MiB")
    figure.suptitle(
        f"Training, {report['size']} size unless said: {report['machine']}, {report['precision']}",
        fontsize=10,
    )
    write_file(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


# ---- commands ---------------------------------------------------------------------------------


def say(topic: str, text: str) -> None:
    print(f"{topic:<10} {text}", flush=True)


def train(config: TrainConfig) -> int:
    """Prepare data, train, save, evaluate. Returns the exit code."""

    # First all that can be refused at once, before data is read for minutes.
    named = config.output is not None
    output = Path(config.output or f"runs/{datetime.now():%Y%m%d-%H%M%S}-{config.preset}")
    output = output.expanduser()
    check_output(output, replaceable=config.resume is not None)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    # Under torchrun it decides how many there are; the settings of the run say so.
    world = int(os.environ.get("WORLD_SIZE", config.devices))
    if config.devices not in (1, world):
        raise InputError(f"--devices {config.devices}, but torchrun has started {world}")
    if config.resume is not None and config.devices != world:
        raise InputError(
            f"the run was of {config.devices} process, but torchrun has started {world}"
        )
    config = dataclasses.replace(config, precision=precision, output=str(output), devices=world)
    check_together(config, device)
    checkpoints = checkpoint_folder(config)
    check_push(config)
    choose_model(config)
    if world > 1 and "WORLD_SIZE" not in os.environ:
        return start_processes(world)
    rank, device = join_processes(device)

    use_tensor_cores(device)
    with first_before_others(rank, world):
        prepared = prepare_data(config)
    model = build_model(config, prepared.tokenizer).to(device)
    loaders = build_loaders(config, prepared, model.config.pad_id, device, rank)
    metrics = describe_run(config, prepared, model, loaders[0], device)
    if not named:
        output = claim_name(output, rank, world)
        config = dataclasses.replace(config, output=str(output))
        checkpoints = checkpoint_folder(config)
    digest = f"{digest_pairs(prepared.train)} {digest_pairs(prepared.validation)}"
    interval = config.checkpoint_interval()
    wanted = interval != (math.inf, math.inf)
    save = partial(write_checkpoint, checkpoints, config, digest, rank)
    monitor = Monitor(config, checkpoints, prepared) if rank == 0 else None
    progress = Progress(
        config.precision == "fp16",
        save if wanted else None,
        interval,
        config.on_oom,
        partial(write_best, checkpoints, rank),
        monitor,
    )
    progress.places = prepared.train.places
    if config.resume is None:
        (checkpoints / "best.pt").unlink(missing_ok=True)  # of a run that was killed
    else:
        state = read_checkpoint(checkpoints, digest)
        model.load_state_dict(state.pop("model"))
        progress.load(state)
        loaders[0].batch_sampler.start = (progress.epoch, progress.batch)
        say("resumed", f"after step {progress.step} of {config.output}")
    with monitor.recording(progress) if monitor else contextlib.nullcontext():
        with noticing_lost_processes(progress), progress.interruptible():
            model, record = fit(model, loaders, config, prepared, progress, rank)
            progress.flush()
            if rank > 0:
                return progress.exit_code
            monitor.update(progress)
            batches = len(loaders[0])
            metrics |= describe_training(progress, record, prepared, batches, config)
            # Before it is scored: an interrupted evaluation loses no training. Until then the
            # folder counts as that of an interrupted run, which `--resume` may replace.
            best = best_weights(checkpoints, progress, device)
            if best is not None:
                metrics |= {"val_loss": progress.best[0], "best_step": progress.best[1]}
            unscored = metrics | {"interrupted": True}
            tokenizer = prepared.tokenizer
            with progress.averaged():
                parts = {"validation": prepared.validation_pairs, "test": prepared.test_pairs}
                parts = {name: pairs for name, pairs in parts.items() if pairs}
                save_model(output, model, tokenizer, config, unscored, progress, best, parts)
        if progress.stop:
            monitor.keep(output, metrics)
            if not wanted and config.resume is None:
                shutil.rmtree(checkpoints, ignore_errors=True)
            say("stopped", f"after step {progress.step}; its weights are in {output}")
            if any(checkpoints.glob("step-*.pt")):
                place = shlex.quote(str(checkpoints))
                print(f"\nnext:  python run.py --resume {place}")
            return progress.exit_code
        say_trained(progress, config, metrics)
        place = shlex.quote(str(output))
        evaluation = f"python run.py evaluate --model {place} --dataset unseen.tsv"
        try:
            with progress.averaged():
                score_model(model, prepared, config, metrics)
        except Interrupted:
            print(
                f"the model is complete, its score is not: {evaluation}",
                file=sys.stderr,
            )
            raise
        write_json(output / "metrics.json", metrics)
        monitor.keep(output, metrics)
    shutil.rmtree(checkpoints, ignore_errors=True)
    if record:
        say("modlee", f"took {record.seconds:.1f} s and recorded {record.run_path}")
        say("artifacts", ", ".join(record.artifacts))
    say("saved", f"{output}")
    print(f"\nnext:  python run.py translate --model {place} 'The teacher sees you.'")
    print(f"       {evaluation}")
    return 0


def claim_name(output: Path, rank: int, world: int) -> Path:
    """`output`, with a number behind it where a run that started in the same second has it; claimed
    by making its folder of checkpoints, and the same for all processes."""
    names, number = [output], 1
    while rank == 0:
        try:
            Path(f"{names[0]}.checkpoints").mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
            names = [Path(f"{output}-{number}")]
    if world > 1:
        from torch import distributed

        distributed.broadcast_object_list(names)
    return names[0]


def build_loaders(config: TrainConfig, prepared: Data, pad_id: int, device, rank: int) -> list:
    """Of training and of validation batches, for one of the processes."""
    # Tensor cores and compilers like round numbers; learned positions have no row to spare.
    rounds = device.type == "cuda" or config.compile
    multiple = 8 if rounds and config.positional != "learned" else 1
    return [
        data.make_loader(
            part,
            config.batch_size,
            pad_id,
            multiple,
            batch_tokens=config.batch_tokens,
            seed=config.seed,
            shuffle=shuffle,
            rank=rank,
            world=config.devices,
        )
        for part, shuffle in ((prepared.train, True), (prepared.validation, False))
    ]


def fit(model, loaders, config: TrainConfig, prepared: Data, progress, rank: int):
    """Train with the loop that is asked for. Returns (the model, which FSDP has put together anew,
    Modlee's record or None)."""
    device = next(model.parameters()).device
    if config.loop == "raw":
        say("modlee", "off: the raw loop does without")
        if config.compile:
            compile_model(model)
        train_raw(model, *loaders, config, progress)
        if progress.stop:
            progress.save()
        if graphs := count_graphs():
            say("compiled", f"{graphs} graphs, whatever the shapes of the batches")
        return model, None
    record = None
    if config.strategy == "fsdp":
        say("modlee", "off: it looks at whole models")
    elif rank == 0:
        record = start_modlee(config, prepared)
    base = modlee_base() if record else import_lightning().LightningModule
    adapter = adapter_class(base)(dataclasses.asdict(model.config), model)
    adapter.attach(config, progress)

    def train() -> None:
        train_lightning(adapter, *loaders, config, device)

    record.fit(adapter, train) if record else train()
    if adapter.whole:
        model = TransformerSeq2SeqModel(**dataclasses.asdict(model.config))
        model.load_state_dict(adapter.whole)
    return model.to(device), record  # Lightning takes it to the CPU at the end


def best_weights(folder: Path, progress: Progress, device) -> dict | None:
    """Those of the best validation. None where the last were the best, there are none, or the run
    was stopped, when the last are what it goes on from."""
    loss, step = progress.best
    if progress.stop or step in (0, progress.step):
        return None
    kept = read_state(folder / "best.pt")
    if kept is None or tuple(kept["best"]) != (loss, step):
        print("note: the best weights are lost: the last are kept", file=sys.stderr)
        return None
    return {name: weight.to(device) for name, weight in kept["weights"].items()}


def say_trained(progress: Progress, config: TrainConfig, metrics: dict) -> None:
    say(
        "trained",
        f"{progress.step} steps in {progress.seconds:.0f} s, "
        f"{metrics['tokens_per_second']:,.0f} real tokens/s, "
        f"{metrics['padding_share']:.1%} padding",
    )
    if progress.skipped:
        say("", f"{progress.skipped} steps were skipped: a gradient overflowed fp16")
    if progress.left_out:
        say("", f"{progress.left_out} batches were left out: out of memory")
    if progress.epoch < config.max_epochs:
        say("", "ended early: the validation loss did not improve any more")
    loss, step = metrics["val_loss"], metrics["best_step"]
    which = "" if step == progress.step else f", the best, of step {step}"
    say("loss", f"training {progress.epoch_loss:.4f}, validation {loss:.4f}{which}")


def score_model(model, prepared: Data, config: TrainConfig, metrics: dict) -> None:
    """Translate the test set, or without one the validation pairs, and put the scores into
    `metrics`."""
    pairs = prepared.test_pairs or prepared.validation_pairs
    sources, references = ([pair[side] for pair in pairs] for side in (0, 1))
    options = DecodeOptions(beam=config.beam)
    languages = (config.source_lang, config.target_lang)
    translator = Translator(model, prepared.tokenizer, languages, options)
    hypotheses = translator.first(sources)
    translator.report("pair")
    metrics |= score(hypotheses, references)
    metrics["scored"] = "test" if prepared.test_pairs else "validation"
    search = "greedy" if config.beam == 1 else f"beam {config.beam}"
    say("scored", f"{len(sources):,} {metrics['scored']} pairs, {search}")
    say_score(metrics)
    for triple in list(zip(sources, hypotheses, references))[:SHOWN]:
        print("\n  source       {}\n  translation  {}\n  reference    {}".format(*triple))
    print()


def check_together(config: TrainConfig, device: torch.device) -> None:
    """InputError for settings of which one excludes the other."""
    if config.compile and config.loop != "raw":
        raise InputError("--compile is for --loop raw")
    if config.devices > 1 and config.on_oom == "skip":
        raise InputError("--on-oom skip is for one process: the others would wait")
    if config.strategy == "fsdp" and config.loop == "raw":
        raise InputError("--strategy fsdp is for --loop lightning")
    if config.strategy == "fsdp" and config.average:
        raise InputError("--average is not for --strategy fsdp")
    if config.strategy == "fsdp" and config.devices == 1:
        raise InputError("--strategy fsdp is for several processes: add --devices N")
    for name in ("tensorboard", "mlruns"):
        if getattr(config, name) in (None, "none"):
            continue
        folder = Path(getattr(config, name)).expanduser()
        found = nearest_existing(folder)
        if not found.is_dir():
            raise InputError(f"--{name} {folder}: {found} is a file, not a folder")
    if config.tensorboard is not None and not find_spec("tensorboard"):
        raise InputError("--tensorboard needs the package: pip install tensorboard")
    if config.preset == "small" and config.dataset == (data.PHRASEBOOK,):
        raise InputError("--preset small is for pairs of your own: add --dataset FILE")
    # Older ones look for CUDA when they put the optimizer's parts together.
    is_new = hasattr(torch, "accelerator")
    if config.strategy == "fsdp" and device.type == "cpu" and not is_new:
        raise InputError("--strategy fsdp on a CPU needs torch 2.6 or newer")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", config.devices))
    found = torch.cuda.device_count()
    if device.type == "cuda" and here > found:
        raise InputError(f"{here} processes, but {found} GPUs: lower --devices")


def start_processes(count: int) -> int:
    """Run this program `count` times, as torchrun does, which ends all when one dies. Returns the
    exit code: of the first that failed, or the signal's."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    threads = max(1, torch.get_num_threads() // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)(__file__, *sys.argv[1:])
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)
    return 0


def join_processes(device: torch.device) -> tuple[int, torch.device]:
    """(rank, device) of this process under torchrun; (0, device) without."""
    if "WORLD_SIZE" not in os.environ:
        return 0, device
    from torch import distributed

    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(leave_processes)
    rank = distributed.get_rank()
    if rank > 0:  # the first speaks for all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return rank, device


@contextlib.contextmanager
def first_before_others(rank: int, world: int) -> Iterator[None]:
    """The first process does it while the others wait, and find what it has kept."""
    from torch import distributed

    if rank > 0:
        with noticing_lost_processes():
            distributed.barrier()
    yield
    if rank == 0 and world > 1:
        distributed.barrier()


@contextlib.contextmanager
def noticing_lost_processes(progress: Progress | None = None) -> Iterator[None]:
    """Failed where another process of the run has died, for which each backend has its words."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in (*words, "NCCL")):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it to the others
        last = progress.checkpoint if progress else None
        then = f"python run.py --resume {shlex.quote(str(last.parent))}" if last else "start again"
        raise Failed(
            f"another process of this run has ended; mend what it said, then: {then}"
        ) from None


def leave_processes() -> None:
    from torch import distributed

    if distributed.is_initialized():  # Lightning may have left already
        distributed.destroy_process_group()


def check_push(config: TrainConfig) -> None:
    """InputError where --push could upload nothing."""
    if not config.push:
        return
    if not os.environ.get("MODLEE_API_KEY"):
        raise InputError("--push needs your key in the environment variable MODLEE_API_KEY")
    if config.loop == "raw" or not config.modlee or config.mlruns == "none":
        raise InputError(
            "--push uploads what Modlee records: not with --loop raw, --no-modlee or --mlruns none"
        )


def choose_model(config: TrainConfig) -> Seq2SeqConfig:
    """The model the flags ask for; the tokenizer's sizes are still to be filled in."""
    names = {entry.name for entry in dataclasses.fields(Seq2SeqConfig)}
    given = {name: value for name, value in vars(config).items() if name in names}
    try:
        return Seq2SeqConfig(vocab_size=2, **given)
    except ValueError as error:
        raise InputError(str(error)) from None


def held_out_source(config: TrainConfig, field: str) -> tuple | None:
    """The arguments of `data.read_pairs` for a set of its own; None: pairs are held out. InputError
    where what was asked for by hand is not there."""
    names = getattr(config, field)
    if names is None:
        return None
    if len(names) > 1 or Path(names[0]).suffix.lower() in data.FORMATS:
        return names, None, "train"
    split = names[0]
    on_hub = data.is_on_hub(config.dataset)
    if on_hub and data.has_split(config.dataset[0], config.subset, split):
        return config.dataset, config.subset, split
    what = f"{' '.join(config.dataset)} has no split {split!r}"
    if PRESETS[config.preset].get(field) != names:
        flag = f"--{field.replace('_', '-')}"
        raise InputError(f"{flag}: {what}, and files end in {' '.join(data.FORMATS)}")
    print(f"note: {what}, as the preset has it", file=sys.stderr)
    return None


def prepare_data(config: TrainConfig) -> Data:
    """Pairs, ids and tokenizer."""
    more = ((config.source_lang, config.target_lang), config.columns)
    sets = [held_out_source(config, name) for name in ("validation_set", "test_set")]
    return prepare(
        data.read_pairs(config.dataset, config.subset, config.split, *more),
        config.tokenizer,
        config.max_length,
        config.validation_size,
        config.test_size,
        config.num_samples,
        config.seed,
        *(source and data.read_pairs(*source, *more) for source in sets),
        languages=more[0],
    )


def build_model(config: TrainConfig, tokenizer) -> TransformerSeq2SeqModel:
    """The model the flags ask for, with the weights that follow from the seed."""
    model_config = dataclasses.replace(
        choose_model(config),
        vocab_size=len(tokenizer),
        pad_id=tokenizer.pad_token_id,
        eos_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(config.seed)
    return TransformerSeq2SeqModel(**dataclasses.asdict(model_config))


def describe_run(config, prepared: Data, model: nn.Module, train_loader, device) -> dict:
    """Say what is about to run, and return the same as the first half of metrics.json."""
    train_part, validation_part = prepared.train, prepared.validation
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    metrics = {
        "dataset": list(config.dataset),
        "tokenizer": config.tokenizer,
        "pairs": {
            "train": len(train_part),
            "validation": len(validation_part),
            "test": len(prepared.test_pairs),
        },
        "dropped": prepared.dropped,
        "round_trip_loss_source": prepared.round_trip_loss[0],
        "round_trip_loss_target": prepared.round_trip_loss[1],
        "parameters": parameters,
        "device": name,
        "precision": config.precision,
        "loop": config.loop,
        "padding_share": round(train_loader.batch_sampler.padding_share(), 4),
        "versions": versions(),
    }
    has_subset = config.subset and data.is_on_hub(config.dataset)
    subset = f"/{config.subset} {config.split}" if has_subset else ""
    invented = (
        " (built in and invented: no benchmark)" if config.dataset == (data.PHRASEBOOK,) else ""
    )
    languages = f"{config.source_lang} -> {config.target_lang}"
    say("data", f"{' '.join(config.dataset)}{subset}{invented}, {languages}")
    counts = f"{len(train_part):,} training and {len(validation_part):,} validation pairs"
    say("", f"{counts}{data.describe_dropped(prepared.dropped)}")
    say(
        "tokenizer",
        f"{config.tokenizer}, {len(prepared.tokenizer):,} tokens; {describe_round_trip(metrics)}",
    )
    say("model", f"{parameters / 1e6:.1f} M parameters, {config.positional} positions")
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    say("device", f"{name}{threads}, {config.precision}")
    say(
        "loop",
        f"{config.loop}, {config.max_epochs} epochs of {len(train_loader)} batches",
    )
    return metrics


def describe_training(
    progress: Progress, record, prepared: Data, batches: int, config: TrainConfig
) -> dict:
    """The second half of metrics.json; scores are filled in when there are any."""
    epochs = progress.step / math.ceil(batches / config.accumulate)
    real_tokens = epochs * sum(int(lengths.sum()) for lengths in prepared.train.lengths)
    validation_loss = progress.validation[-1][1] if progress.validation else math.nan
    return {
        "modlee": record is not None,
        "run_path": record and record.run_path,
        "artifacts": record.artifacts if record else [],
        "modlee_seconds": record and round(record.seconds, 2),
        "steps": progress.step,
        "skipped_steps": progress.skipped,
        "interrupted": progress.stop,
        "train_seconds": round(progress.seconds, 2),
        "tokens_per_second": round(real_tokens / max(progress.seconds, 1e-9), 1),
        "train_loss": finite(progress.epoch_loss),
        # Of the weights in the folder; where the run was stopped amid an epoch, of those before.
        "val_loss": finite(validation_loss),
        "best_step": progress.step,  # whose they are
        "last_val_loss": finite(validation_loss),
        "scored": None,
        "bleu": None,
        "chrf": None,
        "signature": None,
    }


def start_modlee(config: TrainConfig, prepared: Data) -> ModleeRecord | None:
    """Import Modlee where it is wanted and installed, and say in one line what its state is."""
    if not config.modlee or config.mlruns == "none":
        say("modlee", f"off ({'--mlruns none' if config.modlee else '--no-modlee'})")
        return None
    started = time.perf_counter()
    try:
        modlee = import_modlee()
    except ImportError as error:
        raise InputError(
            f"Modlee is installed but cannot be imported ({error}); reinstall "
            "requirements.txt, or train with --no-modlee"
        ) from None
    seconds = time.perf_counter() - started
    if modlee is None:
        if config.push:
            raise InputError("--push needs Modlee, which is not installed (Python 3.10 to 3.12)")
        say("modlee", "not installed: training without it")
        return None
    upload = "uploads when done (--push)" if config.push else "keeps everything on this machine"
    say("modlee", f"{versions()['modlee']}, {upload}")
    record = ModleeRecord(modlee, config, prepared)
    record.seconds = seconds
    return record


def finite(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return value if math.isfinite(value) else None


def stdin_lines() -> Iterator[str]:
    """Lines of standard input, decoded strictly and split at line feeds alone."""
    for number, raw in enumerate(sys.stdin.buffer, 1):
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise InputError(f"standard input, line {number}: not valid UTF-8") from None


def translate(config: TranslateConfig) -> int:
    for text in config.text:
        if data.SURROGATE.search(text):
            raise InputError(f"not valid UTF-8: {text!r:.60}")
    check_reports(config, "attention")
    translator = load_translator(config)
    sys.stdout.reconfigure(encoding="utf-8")
    # A person who types waits for each line, a file does not.
    window = 1 if not config.text and sys.stdin.isatty() else 0
    for found in translator(config.text or stdin_lines(), window=window):
        for text, score in found:
            if config.scores:
                text = f"{'' if score is None else format(score, '.4f')}\t{text}"
            print(text, flush=window == 1)
    if config.attention:
        path = Path(config.attention).expanduser()
        draw_attention(path, translator, config.text[0])
    translator.report()
    return 0


def own_test_part(folder: str) -> tuple[str]:
    """What the training of a model held out for the test, or else for validation."""
    for name in ("test.tsv", "validation.tsv"):
        path = Path(folder).expanduser() / name
        if path.is_file():
            return (str(path),)
    raise InputError(f"{folder} has no test part of its own: add --dataset pairs.tsv")


def evaluate(config: EvaluateConfig) -> int:
    check_reports(config, "json", "sentences")
    dataset = config.dataset or own_test_part(config.model)
    if dataset == (data.PHRASEBOOK,):
        raise InputError("the demo trains on the phrasebook; give pairs of your own")
    translator = load_translator(config)
    other = None
    if config.against is not None:
        other = load_translator(dataclasses.replace(config, model=config.against))
        if other.languages != translator.languages:
            raise InputError(f"{config.against} translates other languages")
    languages, tokenizer = translator.languages, translator.tokenizer
    pairs = data.read_pairs(dataset, config.subset, config.split, languages, config.columns)
    pairs = whole_pairs(pairs, " ".join(dataset))[: config.num_samples]
    sources, references = ([pair[side] for pair in pairs] for side in (0, 1))
    started = time.perf_counter()
    hypotheses = translator.first(sources)
    seconds = time.perf_counter() - started
    translator.report("pair")
    result = {
        "model": config.model,
        "dataset": list(dataset),
        "pairs": len(sources),
        "beam": config.beam,
        "length_penalty": config.length_penalty,
        "precision": config.precision,
        **score(hypotheses, references),
        "round_trip_loss_source": data.round_trip_loss(sources, tokenizer, languages[0]),
        "round_trip_loss_target": data.round_trip_loss(references, tokenizer, languages[1]),
        "seconds": round(seconds, 2),
        "versions": versions(),
    }
    say("pairs", f"{len(sources):,} of {' '.join(dataset)}, translated in {seconds:.1f} s")
    say_score(result)
    say("tokenizer", describe_round_trip(result))
    if other:
        comparison = compare(hypotheses, other.first(sources), references)
        result["against"] = {"model": config.against, **comparison}
        other.report("pair", f" ({config.against})")
        say_comparison(config.against, comparison)
    if config.sentences:
        path = Path(config.sentences).expanduser()
        write_sentences(path, sources, hypotheses, references)
        say("sentences", f"{path}, the worst first")
    if config.json:
        write_json(Path(config.json).expanduser(), result)
    return 0


def compare(ours: list[str], theirs: list[str], references: list[str]) -> dict:
    """Paired bootstrap resampling (Koehn 2004), by sacreBLEU: metric -> both scores, each with
    half its 95 % interval, and p, the probability of such a difference by chance."""
    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.significance import PairedTest

    # The first is the baseline. Named by number, because it takes equal names for a mistake.
    systems = [("0", theirs), ("1", ours)]
    metrics = {
        "BLEU": BLEU(references=[references]),
        "chrF": CHRF(references=[references]),
    }
    signatures, found = PairedTest(systems, metrics, None, test_type="bs")()
    found.pop("System")
    report = {}
    for name, (key, (baseline, mine)) in zip(metrics, found.items()):
        # A difference of nothing it would call more than chance.
        p = float(mine.p_value) if mine.score != baseline.score else 1.0
        report[name] = {"p": p, "signature": str(signatures[key])}
        for side, result in (("ours", mine), ("theirs", baseline)):
            report[name][side] = [float(v) for v in (result.score, result.ci)]
    return report


def say_comparison(name: str, report: dict) -> None:
    for metric, found in report.items():
        (ours, our_ci), (theirs, their_ci) = found["ours"], found["theirs"]
        verdict = "more than chance" if found["p"] < 0.05 else "could be chance"
        say(
            metric,
            f"{ours:.2f} ± {our_ci:.2f}, {name} {theirs:.2f} ± {their_ci:.2f}: "
            f"{ours - theirs:+.2f}, p = {found['p']:.3f}, {verdict}",
        )
        say("", found["signature"])


def write_sentences(path: Path, sources, hypotheses, references) -> None:
    """chrF, number from 1, source, translation, reference of every pair, tab-separated, worst
    first."""
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    rows = [
        (metric.sentence_score(hypothesis, [reference]).score, number, *texts)
        for number, texts in enumerate(zip(sources, hypotheses, references), 1)
        for _, hypothesis, reference in [texts]
    ]
    lines = ["\t".join([f"{row[0]:.1f}", *map(str, row[1:])]) for row in sorted(rows)]
    text = "\n".join([SENTENCES, *lines]) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def describe_round_trip(rates: dict) -> str:
    lost = [f"{rates[f'round_trip_loss_{side}']:.1%} of {side}" for side in ("source", "target")]
    return f"changes {' and '.join(lost)} lines"


def say_score(result: dict) -> None:
    say("BLEU", f"{result['bleu']:.2f}  {result['signature']}")
    say("chrF", f"{result['chrf']:.2f}  {result['chrf_signature']}")


def main(command: str, config) -> int:
    """Run a command; what the user can mend ends in one line on stderr."""
    commands = {
        "train": train,
        "translate": translate,
        "evaluate": evaluate,
        "export": export,
        "bench": bench,
        "bench decode": bench_decode,
        "bench train": bench_train,
    }
    try:
        return commands[command](config)
    except Interrupted as stopped:
        print("interrupted", file=sys.stderr)
        return stopped.args[0]
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (InputError, OSError) as error:  # disk full, no permission, name too long
        print(f"error: {data.one_line(error, None)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    for number in STOP_SIGNALS:
        signal.signal(number, raise_interrupted)
    sys.exit(main(COMMAND, CONFIG))
