"""Train an English -> Romanian Transformer, score it, use it.

    python run.py                                     the demo: built-in corpus, two minutes
    python run.py --preset tutorial                   Modlee's settings, with a correct model
    python run.py --preset small --dataset pairs.tsv  20,000 pairs of real sentences, 20 minutes
    python run.py --preset base                       WMT16, 610,000 pairs, on a GPU
    python run.py --loop raw                          the hand-written loop over the same model
    python run.py --resume runs/NAME                  continue a run that was stopped or killed
    python run.py --init runs/NAME --dataset more.tsv start a new run from these weights
    torchrun --nproc_per_node 2 run.py                on two devices, with either loop
    python run.py translate --model DIR               lines on stdin -> lines on stdout
    python run.py evaluate --model DIR                BLEU and chrF on what was held out
    python run.py export --model DIR --to ctranslate2 OUT   for a fast engine
    python run.py bench                               what Lightning and Modlee cost per step

In reading order: settings and their checks, data, devices, what both loops share, the state of a
run, the raw loop, the Lightning adapter, Modlee, checkpoints and model folders, curves and MLflow,
commands. Using a trained model is in translate.py, `bench` in benchmarks/lightning.py.
"""

import os
import signal
import sys

if __name__ == "__main__":  # during the imports, so that Ctrl-C prints no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115

import argparse
import atexit
import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import logging
import math
import random
import shlex
import shutil
import ssl
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from itertools import chain, count, islice
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn
from unittest.mock import patch

import tyro
from tyro.conf import Positional

# ---- settings ------------------------------------------------------------------------------------
# A frozen dataclass per command: its fields are the flags, their comments the help.


@dataclass(frozen=True)
class TrainConfig:
    """Train a translator, score it, and leave a model folder.

    Other commands, each with its own --help: translate, evaluate, export, bench.
    """

    preset: Literal["demo", "tutorial", "small", "base"] = "demo"  # flags given by hand win

    # "phrasebook", files (.tsv .csv .jsonl .json .parquet), two line-aligned texts, or a hub name
    dataset: tuple[str, ...] = ("phrasebook",)
    subset: str | None = None  # of a hub data set, such as ro-en
    split: str = "train"  # of a hub data set, such as train[:80%]
    columns: tuple[str, str] | None = None  # source and target, by name or number from 1
    source_lang: str = "en"  # language of the source; says how text is normalised
    target_lang: str = "ro"  # language of the target
    num_samples: int | None = None  # pairs to take after cleaning; None: all
    validation_size: float = 0.02  # source sentences held out: a share, or how many
    validation_set: tuple[str, ...] | None = None  # instead: files, or a split of the hub data set
    test_size: float = 0.0  # held out for the final score; 0: the validation pairs are scored
    test_set: tuple[str, ...] | None = None  # instead: files, or a split of the hub data set
    tokenizer: str = "train:800"  # train:N to learn N tokens, a hub name, or a folder
    max_length: int = 64  # tokens per sentence; longer pairs are dropped

    d_model: int = 128  # model width
    nhead: int = 4  # attention heads
    num_encoder_layers: int = 2  # encoder layers
    num_decoder_layers: int = 2  # decoder layers
    dim_feedforward: int = 512  # width of the feed-forward layers
    dropout: float = 0.1  # dropout rate
    activation: Literal["relu", "relu2"] = "relu"  # of the feed-forward layers; relu2: squared
    positional: Literal["sinusoidal", "learned", "rotary", "none"] = "sinusoidal"  # positions
    norm_first: bool = True  # pre-LN; otherwise post-LN, as in the paper

    loop: Literal["lightning", "raw"] = "lightning"  # training loop
    max_epochs: int = 2  # passes over the training pairs
    batch_size: int = 64  # pairs in a batch
    batch_tokens: int | None = None  # instead of batch_size: pairs x longest sentence
    accumulate: int = 1  # batches per optimizer step
    learning_rate: float = 3e-3  # peak learning rate of Adam
    weight_decay: float = 0.0  # of the matrices, by AdamW
    warmup: float = 0.1  # share of the steps in which the learning rate rises from zero
    cooldown: float = 0.3  # share of the steps, at the end, in which it falls to zero
    clip_norm: float = 1.0  # largest gradient norm; 0: no clipping
    label_smoothing: float = 0.0  # share of the probability spread over the vocabulary
    compile: bool = False  # torch.compile the model, for the raw loop
    beam: int = 1  # hypotheses per sentence in the final score; 1: greedy

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to train
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # arithmetic
    seed: int = 0  # of weights, split, order and dropout
    output: str | None = None  # model folder to create; None: a new one under runs/
    checkpoint_every: float = 10.0  # minutes between checkpoints, with one more at the end
    resume: str | None = None  # continue this run: its model folder or checkpoint folder
    init: str | None = None  # start from the weights and the tokenizer of this model folder
    modlee: bool = True  # record the run with Modlee, where it is installed
    push: bool = False  # upload what Modlee recorded; needs MODLEE_API_KEY
    mlruns: str = "runs/mlruns"  # store of Modlee and MLflow; none: nothing is recorded

    @property
    def languages(self) -> tuple[str, str]:
        return self.source_lang, self.target_lang


# The base size of "Attention Is All You Need", which the tutorial takes as well.
PAPER_BASE = {"d_model": 512, "nhead": 8, "dim_feedforward": 2048}
PAPER_BASE |= {"num_encoder_layers": 6, "num_decoder_layers": 6}
PRESETS: dict[str, dict] = {
    "demo": {},  # the defaults above
    "tutorial": PAPER_BASE
    | {"dataset": ("wmt16",), "subset": "ro-en", "split": "train[:80%]", "num_samples": 100}
    | {"validation_size": 0.2, "tokenizer": "t5-small", "max_length": 50}
    | {"max_epochs": 1, "batch_size": 16, "learning_rate": 5e-5}
    | {"warmup": 0.0, "cooldown": 0.0, "clip_norm": 0.0},
    # For some 20,000 pairs of your own.
    "small": {"d_model": 192, "num_encoder_layers": 3, "num_decoder_layers": 3}
    | {"dim_feedforward": 768, "activation": "relu2", "positional": "rotary"}
    | {"tokenizer": "train:4000", "max_length": 100, "max_epochs": 16, "batch_tokens": 1024}
    | {"learning_rate": 2e-3, "weight_decay": 0.2, "label_smoothing": 0.1, "beam": 4},
    # For the real WMT16 on one GPU.
    "base": PAPER_BASE
    | {"dataset": ("wmt16",), "subset": "ro-en", "positional": "rotary"}
    | {"validation_set": ("validation",), "test_set": ("test",)}
    | {"tokenizer": "train:16000", "max_length": 128, "max_epochs": 30, "batch_tokens": 25_000}
    | {"learning_rate": 1e-3, "label_smoothing": 0.1, "beam": 4},
}


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How sentences are translated."""

    model: str  # model folder, or one exported for CTranslate2
    beam: int = 1  # hypotheses kept per sentence; 1: greedy
    length_penalty: float = 1.0  # score = sum of log-probabilities / length ^ penalty
    batch_tokens: int = 2048  # source tokens in a batch, pads and hypotheses counted
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to decode
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: half the memory


@dataclass(frozen=True, kw_only=True)
class TranslateConfig(DecodeConfig):
    """Translate lines: one line out per line in, in order, empty lines kept empty."""

    text: Positional[tuple[str, ...]] = ()  # sentences; without any, lines come from stdin
    num_return: int = 1  # best translations per line, at most --beam, each on its own line
    scores: bool = False  # put the score and a tab before each translation


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DecodeConfig):
    """Translate the source side of a data set and score it against the target side."""

    dataset: tuple[str, ...] | None = None  # as for training; None: the model's own test part
    subset: str | None = None  # of a hub data set
    split: str = "test"  # of a hub data set
    columns: tuple[str, str] | None = None  # source and target, by name or number from 1
    num_samples: int | None = None  # first pairs to score; None: all
    hypotheses: str | None = None  # file for the translations, a line each, for sacreBLEU's command
    json: str | None = None  # file for the figures


@dataclass(frozen=True)
class ExportConfig:
    """Write the model in the format of another library."""

    output: Positional[str]  # folder to create
    model: str  # model folder
    # ctranslate2: a folder that translate and evaluate run faster; hf: one for transformers
    to: Literal["ctranslate2", "hf"] = "ctranslate2"
    # smaller and faster weights, for ctranslate2
    quantization: Literal["int8", "int8_float16", "int16", "float16", "bfloat16"] | None = None


CONFIGS = {
    "train": TrainConfig,
    "translate": TranslateConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
}
MODEL_SIZES = ("d_model", "nhead", "num_encoder_layers", "num_decoder_layers", "dim_feedforward")
MODEL_SIZES += ("activation", "positional", "norm_first", "max_length")
HELP = {"--help", "-h"}


def parse_command_line(arguments: list[str]):
    """(command, its settings). Precedence: flags, then the preset, the resumed run or the initial
    model, then the defaults."""
    command = "train"
    if arguments[:1] and arguments[0] in CONFIGS:
        command, *arguments = arguments
    if command != "train":
        prog = f"python run.py {command}"
        return command, tyro.cli(CONFIGS[command], args=arguments, prog=prog)
    early = argparse.ArgumentParser("python run.py", add_help=False, allow_abbrev=False)
    for flag in ("--preset", "--resume", "--init"):
        early.add_argument(flag)
    given, _ = early.parse_known_args(arguments)
    settings, fixed = PRESETS.get(given.preset, {}), {}
    if not HELP & set(arguments):
        if given.resume is not None:
            alone = given.preset is None and given.init is None
            require(alone, "--resume takes the settings of its run: remove --preset and --init")
            settings = read_settings(given.resume)
        elif given.init is not None:
            languages, fixed = settings_of_model(given.init)
            settings = settings | languages | fixed
    defaults = TrainConfig(**settings)
    config = tyro.cli(TrainConfig, args=arguments, prog="python run.py", default=defaults)
    for name, value in fixed.items():
        flag = f"{flag_of(name)} {getattr(config, name)}"
        same = getattr(config, name) == value
        require(same, f"{flag}: {config.init} has {value}; leave the flag out")
    return "train", config


# ---- before torch is loaded ----------------------------------------------------------------------

if __name__ == "__main__" and HELP & set(sys.argv) and sys.argv[1] != "bench":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it in silence
    parse_command_line(sys.argv[1:])  # answers and exits, before torch takes seconds to load
# Lets torch use large memory pages on Linux, which makes steps on a CPU a few per cent faster. Read
# when torch is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# MLflow 3 sends telemetry unless disabled, and by default refuses the folder of files that Modlee
# writes to.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
# By default MLflow retries an unreachable server for minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
# The user's value; MLflow overwrites the variable.
TRACKING_URI = os.environ.get("MLFLOW_TRACKING_URI") or None

import numpy as np
import torch
from torch import Tensor, distributed, nn
from tqdm import tqdm

import data
from data import InputError, is_first_process, progress_bar, require
from positional import POSITIONAL_KINDS
from seq2seq import Seq2SeqConfig, TransformerSeq2SeqModel
from translate import (
    ENGINE_FILE,
    TRANSLATE_WINDOW,
    Translator,
    choose_device,
    complete_tokenizer,
    load_model,
    load_translator,
    score,
    to_ctranslate2,
    to_transformers,
)

# ---- checks of the settings ----------------------------------------------------------------------


def flag_of(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


COUNTS = ("max_epochs", "batch_size", "batch_tokens", "accumulate", "num_samples", "num_return")
AMOUNTS = ("learning_rate", "weight_decay", "clip_norm", "checkpoint_every", "seed")
AMOUNTS += ("validation_size", "test_size")
RANGES = (  # flags of whichever command, lowest and highest value
    (COUNTS, 1, 2**31),
    (AMOUNTS, 0, 2**31),
    (("warmup", "cooldown", "label_smoothing"), 0, 0.99),
    (("max_length",), 1, 65_536),
    (("beam",), 1, 1000),
    (("length_penalty",), -10, 10),
)


def check_ranges(config) -> None:
    for name in ("dataset", "validation_set", "test_set"):
        require(getattr(config, name, None) != (), f"{flag_of(name)} needs a value")
    for names, low, high in RANGES:
        for name in names:
            value = getattr(config, name, None)
            holds = value is None or low <= value <= high  # NaN does not
            require(
                holds, f"{flag_of(name)} must be at least {low} and at most {high}, not {value}"
            )


def check_training(config: TrainConfig) -> None:
    """Raise InputError for impossible settings, before anything is read or written."""
    check_ranges(config)
    for name in ("validation_size", "test_size"):
        value = getattr(config, name)
        require(value < 1 or value % 1 == 0, f"{flag_of(name)}: a share below 1 or a whole number")
    require(config.warmup + config.cooldown <= 1, "--warmup plus --cooldown must be at most 1")
    require(config.output != "", "--output needs a name")
    require(config.mlruns != "", "--mlruns needs a name; none: nothing is recorded")
    require(not config.compile or config.loop == "raw", "--compile is for --loop raw")
    if config.preset == "small" and config.dataset == (data.PHRASEBOOK,):
        raise InputError("--preset small is for pairs of your own: add --dataset FILE")
    if config.push:
        records = config.loop == "lightning" and config.modlee and config.mlruns != "none"
        require(records, "--push uploads what Modlee records, which is switched off")
        key = os.environ.get("MODLEE_API_KEY")
        require(bool(key), "--push needs your key in the environment variable MODLEE_API_KEY")
    if config.mlruns != "none":
        found = nearest_existing(Path(config.mlruns).expanduser())
        require(found.is_dir(), f"--mlruns {config.mlruns}: {found} is a file, not a folder")
    try:
        sizes = Seq2SeqConfig(vocab_size=2, dropout=config.dropout, **sizes_of(config))
        # Some kinds also refuse certain widths.
        POSITIONAL_KINDS[sizes.positional](1, sizes.d_model, sizes.d_model // sizes.nhead)
    except ValueError as error:
        raise InputError(str(error)) from None


def sizes_of(config: TrainConfig) -> dict:
    return {name: getattr(config, name) for name in MODEL_SIZES}


# ---- the data of a run ---------------------------------------------------------------------------


class Prepared(NamedTuple):
    """What a training run needs to know of its data."""

    tokenizer: object
    train: data.PairDataset
    validation: data.PairDataset
    validation_pairs: list[data.Pair]  # also those that are over-long
    test_pairs: list[data.Pair]  # may be empty
    dropped: dict[str, int]  # pairs lost, by reason
    round_trip_loss: tuple[float, float]  # of the training pairs, source and target


def prepare_data(config: TrainConfig) -> Prepared:
    """From sentence pairs to token ids; a vocabulary is learnt only from the training pairs."""
    languages = config.languages
    kind, _, size = config.tokenizer.partition(":")
    learns = kind == "train"
    right = not learns or size.isdecimal()
    require(right, f"--tokenizer {config.tokenizer}: write train:N, for example train:8000")
    validation, test = (read_held_out(config, name) for name in ("validation_set", "test_set"))
    held_out = {data.text_key(pair.source) for pair in chain(validation or (), test or ())}
    dropped, over_long = Counter(), Counter()
    pairs = data.read_pairs(config.dataset, config.subset, config.split, languages, config.columns)
    bar = partial(progress_bar, unit=" pairs", unit_scale=True, leave=False, delay=2)
    kept = data.clean(bar(pairs, desc="read"), dropped, held_out)
    if not learns:
        tokenizer = data.load_tokenizer(config.tokenizer)
        if config.num_samples is not None:  # of those that are not over-long
            found = data.encode(kept, tokenizer, config.max_length, dropped)
            kept = (pair for pair, *_ in found)
    kept = list(islice(kept, config.num_samples))
    require(bool(kept), f"no pairs left after cleaning{data.describe_dropped(dropped)}")

    def hold_out(size: float) -> tuple[list, list]:
        keys = [data.text_key(pair.source) for pair in kept]
        return data.hold_out(kept, keys, size, config.seed)

    if test is None and config.test_size:
        kept, test = hold_out(config.test_size)
    if validation is None:
        kept, validation = hold_out(config.validation_size)
    if learns:
        tokenizer = data.train_tokenizer((text for pair in kept for text in pair), int(size))
    encode = partial(data.encode, tokenizer=tokenizer, max_length=config.max_length)
    train = data.PairDataset(encode(bar(kept, desc="encode"), dropped=dropped))
    fitting = data.PairDataset(encode(validation, dropped=over_long))
    dropped["over-long validation"] = over_long["over-long"]
    left = len(train) > 0 and len(fitting) > 0
    hint = "; raise --max-length" if dropped["over-long"] else ""
    require(left, f"training or validation is empty{data.describe_dropped(dropped)}{hint}")
    sides = zip(zip(*kept), languages)
    lost = tuple(data.round_trip_loss(list(side), tokenizer, code) for side, code in sides)
    return Prepared(tokenizer, train, fitting, validation, test or [], dict(dropped), lost)


def read_held_out(config: TrainConfig, option: str) -> list[data.Pair] | None:
    """The pairs of --validation-set or --test-set; None: some are to be held out instead. Raises
    InputError if a set given by hand does not exist."""
    names = getattr(config, option)
    if names is None:
        return None
    source = (names, None, "train")
    if len(names) == 1 and Path(names[0]).suffix.lower() not in data.FORMATS:
        source = (config.dataset, config.subset, names[0])
        on_hub = data.is_on_hub(config.dataset)
        if not (on_hub and data.has_split(config.dataset[0], config.subset, names[0])):
            what = f"{' '.join(config.dataset)} has no split {names[0]!r}"
            flag = flag_of(option)
            by_preset = PRESETS[config.preset].get(option) == names
            require(by_preset, f"{flag}: {what}, and files end in {' '.join(data.FORMATS)}")
            data.note(f"{what}, as the preset has it")
            return None
    languages = config.languages
    return whole_pairs(data.read_pairs(*source, languages, config.columns), " ".join(names))


def whole_pairs(pairs: Iterable[data.Pair], name: str) -> list[data.Pair]:
    """The pairs with two non-empty sides; only these are scored. InputError if there are none."""
    found = [pair for pair in pairs if pair.source and pair.target]
    require(bool(found), f"{name} has no complete pair")
    return found


def build_model(config: TrainConfig, tokenizer) -> TransformerSeq2SeqModel:
    """The model of the settings, with the weights that follow from the seed."""
    torch.manual_seed(config.seed)
    return TransformerSeq2SeqModel(
        vocab_size=len(tokenizer),
        pad_id=tokenizer.pad_token_id,
        eos_id=tokenizer.eos_token_id,
        dropout=config.dropout,
        **sizes_of(config),
    )


def build_loaders(config: TrainConfig, prepared: Prepared, device: torch.device) -> list:
    """Loaders of training and validation batches for this process."""
    # Tensor cores and compilers prefer multiples of 8; learned positions have no spare rows.
    rounds = device.type == "cuda" or config.compile
    multiple = 8 if rounds and config.positional != "learned" else 1
    rank, world = 0, 1
    if distributed.is_initialized():
        rank, world = distributed.get_rank(), distributed.get_world_size()
    sampling = {"batch_tokens": config.batch_tokens, "seed": config.seed}
    sampling |= {"rank": rank, "world": world}
    pad_id = prepared.tokenizer.pad_token_id
    return [
        data.make_loader(part, config.batch_size, pad_id, multiple, shuffle=shuffle, **sampling)
        for part, shuffle in ((prepared.train, True), (prepared.validation, False))
    ]


# ---- devices -------------------------------------------------------------------------------------


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
    """Use TF32 for float32 products on CUDA: factors with 10 bits of mantissa instead of 23, and
    sums in float32."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def join_processes(device: torch.device) -> None:
    """Join the processes that torchrun has started, if it has."""
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        leave = distributed.destroy_process_group
        atexit.register(lambda: distributed.is_initialized() and leave())
    if not is_first_process():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def compile_model(model: nn.Module) -> bool:
    """Compile in place if possible, else say so. Returns whether it was compiled."""
    device = next(model.parameters()).device
    try:
        # Older versions recompile for every batch: to them shapes in `Unpadded` are constants.
        if torch.__version__ < (2, 5):
            raise RuntimeError("torch 2.5 or newer would be needed")
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except RuntimeError as error:  # all of torch's complaints about a missing compiler
        data.note(f"--compile is left out: {data.one_line(error)}")
        return False
    # By layer: layers of a kind share one graph, and what depends on pads stays outside.
    for layer in (*model.encoder_layers, *model.decoder_layers):
        layer.compile(dynamic=True)
    return True


# ---- what both loops share -----------------------------------------------------------------------
# One function each for loss, optimizer, schedule, clipping, randomness: a loop is only a loop.


class TrainingError(Exception):
    """Training cannot go on. The message is one line and says what to do next."""


def autocast(device: torch.device, precision: str):
    """The context of a forward pass. It does nothing for fp32: not every device has autocast."""
    if precision == "fp32":
        return contextlib.nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype)


def batch_loss(
    model: nn.Module, batch: tuple[Tensor, Tensor], label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(input_ids [B, S], labels [B, T]) -> (summed loss [], tokens []), by teacher forcing."""
    input_ids, labels = batch
    return model(input_ids, labels=labels, label_smoothing=label_smoothing)


def scale_loss(loss_sum: Tensor, sampler, index: int, accumulate: int) -> Tensor:
    """What batch `index` adds to the loss of its optimizer step, times `accumulate`.

    Every token of the accumulation window counts the same, on all processes: no mean of means. DDP
    averages gradients over the processes, hence `world`. Lightning divides each loss by
    `accumulate`, so the raw loop does too, for identical rounding.
    """
    return loss_sum * (accumulate * sampler.world / sampler.window_tokens(index, accumulate))


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam, or AdamW (Loshchilov and Hutter 2019) that keeps norms and biases from decay."""
    if not config.weight_decay:
        make, groups = torch.optim.Adam, list(model.parameters())
    else:
        make, groups = torch.optim.AdamW, []
        for is_matrix, decay in ((True, config.weight_decay), (False, 0.0)):
            chosen = [p for p in model.parameters() if (p.dim() > 1) == is_matrix]
            groups.append({"params": chosen, "weight_decay": decay})
    # Fused: one kernel, and after an fp16 overflow it skips the step without a host sync. Since 2.4
    # torch has it on CPUs, four times as fast. Tested on Adam: older AdamW fails only in its steps.
    try:
        torch.optim.Adam(model.parameters(), fused=True)
        return make(groups, config.learning_rate, fused=True)
    except RuntimeError:
        return make(groups, config.learning_rate)


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """A trapezoid: up in the first `warmup` share of the steps, constant, and to zero in the last
    `cooldown` share (Hägele et al. 2024). step: from 0."""
    rising = (step + 1) / max(1.0, config.warmup * total_steps)
    falling = (total_steps - step) / max(1.0, config.cooldown * total_steps)
    return config.learning_rate * max(0.0, min(1.0, rising, falling))


def start_step(optimizer: torch.optim.Optimizer, config: TrainConfig, state: "State") -> None:
    """Set the learning rate and the random state (dropout) of a step, which are functions of its
    number, so that a resumed run repeats them exactly."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step, state.total_steps)
    # The CPU's generator uses only the low 32 bits, so these must depend on the seed.
    seed = config.seed * 1_000_003 + state.step + state.sampler.rank * 97_000_003
    # Not torch.manual_seed: before CUDA is initialised it records the call stack, which takes half
    # a millisecond inside Lightning.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def clip_gradients(model: nn.Module, config: TrainConfig) -> None:
    if config.clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)


def mean_loss(batches: list[tuple[Tensor, Tensor]]) -> float:
    """Nats per token over batches of (summed loss [], tokens []), of all processes. Synchronises
    with the device. Summed in Python floats, since MPS has no float64."""
    losses, tokens = (torch.stack(column).tolist() for column in zip(*batches))
    loss, count = sum_over_processes(sum(losses), sum(tokens))
    return loss / count


def sum_over_processes(*values: float) -> list[float]:
    if not distributed.is_initialized():
        return list(values)
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return total.tolist()


def on_device(loader, device: torch.device) -> Iterator[list[Tensor]]:
    """Batches on the device. To CUDA they are copied from pinned memory, without the host waiting.
    (To MPS such copies are unsafe.)"""
    is_cuda = device.type == "cuda"
    for batch in loader:
        if is_cuda:
            batch = [ids.pin_memory() for ids in batch]
        yield [ids.to(device, non_blocking=is_cuda) for ids in batch]


# ---- the state of a run --------------------------------------------------------------------------

LOG_EVERY = 20  # optimizer steps between points of the loss curve, and between host-device syncs
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class State:
    """Progress and history of a run. Both loops update it; checkpoints contain it.

    Losses stay on the device until `LOG_EVERY` steps are done, so that no step waits for them. A
    loss that is not finite then raises TrainingError, except with fp16, whose scaler skips such
    steps.

    Attributes:
        step: optimizer steps done, of total_steps. epoch, batch: the next ones, of max_epochs and
            batches.
        history: name -> points (step, value): losses "train" and "validation" in nats per token,
            "learning_rate", "bleu".
        best, best_step, best_weights: the lowest validation loss, its step and its weights, which
            are on the CPU.
        seconds: spent in steps, checkpoints and validation.
        stop: whether to end after this step, because of a signal.
    """

    FIELDS = ("step", "epoch", "batch", "history", "best", "best_step", "best_weights", "seconds")
    FIELDS += ("sums", "epoch_sums", "epoch_loss")

    def __init__(self, config: TrainConfig, train_loader, save=None, after_epoch=None):
        """save: writes a checkpoint (dict) and returns where; after_epoch(state, model)."""
        self.config, self.writer, self.after_epoch = config, save, after_epoch
        self.sampler, self.batches = train_loader.batch_sampler, len(train_loader)
        self.step = self.epoch = self.batch = 0
        self.total_steps = count_steps(self)
        self.history = {"train": [], "validation": [], "learning_rate": [], "bleu": []}
        self.best, self.best_step, self.best_weights = math.inf, 0, None
        self.pending: list[tuple[Tensor, int, int]] = []  # loss, tokens, step; still on the device
        self.sums = [0.0, 0]  # loss and tokens since the last point, of this process
        self.epoch_sums, self.epoch_loss = [0.0, 0], math.nan  # of all processes
        self.seconds, self.last_save, self.checkpoint_path = 0.0, 0.0, None
        self.parts, self.loaded = {}, {}  # of `begin`, of `load`
        self.signal, self.stop, self.handler, self.started = 0, False, None, 0.0
        self.bar = None  # of an epoch
        self.mlflow_run, self.sent, self.given_up = None, Counter(), set()  # of `log_epoch`

    def load(self, checkpoint: dict) -> None:
        """Continue from a checkpoint; `begin` loads optimizer and scaler."""
        vars(self).update(checkpoint["state"])
        self.total_steps = count_steps(self)
        self.loaded, self.sampler.start = checkpoint, (self.epoch, self.batch)

    def begin(self, **parts) -> None:
        """Call before the first step. parts: model, optimizer, scaler, which checkpoints save and
        restore."""
        self.parts = parts
        for name in parts.keys() & self.loaded.keys():
            if saved := self.loaded.pop(name):  # empty for a scaler that was not enabled
                parts[name].load_state_dict(saved)
        if self.handler:  # again: Lightning has replaced it by one that exits at once
            signal.signal(signal.SIGTERM, self.handler)
        self.last_save = time.perf_counter()
        self.started = self.last_save - self.seconds

    def ends_step(self) -> bool:
        """Whether an optimizer step ends with the current batch."""
        return (self.batch + 1) % self.config.accumulate == 0 or self.batch + 1 == self.batches

    def end_batch(self, loss_sum: Tensor) -> None:
        """Record a batch; `loss_sum` [] may still be computing."""
        if self.bar is None:
            title = f"epoch {self.epoch + 1}/{self.config.max_epochs}"
            self.bar = progress_bar(desc=title, total=self.batches, initial=self.batch)
        tokens = self.sampler.target_tokens(self.batch)
        self.pending.append((loss_sum.detach(), tokens, self.step + 1))
        self.batch += 1
        self.bar.update()

    def end_step(self) -> None:
        self.step += 1
        self.seconds = time.perf_counter() - self.started
        due = self.step % LOG_EVERY == 0 and self.log_losses()
        if not distributed.is_initialized():  # several processes agree in `log_losses`
            self.stop = self.signal != 0
        if (due or self.stop) and self.batch < self.batches:  # else after the validation
            self.save()

    def log_losses(self) -> bool:
        """Average the batches since the last point into a new one. Returns whether a checkpoint is
        due."""
        settle_losses(self)
        late = time.perf_counter() - self.last_save >= 60 * self.config.checkpoint_every
        loss, tokens, stop, late = sum_over_processes(*self.sums, self.signal != 0, late)
        self.stop, self.sums = stop > 0, [0.0, 0]
        if tokens:
            self.epoch_sums = [self.epoch_sums[0] + loss, self.epoch_sums[1] + tokens]
            self.history["train"].append((self.step, loss / tokens))
            shown = {"train_loss": f"{loss / tokens:.3f}", "left": time_left(self)}
            self.bar.set_postfix(shown, refresh=False)
            rate = learning_rate(self.config, self.step - 1, self.total_steps)
            self.history["learning_rate"].append((self.step, rate))
        return late > 0

    def end_epoch(self, loss: float) -> None:
        """Record the end of an epoch. loss: of the validation, in nats per token."""
        due = self.log_losses()
        if self.bar is not None:
            self.bar = self.bar.close()
        self.seconds = time.perf_counter() - self.started
        if not math.isfinite(loss):
            raise diverged(self, f"the validation loss after step {self.step} is {loss}")
        self.epoch, self.batch = self.epoch + 1, 0
        self.epoch_loss = self.epoch_sums[0] / max(self.epoch_sums[1], 1)
        self.epoch_sums = [0.0, 0]
        self.history["validation"].append((self.step, loss))
        if loss < self.best:
            weights = self.parts["model"].state_dict()
            self.best, self.best_step = loss, self.step
            self.best_weights = {name: weights[name].cpu().clone() for name in weights}
        if self.after_epoch:
            self.after_epoch(self, self.parts["model"])
            self.started = time.perf_counter() - self.seconds  # which does not count
        if due or self.stop or self.epoch == self.config.max_epochs:
            self.save()

    def save(self) -> None:
        """Write a checkpoint. Raises TrainingError if weights are not finite."""
        self.last_save = time.perf_counter()
        settle_losses(self)
        check_finite(self)
        if self.writer:
            checkpoint = {name: part.state_dict() for name, part in self.parts.items()}
            state = {name: getattr(self, name) for name in self.FIELDS}
            self.checkpoint_path = self.writer(checkpoint | {"state": state})


def count_steps(state: State) -> int:
    """Steps of the whole run: those done, in epochs of perhaps other lengths, and the rest."""
    this_epoch, per_epoch = (
        math.ceil(batches / state.config.accumulate) for batches in (state.batch, state.batches)
    )
    return state.step - this_epoch + (state.config.max_epochs - state.epoch) * per_epoch


def settle_losses(state: State) -> None:
    """Wait for the losses that are still on the device, and sum them."""
    losses = torch.stack([loss for loss, _, _ in state.pending]).tolist() if state.pending else []
    for loss, (_, tokens, step) in zip(losses, state.pending):
        if math.isfinite(loss):
            state.sums = [state.sums[0] + loss, state.sums[1] + tokens]
        elif state.config.precision != "fp16":
            raise diverged(state, f"the loss of step {step} is {loss}")
    state.pending.clear()


def diverged(state: State, what: str) -> TrainingError:
    if state.bar is not None:
        state.bar.close()  # or it would be drawn behind the message
    last = state.checkpoint_path or "none"
    return TrainingError(f"{what}; last good checkpoint: {last}; try a lower --learning-rate")


def check_finite(state: State) -> None:
    for name, weight in state.parts["model"].state_dict().items():
        if not weight.isfinite().all():
            raise diverged(state, f"{name} after step {state.step} is not finite")


def time_left(state: State) -> str:
    """Estimated from the steps so far, as 1:23:45."""
    seconds = round(state.seconds / max(state.step, 1) * (state.total_steps - state.step))
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


class Interrupted(BaseException):
    """Raised on a signal, with the exit code. Not KeyboardInterrupt, which Lightning swallows."""


def raise_interrupted(number: int, frame) -> NoReturn:
    raise Interrupted(128 + number)


@contextlib.contextmanager
def stopping_on_signals(state: State) -> Iterator[None]:
    """Ctrl-C or SIGTERM ends training after the current step; before the first, the program."""

    def handle(number: int, frame) -> None:
        if not state.started:
            raise_interrupted(number, frame)
        if not state.signal:
            os.write(2, b"\nstopping after this step ...\n")  # print is not reentrant
        state.signal = number

    previous = [signal.signal(number, handle) for number in STOP_SIGNALS]
    state.handler = handle
    try:
        yield
    finally:
        state.handler = None
        for number, handler in zip(STOP_SIGNALS, previous):
            # A second signal must not interrupt an orderly stop.
            signal.signal(number, signal.SIG_IGN if state.stop else handler)


# ---- the raw loop --------------------------------------------------------------------------------


def train_raw(
    model: nn.Module, train_loader, validation_loader, config: TrainConfig, state: State
) -> None:
    """Plain PyTorch: autocast, loss scaling, accumulation, clipping, schedule, validation,
    resuming, and a process per device under torchrun.

    model(input_ids, labels=labels, label_smoothing=share) returns (summed loss, number of tokens).
    """
    device = next(model.parameters()).device
    sampler = train_loader.batch_sampler
    optimizer = build_optimizer(model, config)
    # Enabled only for fp16, whose small gradients would underflow.
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    network = model
    if distributed.is_initialized():
        network = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    state.begin(model=model, optimizer=optimizer, scaler=scaler)

    for epoch in range(state.epoch, config.max_epochs):
        sampler.set_epoch(epoch)  # skips the batches that a resumed run has done
        model.train()
        for batch in on_device(train_loader, device):
            if state.batch % config.accumulate == 0:
                start_step(optimizer, config, state)
                optimizer.zero_grad(set_to_none=True)
            # DDP reduces gradients only in the last batch of a step.
            ends_step = state.ends_step()
            alone = network is not model and not ends_step
            with network.no_sync() if alone else contextlib.nullcontext():
                with autocast(device, config.precision):
                    loss_sum, _ = batch_loss(network, batch, config.label_smoothing)
                loss = scale_loss(loss_sum, sampler, state.batch, config.accumulate)
                scaler.scale(loss / config.accumulate).backward()
            state.end_batch(loss_sum)
            if ends_step:
                scaler.unscale_(optimizer)
                clip_gradients(model, config)
                scaler.step(optimizer)
                scaler.update()
                state.end_step()
                if state.stop and state.batch < state.batches:
                    return
        state.end_epoch(validate(model, validation_loader, config))
        if state.stop:
            return


@torch.no_grad()
def validate(model: nn.Module, loader, config: TrainConfig) -> float:
    """Loss in nats per token over a loader, without dropout or smoothing."""
    device = next(model.parameters()).device
    model.eval()
    losses = []
    for batch in on_device(loader, device):
        with autocast(device, config.precision):
            losses.append(batch_loss(model, batch))
    return mean_loss(losses)


# ---- the Lightning adapter -----------------------------------------------------------------------


def adapter_class(base: type) -> type:
    """The LightningModule around a model; `base` is LightningModule or Modlee's subclass of it."""

    class TextToTextAdapter(base):
        def __init__(self, model_config=None, model=None, *args, **kwargs):
            super().__init__()
            # Imported here, because Modlee copies this method into a file of its own.
            from seq2seq import TransformerSeq2SeqModel

            self.model_config = model_config  # a plain dict, so that Modlee keeps it
            self.model = model or TransformerSeq2SeqModel(**model_config)

        def forward(self, input_ids, decoder_input_ids=None):
            return self.model(input_ids, decoder_input_ids)

        def attach(self, config: TrainConfig, state: State) -> None:
            """Set what training needs, but Modlee's rebuilding does not."""
            self.config, self.state, self.losses = config, state, []
            self.after_callbacks = None  # called after every callback's on_train_start

        def configure_optimizers(self):
            return build_optimizer(self.model, self.config)

        def on_train_start(self) -> None:
            if self.after_callbacks:
                self.after_callbacks()
            parts = {"model": self.model, "optimizer": self.trainer.optimizers[0]}
            if scaler := getattr(self.trainer.precision_plugin, "scaler", None):
                parts["scaler"] = scaler
            self.state.begin(**parts)

        def training_step(self, batch, batch_idx):
            if batch_idx % self.config.accumulate == 0:
                start_step(self.trainer.optimizers[0], self.config, self.state)
            loss_sum, _ = batch_loss(self.model, batch, self.config.label_smoothing)
            self.ends_step = self.state.ends_step()
            self.state.end_batch(loss_sum)
            return scale_loss(loss_sum, self.state.sampler, batch_idx, self.config.accumulate)

        def configure_gradient_clipping(self, optimizer, *args, **kwargs) -> None:
            # Lightning leaves unscaling to a fused optimizer, which does it after clipping.
            scaler = self.state.parts.get("scaler")
            if scaler is not None and optimizer.param_groups[0].get("fused"):
                scaler.unscale_(optimizer)
            clip_gradients(self.model, self.config)

        def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
            state = self.state
            if self.ends_step:
                state.end_step()
                if state.stop and state.batch < state.batches:
                    self.trainer.should_stop = True
                    self.trainer.limit_val_batches = 0  # it would validate before it stops

        def validation_step(self, batch, batch_idx) -> None:
            self.losses.append(batch_loss(self.model, batch))

        def on_validation_epoch_end(self) -> None:
            loss = mean_loss(self.losses)  # over all processes
            self.losses.clear()
            self.log("val_loss", loss, rank_zero_only=True)
            self.state.end_epoch(loss)
            self.trainer.should_stop = self.trainer.should_stop or self.state.stop

    return TextToTextAdapter


def train_lightning(adapter, train_loader, validation_loader, config, **changes) -> None:
    """`Trainer.fit` on the adapter. changes: of the Trainer's arguments."""
    lightning, state = import_lightning(), adapter.state
    device, world = next(adapter.parameters()).device.type, state.sampler.world
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    precision = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
    ddp = lightning.strategies.DDPStrategy(broadcast_buffers=False)
    arguments = {
        "accelerator": "gpu" if device == "cuda" else device,
        "devices": here,
        "num_nodes": world // here,
        "strategy": ddp if world > 1 else "auto",
        "precision": precision[config.precision],
        "max_epochs": config.max_epochs,
        "accumulate_grad_batches": config.accumulate,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,  # the state has one, which costs less
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # the batch sampler is already ours
    }
    trainer = lightning.Trainer(**(arguments | changes))
    if state.step:
        continue_from(state, trainer.fit_loop)
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        # Collating is cheaper than passing batches between processes.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        # Our batch sampler starts at the right batch.
        warnings.filterwarnings("ignore", ".*dataloader is not resumable.*")
        # The loss is averaged over all processes before it is logged.
        warnings.filterwarnings("ignore", ".*sync_dist.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")  # caused by the newest Lightning itself
        trainer.fit(adapter, train_loader, validation_loader)


def continue_from(state: State, loop) -> None:
    """Make Lightning start at state.epoch and state.batch, as its own checkpoint would."""
    progress, begun = loop.state_dict(), state.epoch + (state.batch > 0)
    epochs = {"ready": begun, "started": begun, "processed": state.epoch, "completed": state.epoch}
    batches = dict.fromkeys(epochs, state.batch)
    for span in ("total", "current"):
        progress["epoch_progress"][span].update(epochs)
        progress["epoch_loop.batch_progress"][span].update(batches)
    optimizer = progress["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    optimizer["step"]["total"].update(ready=state.step, completed=state.step)
    progress["epoch_loop.state_dict"]["_batches_that_stepped"] = state.step
    loop.load_state_dict(progress)
    # Only in the middle of an epoch; at its start, "restarting" would validate first.
    loop.restarting = state.batch > 0


def import_lightning():
    """lightning.pytorch, without its startup messages."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*pkg_resources.*")  # of 2.3
        import lightning.pytorch
    for name in ("lightning.pytorch", "pytorch_lightning"):  # it logs under either
        logging.getLogger(name).setLevel(logging.WARNING)
    return lightning.pytorch


# ---- Modlee --------------------------------------------------------------------------------------
# Modlee 0.0.5 records a run (code, graph, metafeatures) at the start of a fit. The record is kept,
# the side effects are undone, each named where that is done.


def import_modlee():
    """The package, or None if it is not installed. The process is left as it was."""
    if find_spec("modlee") is None:
        return None
    # These configure their own loggers, which must not be undone along with Modlee's changes.
    import_lightning()
    import mlflow  # noqa: F401
    import sklearn  # noqa: F401

    # Modlee turns TLS verification off, calls basicConfig, and silences these loggers.
    https_context = ssl._create_default_https_context
    root_handlers, root_level = logging.root.handlers[:], logging.root.level
    names = "pytorch_lightning lightning.pytorch.core mlflow torchvision torch.nn"
    loggers = [logging.getLogger(name) for name in f"{names} sklearn pymfe numpy".split()]
    levels = [(logger, logger.level, logger.propagate) for logger in loggers]
    random_state = torch.get_rng_state()  # it draws a dummy image
    try:
        with warnings.catch_warnings():  # it adds 36 filters
            import modlee
    except ImportError as error:
        raise InputError(
            f"Modlee is installed but cannot be imported ({data.one_line(error)}); reinstall "
            "requirements.txt, or train with --no-modlee"
        ) from None
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
    """A function that restores what Modlee's callbacks change: random states, which parameters are
    trainable (its graph export makes all of them trainable), modes, and print options."""
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
    """Modlee's model-to-code converter without its slow parts and leftover files."""
    import networkx

    class SmallConverter(modlee.converter.Converter):
        def torch_model2onnx_graph(self, torch_model, input_dummy=None, **kwargs):
            # Modlee's version leaves .tmp_model.onnx in the working directory.
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "model.onnx")
                return super().torch_model2onnx_graph(torch_model, input_dummy, path, **kwargs)

        torch2onnx = torch_model2onnx_graph

        def onnx_graph2onnx_nx(self, onnx_graph, prune=True):
            # Modlee's version draws an unused graph with pydot, a sixth of the time.
            return networkx.DiGraph()

        def convert_float(self, onnx_text):
            # Modlee's regular expression takes 17 s for the numbers of a position table.
            lines = (line.rpartition("_") for line in onnx_text.split("\n"))
            return "\n".join(
                before + ("." if "float" in before else mark) + after
                for before, mark, after in lines
            )

        def tensor2init_code(self, input_tensor, tensor_type=None):
            # Modlee's version builds set(tensor.tolist()) of every weight: a minute for 60 M.
            if not isinstance(input_tensor, Tensor):
                return input_tensor
            shape, flat = tuple(input_tensor.shape), input_tensor.flatten()
            if flat.numel() and bool((flat == flat[0]).all()):
                return f"torch.ones({shape})*{flat[0].item()}"
            if tensor_type is None and flat.numel() <= 1000:
                return f"torch.tensor({input_tensor.tolist()})"
            return f"torch.{tensor_type or 'randn'}({shape})"

        def dict2code(self, kwarg_dict):
            # Modlee's version calls exec() on every string, and appends to ~/kwargs.txt.
            code = {k: v if str(v).startswith("torch.") else repr(v) for k, v in kwarg_dict.items()}
            return "{" + ",".join(f"{key!r}:{value}" for key, value in code.items()) + "}"

    return SmallConverter()


@dataclass(eq=False)
class ModleeRecord:
    """One training run recorded by Modlee."""

    modlee: object  # the package
    config: TrainConfig
    prepared: Prepared
    names: tuple[str, ...] = ("",)  # which of its callbacks, by parts of their names
    seconds: float = 0.0  # what Modlee took
    run_path: str = ""  # folder of the run
    artifacts: tuple[str, ...] = ()  # names of the files in it

    def fit(self, adapter, fit: Callable[[], None]) -> None:
        """Run `fit` inside an MLflow run, with Modlee's callbacks on the adapter."""
        import mlflow

        # Silences advice on signatures and schemas.
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        root_handlers = logging.root.handlers[:]  # Modlee's logging.info() adds one that prints all
        autolog = mlflow.pytorch.autolog  # the constructor has switched it on, with models
        with contextlib.ExitStack() as undo:
            undo.callback(setattr, logging.root, "handlers", root_handlers)
            undo.callback(autolog, disable=True)  # it has patched Trainer.fit
            callbacks = self.callbacks(adapter, undo)
            try:
                set_mlflow_store(self.config.mlruns)
                autolog(log_datasets=False, log_models=False, checkpoint=False)
                undo.enter_context(self.modlee.start_run())
            except Exception as error:  # noqa: BLE001 - a store may raise anything
                data.note(f"Modlee records nothing: {data.one_line(error)}")
                autolog(disable=True)
                callbacks = []
            adapter.configure_callbacks = lambda: callbacks
            fit()
            if not callbacks:
                return
            self.run_path = self.modlee.last_run_path()
        root = Path(self.run_path) / "artifacts"
        files = (path for path in root.rglob("*") if path.is_file())
        self.artifacts = tuple(sorted(str(path.relative_to(root)) for path in files))

    def callbacks(self, adapter, undo: contextlib.ExitStack) -> list:
        """Modlee's callbacks, after one that saves the state that they change."""
        from lightning.pytorch.callbacks import Callback
        from modlee.model import callbacks as stock

        record = self

        class Begin(Callback):
            def on_train_start(self, trainer, module):
                print("\nModlee describes the run ...", file=sys.stderr)
                started = time.perf_counter()
                quiet = contextlib.ExitStack()
                quiet.callback(snapshot(module))
                # pymfe and the tracer emit dozens of warnings.
                quiet.enter_context(warnings.catch_warnings())
                quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
                warnings.simplefilter("ignore")
                undo.push(quiet)  # also where a callback fails

                def finish() -> None:
                    quiet.close()
                    record.seconds += time.perf_counter() - started

                module.after_callbacks = finish

        def source(model, **more) -> str:
            # Modlee's version names the modules of base classes without importing them.
            text = self.modlee.get_code_text_for_model(model, **more)
            return "import positional, seq2seq\n" + text

        converter, features = small_converter(self.modlee), self.modlee.model_metafeatures
        undo.enter_context(patch.object(features, "converter", converter))
        undo.enter_context(patch.object(stock, "modlee_converter", converter))
        undo.enter_context(patch.object(stock, "get_code_text_for_model", source))
        adapter.data_metafeatures_callback.DataMetafeatures = self.metafeatures_class()
        dropped = (
            stock.LogOutputCallback,  # overwrites the module's own val_loss
            stock.LogParamsCallback,  # asks the loader for a fixed batch size
            stock.PushServerCallback,  # uploads unasked, and crashes without a key
        )
        kept = [c for c in type(adapter).configure_callbacks(adapter) if not isinstance(c, dropped)]
        kept = [c for c in kept if any(name in type(c).__name__ for name in self.names)]
        # Each would run a whole training batch; two short rows are enough.
        ids = torch.ones(2, 8, dtype=torch.long)
        for callback in kept:
            callback.get_input = lambda trainer, module, *_: [ids.to(module.device)] * 2
        return [Begin(), *kept]

    def metafeatures_class(self) -> type:
        """Modlee's data metafeatures of a bounded, fixed-length view of the pairs.

        The stock class reads the data 2 N + 200 times, and fetches GPT-2's tokenizer with retries
        that last minutes where there is no network.
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
        print_field("modlee", "uploading source, graphs, parameters, metrics and paths")
        key, here, sent, reason = os.environ["MODLEE_API_KEY"], os.getcwd(), False, ""
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # it writes logs.json into the working directory
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    sent = self.modlee.save_run_as_json(self.run_path)
            except Exception as error:  # noqa: BLE001 - its client may raise anything
                reason = f" ({data.one_line(error).replace(key, '***')})"
            finally:
                os.chdir(here)
        print_field("modlee", "uploaded" if sent else f"the server did not accept it{reason}")


def modlee_tokenizer(own):
    """The tokenizer for data metafeatures: GPT-2's, as in Modlee, if it is cached or reachable;
    else the run's own, whose metafeatures do not compare with Modlee's."""
    from transformers import GPT2Tokenizer

    for only_cached in (True, False):
        if only_cached or data.hub_reachable():
            with contextlib.suppress(OSError):
                tokenizer = GPT2Tokenizer.from_pretrained("gpt2", local_files_only=only_cached)
                tokenizer.pad_token = tokenizer.eos_token
                return tokenizer
    data.note("GPT-2's tokenizer cannot be loaded: data metafeatures are of the run's own")
    return own


# ---- checkpoints and model folders ---------------------------------------------------------------
# During training, NAME.checkpoints holds the newest two states, loss.png and, after `--init`, the
# tokenizer. Afterwards NAME holds model.safetensors, config.json, the tokenizer's files,
# metrics.json, loss.png, validation.tsv and test.tsv.


@contextlib.contextmanager
def naming_failures(path: Path) -> Iterator[None]:
    """Turn the write errors of any library into an OSError that names the path."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {data.one_line(error)}") from None
    except RuntimeError as error:  # from torch's writer, which does not name the cause
        raise OSError(f"cannot write {path} (disk full?): {data.one_line(error)}") from None


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Create or replace a file, whole: `write` fills another, which is synced and renamed."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    with naming_failures(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            with contextlib.suppress(OSError):  # the rename must also survive a loss of power
                entry = os.open(path.parent, os.O_RDONLY)
                os.fsync(entry)
                os.close(entry)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def nearest_existing(path: Path) -> Path:
    """The path itself or the first of its parents that exists."""
    return next(part for part in (path, *path.parents) if part.exists())


def is_model_folder(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def check_writable(folder: Path, other: str) -> None:
    """Raise InputError if a folder, which need not exist yet, is not writable."""
    found = nearest_existing(folder)
    writable = found.is_dir() and os.access(found, os.W_OK)
    require(writable, f"cannot write to {found}; give another {other}")


def check_output(folder: Path, replace: bool = False) -> None:
    """Raise InputError if a folder cannot be created. replace: it may be a model folder already."""
    folder = folder.resolve()  # follows links and ".."
    free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    free = free or (replace and is_model_folder(folder))
    require(free and folder != Path.cwd(), f"{folder} exists already; give another name")
    check_writable(folder.parent, "place")


def check_room(folder: Path, model: nn.Module) -> None:
    """Raise InputError if checkpoints and model would not fit, before anything is learnt."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    # A checkpoint has the weights, the best weights and Adam's two moments. Two of them are kept.
    needs, free = (2 * 4 + 1) * weights / 1e6, shutil.disk_usage(folder).free / 1e6
    what = f"{folder}: {free:,.1f} MB are free, two checkpoints and the model take {needs:,.1f}"
    require(free > needs, f"{what}; make room or give another --output")


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Create a folder, or replace a model folder, whole: `fill` fills a temporary folder, which is
    then renamed."""
    folder = folder.resolve()
    with naming_failures(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        before = temporary / ".before"
        try:
            fill(temporary)
            for path in temporary.iterdir():  # mkdtemp makes them private
                path.chmod(0o644)
            temporary.chmod(0o755)
            if is_model_folder(folder):
                os.replace(folder, before)
            os.replace(temporary, folder)
        finally:
            if before.exists():
                os.replace(before, folder)
            shutil.rmtree(temporary, ignore_errors=True)
        for path in (folder / before.name).glob("*"):  # keeps files that the user has added
            if not (folder / path.name).exists():
                os.replace(path, folder / path.name)
        shutil.rmtree(folder / before.name, ignore_errors=True)


def checkpoint_folder(config: TrainConfig) -> Path:
    """Where the checkpoints of a run are: NAME.checkpoints beside the model folder NAME."""
    if config.resume is None:
        return Path(f"{Path(config.output)}.checkpoints").expanduser()  # without a slash at its end
    folder = Path(config.resume).expanduser()
    return folder if any(folder.glob("step-*.pt")) else Path(f"{folder}.checkpoints")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder of checkpoints while the block runs. Raises InputError."""
    import fcntl

    if not is_first_process():
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is writing to {folder}; wait until it ends") from None
        yield
    finally:
        os.close(descriptor)


def write_checkpoint(folder: Path, about: dict, checkpoint: dict) -> Path | None:
    """Write a checkpoint, whole or not at all, and keep the one before. about: settings of the run
    and a digest of its data. Only the first process writes. Raises TrainingError."""
    if not is_first_process():
        return None
    path = folder / f"step-{checkpoint['state']['step']:09}.pt"
    old = sorted(folder.glob("step-*.pt"))[:-1]
    for outdated in (*old, *folder.glob(".[0-9]*")):  # these of a process killed while writing
        outdated.unlink()
    try:
        write_file(path, partial(torch.save, about | checkpoint))
    except OSError as error:
        last = max(folder.glob("step-*.pt"), default=None)
        then = f"{last} is intact: make room, then --resume {folder}" if last else "make room"
        raise TrainingError(f"{error}; {then}") from None
    return path


def read_checkpoint(folder: Path, silent: bool = False) -> dict:
    """The newest checkpoint that can be read; unreadable ones are reported. No code in them is
    executed. Raises InputError if there is none."""
    paths = sorted(folder.glob("step-*.pt"), reverse=True)
    require(bool(paths), f"--resume: no checkpoints in {folder}; --init starts from a model")
    for path in paths:
        try:
            with path.open("rb") as file:
                # Another format than zip could execute code, up to torch 2.5 (CVE-2025-32434).
                if file.read(4) != b"PK\x03\x04":
                    raise ValueError("it is not a zip archive")
                if damaged := zipfile.ZipFile(file).testzip():  # torch compares no checksums
                    raise ValueError(f"{damaged} is damaged")
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - of many types
            if not silent and is_first_process():
                data.note(f"{path} cannot be read ({data.one_line(error)}): it is set aside")
                path.rename(path.with_suffix(".damaged"))  # and counts as none of the newest
    raise InputError(f"no checkpoint in {folder} can be read")


def read_settings(resume: str) -> dict:
    """The settings of the run to resume; flags override them."""
    folder = checkpoint_folder(TrainConfig(resume=resume)).absolute()
    settings = read_checkpoint(folder, silent=True).get("settings", {})
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    require(settings.keys() == known, f"{resume} was written by another version of this program")
    output = Path(str(folder).removesuffix(".checkpoints"))
    if output != folder and output != Path(settings["output"]).expanduser().absolute():
        settings["output"] = str(output)  # it has been moved or renamed
    if (folder / "tokenizer").is_dir():
        settings["tokenizer"] = str(folder / "tokenizer")
    return settings | {"resume": resume}


def digest_pairs(pairs: data.PairDataset) -> str:
    """SHA-256 of the token ids, in order."""
    content = hashlib.sha256()
    for ids in (*pairs.lengths, *pairs.sources, *pairs.targets):
        content.update(ids.tobytes())
    return content.hexdigest()


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write the tokenizer's files such that old and new transformers and tokenizers load them."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"model": {}}
    merges = content["model"].get("merges", [])
    # Since 0.20 tokenizers writes merges as pairs, which 0.19 cannot read.
    if merges and isinstance(merges[0], list) and " " not in "".join(chain(*merges)):
        content["model"]["merges"] = [" ".join(pair) for pair in merges]
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    text = path.read_text(encoding="utf-8")
    # Version 5 renamed the class, and reads the old name; version 4 knows no other.
    text = text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
    path.write_text(text, encoding="utf-8")


def save_model(
    folder: Path, model: nn.Module, prepared: Prepared, config: TrainConfig, metrics, state: State
) -> None:
    """Write a model folder, with the pairs that were held out."""
    from safetensors.torch import save_model as save_weights

    languages = config.languages
    content = {"source_lang": languages[0], "target_lang": languages[1]}
    content |= {"model": dataclasses.asdict(model.config), "training": dataclasses.asdict(config)}
    parts = {"validation.tsv": prepared.validation_pairs, "test.tsv": prepared.test_pairs}

    def fill(temporary: Path) -> None:
        save_tokenizer(prepared.tokenizer, temporary)
        save_weights(model, str(temporary / "model.safetensors"))
        write_json(temporary / "config.json", content)
        write_json(temporary / "metrics.json", metrics)
        for name, pairs in parts.items():
            text = "".join(f"{source}\t{target}\n" for source, target in [languages, *pairs])
            if pairs:
                write_text(temporary / name, text)
        attempt(state, "the model's loss.png", draw_curves, temporary / "loss.png", state)

    write_folder(folder, fill)


def settings_of_model(folder: str) -> tuple[dict, dict]:
    """Settings that a run inherits from the model folder it starts from: (those that flags can
    change, those that they cannot)."""
    path = Path(folder).expanduser()
    try:
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
        model = Seq2SeqConfig(**content["model"])  # an older folder has fewer fields
        fixed = {name: getattr(model, name) for name in MODEL_SIZES}
        fixed["tokenizer"] = str(path.absolute())
        languages = {name: content[name] for name in ("source_lang", "target_lang")}
    except (OSError, ValueError, LookupError, TypeError):
        raise InputError(f"--init: {folder} is not a model folder of this program") from None
    untied = f"--init: {folder} has untied embeddings, which no run here trains"
    require(model.tie_embeddings, untied)
    return languages, fixed


# ---- curves and MLflow ---------------------------------------------------------------------------


def draw_curves(path: Path, state: State) -> None:
    """Over optimizer steps: losses above, BLEU and the learning rate below."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(7, 6), layout="constrained")
    losses, scores = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    rates = scores.twinx()
    for axes, name, label, style in (
        (losses, "train", "training (with dropout and smoothing)", ".-"),
        (losses, "validation", "validation", "o-"),
        (scores, "bleu", "BLEU", "go-"),
        (rates, "learning_rate", "learning rate", "k:"),
    ):
        if points := state.history[name]:
            axes.plot(*zip(*points), style, label=label)
    losses.set(ylabel="loss (nats per token)", yscale="log")
    losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    losses.yaxis.set_major_formatter("{x:g}")  # 0.1 and not 10^-1
    losses.yaxis.set_minor_formatter(NullFormatter())
    top = 1.05 * max((bleu for _, bleu in state.history["bleu"]), default=0) or 1
    scores.set(xlabel="optimizer step", ylabel="BLEU (greedy)", ylim=(0, top))
    rates.set(ylabel="learning rate", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=2, fontsize=9)
    write_file(path, partial(figure.savefig, format="png", dpi=120))


def set_mlflow_store(mlruns: str) -> None:
    """Let MLflow's fluent API write to the folder that Modlee uses too, unless MLFLOW_TRACKING_URI
    names another place."""
    import mlflow

    if TRACKING_URI is not None:
        mlflow.set_tracking_uri(TRACKING_URI)
        return
    folder = Path(mlruns).expanduser().resolve()
    if folder.name != "mlruns":  # Modlee would append it
        folder = folder / "mlruns"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # an empty folder would have no default experiment
        folder.rmdir()
    mlflow.set_tracking_uri(folder.as_uri())


def log_epoch(
    config: TrainConfig, prepared: Prepared, folder: Path, state: State, model: nn.Module
) -> None:
    """After each validation: BLEU of 100 validation pairs, a line with the time left and two sample
    translations on stderr, the curves in folder/loss.png, all points in MLflow."""
    # Spread over the set, which may be a concatenation of several.
    count = len(prepared.validation_pairs)
    rows = np.linspace(0, count - 1, min(100, count)).astype(int)
    sources, references = (
        [prepared.validation_pairs[row][side] for row in rows] for side in (0, 1)
    )
    languages = config.languages
    found = Translator(model, prepared.tokenizer, languages, silent=True).translate(sources)
    bleu = score(found, references)["bleu"]
    state.history["bleu"].append((state.step, bleu))
    best = " (best)" if state.best_step == state.step else ""
    samples = "".join(f"\n    {pair[0]}\n    {pair[1]}" for pair in list(zip(sources, found))[:2])
    tqdm.write(
        f"epoch {state.epoch}/{config.max_epochs}: train {state.epoch_loss:.3f}, validation "
        f"{state.history['validation'][-1][1]:.3f}{best}, BLEU {bleu:.1f} of {len(found)} pairs, "
        f"{time_left(state)} left{samples}",
        file=sys.stderr,
    )
    attempt(state, "loss.png", draw_curves, folder / "loss.png", state)
    if config.mlruns != "none":
        attempt(state, "MLflow", log_to_mlflow, config, state)


def attempt(state: State, what: str, function: Callable, *arguments) -> None:
    """Call a function that must not end training. After an error print a note and never retry."""
    if what not in state.given_up:
        try:
            function(*arguments)
        except Exception as error:  # noqa: BLE001 - a store may raise anything
            data.note(f"{what} is given up: {data.one_line(error)}")
            state.given_up.add(what)


def log_to_mlflow(config: TrainConfig, state: State, **final: float) -> None:
    """Send what is new in the history, and final scores, to Modlee's run or one of our own."""
    import mlflow

    if mlflow.active_run() is None:
        set_mlflow_store(config.mlruns)
        mlflow.start_run(run_id=state.mlflow_run)
    if state.mlflow_run is None:
        state.mlflow_run = mlflow.active_run().info.run_id
        mlflow.set_tag("mlflow.runName", Path(config.output).name)
        # With a prefix: autolog has already logged a "weight_decay", which is Adam's default.
        settings = dataclasses.asdict(config).items()
        mlflow.log_params({f"config.{name}": value for name, value in settings})
    for name, points in state.history.items():
        for step, value in points[state.sent[name] :]:
            mlflow.log_metric(name, value, step=step)
        state.sent[name] = len(points)
    for name, value in final.items():
        mlflow.log_metric(f"final_{name}", value)


@contextlib.contextmanager
def closing_mlflow_run(state: State) -> Iterator[None]:
    """End the MLflow run, if there is one, with the status of the block."""
    status = "FAILED"
    try:
        yield
        status = "KILLED" if state.stop else "FINISHED"
    except Interrupted:
        status = "KILLED"
        raise
    finally:
        if state.mlflow_run is not None:
            import mlflow

            attempt(state, "MLflow", mlflow.end_run, status)
            # Modlee's run has ended with the fit.
            end = mlflow.MlflowClient().set_terminated
            attempt(state, "MLflow", end, state.mlflow_run, status)


# ---- commands ------------------------------------------------------------------------------------


def print_field(topic: str, text: str) -> None:
    print(f"{topic:<10} {text}", flush=True)


def versions() -> dict[str, str | None]:
    names = "torch lightning modlee transformers tokenizers datasets sacrebleu ctranslate2"
    found = {"python": sys.version.split()[0]}
    for name in f"{names} x-transformers".split():
        found[name] = metadata.version(name) if find_spec(name.replace("-", "_")) else None
    return found


def check_output_file(name: str | None, key: str | None = "versions") -> None:
    """Raise InputError if a file cannot be written later, or exists and is not JSON with this key
    (key None: or exists at all), unless it is empty."""
    if name is None:
        return
    path = Path(name).expanduser()
    # A link, such as /dev/stdout, would be replaced.
    fits = path.parent.is_dir() and not path.is_symlink() and (path.is_file() or not path.exists())
    require(fits, f"{path}: no file can be written there")
    if path.exists() and path.stat().st_size > 0:
        try:
            alike = key is not None and key in json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, TypeError):
            alike = False
        what = "" if key is None else " and is not a report"
        require(alike, f"{path} exists already{what}; give another name")


def name_output(config: TrainConfig) -> TrainConfig:
    """Set `output`, the same in all processes, and create its checkpoint folder, which reserves a
    generated name."""
    names = [config.output]
    if config.output is not None and is_first_process():
        checkpoint_folder(config).mkdir(parents=True, exist_ok=True)  # or fail before training
    elif is_first_process():
        Path("runs").mkdir(exist_ok=True)
        now = f"runs/{datetime.now():%Y%m%d-%H%M%S}-{config.preset}"
        for name in chain([now], (f"{now}-{number}" for number in count(2))):
            with contextlib.suppress(FileExistsError):
                Path(f"{name}.checkpoints").mkdir()
                names[0] = name
                break
    if distributed.is_initialized():
        distributed.broadcast_object_list(names)
    return dataclasses.replace(config, output=names[0])


def train(config: TrainConfig) -> int:
    """Prepare data, train, save, evaluate. Returns the exit code."""
    # First the checks that need no data, which may take minutes to read.
    check_training(config)
    device = choose_device(config.device)
    config = dataclasses.replace(config, precision=choose_precision(config.precision, device))
    checkpoint = None
    if config.output is not None:
        checkpoints, output = checkpoint_folder(config), Path(config.output).expanduser()
        own = Path(f"{output}.checkpoints").resolve() == checkpoints.resolve()
        check_output(output, replace=config.resume is not None and own)
        hint = f"continue it with --resume {shlex.quote(str(checkpoints))}, or delete it"
        free = config.resume is not None or not any(checkpoints.glob("step-*.pt"))
        require(free, f"{checkpoints} belongs to another run: {hint}")
        check_writable(checkpoints, "--output")
    if config.resume is not None:
        checkpoint = read_checkpoint(checkpoint_folder(config))
        was = checkpoint["settings"]
        same = all(was[name] == size for name, size in sizes_of(config).items())
        require(same, f"the model of {config.resume} has other sizes; leave them out")
    join_processes(device)
    use_tensor_cores(device)

    prepared = prepare_data(config)
    model = build_model(config, prepared.tokenizer)
    if config.init is not None and checkpoint is None:
        model.load_state_dict(load_model(config.init, torch.device("cpu"))[0].state_dict())
    model.to(device)
    loaders = build_loaders(config, prepared, device)
    metrics = report_run(config, prepared, model, loaders[0], device)
    config = name_output(config)
    output, checkpoints = Path(config.output).expanduser(), checkpoint_folder(config)
    if checkpoint is None:
        check_room(checkpoints, model)
    digest = f"{digest_pairs(prepared.train)} {digest_pairs(prepared.validation)}"
    layout = (len(loaders[0]), config.accumulate, loaders[0].batch_sampler.world)
    about = {"settings": dataclasses.asdict(config), "data": digest, "layout": layout}
    save = partial(write_checkpoint, checkpoints, about)
    after_epoch = partial(log_epoch, config, prepared, checkpoints) if is_first_process() else None
    state = State(config, loaders[0], save, after_epoch)
    if checkpoint is not None:
        resume(state, model, checkpoint, about)

    with locked(checkpoints), closing_mlflow_run(state):
        if checkpoint is None and config.init is not None and is_first_process():
            # For `--resume`: by then the initial model may have been moved.
            save_tokenizer(prepared.tokenizer, checkpoints / "tokenizer")
        record = None
        with stopping_on_signals(state):
            if state.epoch < config.max_epochs:
                record = fit(model, loaders, config, prepared, state)
            if state.stop:
                return print_stopped(state, checkpoints)
            if not is_first_process():
                return 0
            model.to(device)  # Lightning takes it to the CPU at the end
            model.load_state_dict(state.best_weights)
            metrics |= report_training(state, record, prepared)
            try:  # before scoring, so that an interruption loses no training
                save_model(output, model, prepared, config, metrics, state)
            except OSError as error:
                hint = f"make room, then --resume {shlex.quote(str(checkpoints))}"
                raise TrainingError(
                    f"{error}; training is complete in {checkpoints}: {hint}"
                ) from None
        place = shlex.quote(str(output))
        search = f" --beam {config.beam}" if config.beam > 1 else ""
        evaluation = f"python run.py evaluate --model {place}{search}"
        try:
            if state.signal:  # it came while the model was written
                raise_interrupted(state.signal, None)
            score_model(model, prepared, config, metrics)
        except Interrupted:
            print(f"the model is complete, its score is not: {evaluation}", file=sys.stderr)
            raise
        write_json(output / "metrics.json", metrics)
        scores = {name: metrics[name] for name in ("bleu", "chrf")}
        if config.mlruns != "none":
            attempt(state, "MLflow", partial(log_to_mlflow, config, state, **scores))
    if record and record.run_path:
        print_field("modlee", f"took {record.seconds:.1f} s and recorded {record.run_path}")
        print_field("artifacts", ", ".join(record.artifacts))
        if config.push:
            record.push()
    print_field("saved", f"{output}")
    more = f"--resume {shlex.quote(str(checkpoints))} --max-epochs {2 * state.epoch}"
    print_field("", f"{checkpoints} is kept for python run.py {more}; delete it otherwise")
    example = shlex.quote(min((pair.source for pair in prepared.validation_pairs), key=len))
    print(f"\nnext:  python run.py translate --model {place}{search} {example}")
    print(f"       {evaluation} --dataset unseen.tsv")
    return 0


def resume(state: State, model: nn.Module, checkpoint: dict, about: dict) -> None:
    """Restore a checkpoint, and print the settings that have changed. Raises InputError."""
    name, was, now = state.config.resume, checkpoint["settings"], about["settings"]
    hint = "to train on others, start a new run from its model with --init"
    same = checkpoint["data"] == about["data"]
    require(same, f"the training pairs or the tokenizer are not those of {name}: {hint}")
    # Within an epoch, a batch number means another batch in another layout.
    same = checkpoint["state"]["batch"] == 0 or checkpoint["layout"] == about["layout"]
    what = "batch size, --accumulate and the number of processes must not change"
    require(same, f"{name} was stopped within an epoch: {what}")
    done, most = checkpoint["state"]["epoch"], now["max_epochs"]
    require(done <= most, f"{done} epochs are done, which is more than --max-epochs {most}")
    model.load_state_dict(checkpoint["model"])
    state.load(checkpoint)
    print_field("resumed", f"after step {state.step} of {name}")
    for name in was:
        if name not in ("resume", "tokenizer") and was[name] != now[name]:
            print_field("", f"{name} {was[name]} -> {now[name]}")


def fit(model, loaders, config: TrainConfig, prepared: Prepared, state: State):
    """Train with the selected loop. Returns Modlee's record or None."""
    if config.loop == "raw":
        print_field("modlee", "off: it needs --loop lightning")
        if config.compile:
            compile_model(model)
        train_raw(model, *loaders, config, state)
        return None
    record = start_modlee(config, prepared) if is_first_process() else None
    base = modlee_base() if record else import_lightning().LightningModule
    adapter = adapter_class(base)(dataclasses.asdict(model.config), model)
    adapter.attach(config, state)
    start = partial(train_lightning, adapter, *loaders, config)
    record.fit(adapter, start) if record else start()
    return record


def start_modlee(config: TrainConfig, prepared: Prepared) -> ModleeRecord | None:
    """Import Modlee if it is wanted and installed, and print its status in one line."""
    if not config.modlee or config.mlruns == "none":
        print_field("modlee", f"off ({'--mlruns none' if config.modlee else '--no-modlee'})")
        return None
    started, modlee = time.perf_counter(), import_modlee()
    if modlee is None:
        require(
            not config.push, "--push needs Modlee, which is not installed (Python 3.10 to 3.12)"
        )
        print_field("modlee", "not installed: training without it")
        return None
    upload = "uploads when done (--push)" if config.push else "keeps everything on this machine"
    print_field("modlee", f"{versions()['modlee']}, {upload}")
    record = ModleeRecord(modlee, config, prepared)
    record.seconds = time.perf_counter() - started
    return record


def report_run(config, prepared: Prepared, model: nn.Module, train_loader, device) -> dict:
    """Print what is about to run. Returns the first half of metrics.json."""
    counts = {"train": len(prepared.train), "validation": len(prepared.validation)}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    lost = prepared.round_trip_loss
    about = f", {config.source_lang} -> {config.target_lang}"
    if config.dataset == (data.PHRASEBOOK,):
        about = f" (built-in and artificial: not a benchmark){about}"
    elif config.subset and data.is_on_hub(config.dataset):
        about = f"/{config.subset} {config.split}{about}"
    print_field("data", " ".join(config.dataset) + about)
    pairs = f"{counts['train']:,} training and {counts['validation']:,} validation pairs"
    print_field("", pairs + data.describe_dropped(prepared.dropped))
    size = f"{config.tokenizer}, {len(prepared.tokenizer):,} tokens"
    print_field(
        "tokenizer", f"{size}; changes {lost[0]:.1%} of source, {lost[1]:.1%} of target lines"
    )
    print_field("model", f"{parameters / 1e6:.1f} M parameters, {config.positional} positions")
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print_field("device", f"{name}{threads}, {config.precision}")
    print_field("loop", f"{config.loop}, {config.max_epochs} x {len(train_loader)} batches")
    return {
        "dataset": list(config.dataset),
        "tokenizer": config.tokenizer,
        "pairs": counts | {"test": len(prepared.test_pairs)},
        "dropped": prepared.dropped,
        "round_trip_loss_source": lost[0],
        "round_trip_loss_target": lost[1],
        "parameters": parameters,
        "device": name,
        "precision": config.precision,
        "loop": config.loop,
        "padding_share": round(train_loader.batch_sampler.padding_share(), 4),
        "versions": versions(),
    }


def report_training(state: State, record: ModleeRecord | None, prepared: Prepared) -> dict:
    """Print the outcome. Returns the second half of metrics.json, without scores."""
    tokens = state.epoch * sum(int(lengths.sum()) for lengths in prepared.train.lengths)
    rate, skipped = tokens / max(state.seconds, 1e-9), count_skipped(state)
    print_field(
        "trained", f"{state.step} steps in {state.seconds:.0f} s, {rate:,.0f} real tokens/s"
    )
    if skipped:
        print_field("", f"{skipped} steps were skipped: a gradient overflowed fp16")
    which = "" if state.best_step == state.step else f", the best, of step {state.best_step}"
    losses = f"training {state.epoch_loss:.4f}, validation {state.best:.4f}{which}"
    print_field("loss", losses)
    return {
        "modlee": bool(record and record.run_path),
        "run_path": record and record.run_path,
        "artifacts": list(record.artifacts) if record else [],
        "modlee_seconds": record and round(record.seconds, 2),
        "steps": state.step,
        "skipped_steps": skipped,
        "train_seconds": round(state.seconds, 2),
        "tokens_per_second": round(rate, 1),
        "train_loss": state.epoch_loss,
        "val_loss": state.best,  # of the weights in the folder, which are the best
        "best_step": state.best_step,
        "last_val_loss": state.history["validation"][-1][1],
        **dict.fromkeys(("scored", "bleu", "chrf", "signature")),
    }


def count_skipped(state: State) -> int:
    """Steps that fp16's scaler skipped, because a gradient overflowed. Synchronises."""
    if state.config.precision != "fp16" or "optimizer" not in state.parts:
        return 0
    states = state.parts["optimizer"].state.values()
    return state.step - max((int(each["step"]) for each in states), default=0)


def print_stopped(state: State, checkpoints: Path) -> int:
    """Print how to continue. Returns the exit code."""
    print_field("stopped", f"after step {state.step}: {state.checkpoint_path}")
    resume = f"python run.py --resume {shlex.quote(str(checkpoints))}"
    print(f"\nnext:  {resume}")
    if state.epoch:
        print(f"       {resume} --max-epochs {state.epoch}  # to finish with what it has learnt")
    return 128 + (state.signal or signal.SIGTERM)


def score_model(model, prepared: Prepared, config: TrainConfig, metrics: dict) -> None:
    """Translate the test pairs, or the validation pairs if there are none, and put the scores into
    `metrics`."""
    part = "test" if prepared.test_pairs else "validation"
    pairs = prepared.test_pairs or prepared.validation_pairs
    languages = config.languages
    translator = Translator(model, prepared.tokenizer, languages, config.beam)
    hypotheses, scores = score_pairs(translator, pairs)
    metrics |= {"scored": part} | scores
    search = "greedy" if config.beam == 1 else f"beam {config.beam}"
    print_field("scored", f"{len(pairs):,} {part} pairs, {search}")
    print_score(metrics)
    for pair, hypothesis in list(zip(pairs, hypotheses))[:6]:
        print(f"\n  source       {pair.source}\n  translation  {hypothesis}")
        print(f"  reference    {pair.target}")
    print()


def score_pairs(translator: Translator, pairs: list[data.Pair]) -> tuple[list[str], dict]:
    """The translations of the sources, and their scores."""
    hypotheses = translator.translate([pair.source for pair in pairs])
    translator.report("pair")
    return hypotheses, score(hypotheses, [pair.target for pair in pairs])


def print_score(result: dict) -> None:
    print_field("BLEU", f"{result['bleu']:.2f}  {result['signature']}")
    print_field("chrF", f"{result['chrf']:.2f}  {result['chrf_signature']}")


def decoding_of(config: DecodeConfig) -> dict:
    """The arguments of `load_translator` for a command."""
    names = ("device", "precision", "beam", "length_penalty", "batch_tokens")
    return {"folder": config.model} | {name: getattr(config, name) for name in names}


def translate(config: TranslateConfig) -> int:
    check_ranges(config)
    require(config.num_return <= config.beam, "--num-return must be at most --beam")
    for text in config.text:
        require(not data.SURROGATE.search(text), f"not valid UTF-8: {text!r:.60}")
    more = {"num_return": config.num_return, "scores": config.scores}
    more["silent"] = sys.stdout.isatty()  # where the bar would be drawn over the translations
    translator = load_translator(**decoding_of(config), **more)
    sys.stdout.reconfigure(encoding="utf-8")
    typed = (line for _, line in data.decode_lines(sys.stdin.buffer, "standard input"))
    # Answers line by line when a person types.
    window = 1 if not config.text and sys.stdin.isatty() else TRANSLATE_WINDOW
    for found in translator.stream(config.text or typed, window=window):
        for text, value in found:
            if config.scores:
                text = f"{'' if value is None else format(value, '.4f')}\t{text}"
            print(text, flush=window == 1)
    translator.report("line")
    return 0


def evaluate(config: EvaluateConfig) -> int:
    check_ranges(config)
    check_output_file(config.json)
    check_output_file(config.hypotheses, key=None)
    files = [Path(name).expanduser().resolve() for name in (config.json, config.hypotheses) if name]
    require(len(set(files)) == len(files), "--json and --hypotheses are the same file")
    dataset = config.dataset
    if dataset is None:
        there = Path(config.model).expanduser().is_dir()
        require(there, f"{config.model} is not a model folder: it does not exist")
        parts = [Path(config.model).expanduser() / f"{name}.tsv" for name in ("test", "validation")]
        dataset = tuple(str(path) for path in parts if path.is_file())[:1]
        require(
            bool(dataset), f"{config.model} has no test part of its own: add --dataset pairs.tsv"
        )
    on_phrases = dataset == (data.PHRASEBOOK,)
    require(not on_phrases, "the demo trains on the phrasebook; give pairs of your own")
    translator = load_translator(**decoding_of(config))
    more = (config.subset, config.split, translator.languages, config.columns)
    pairs = whole_pairs(data.read_pairs(dataset, *more), " ".join(dataset))[: config.num_samples]
    started = time.perf_counter()
    hypotheses, scores = score_pairs(translator, pairs)
    seconds = time.perf_counter() - started
    result = {"model": config.model, "dataset": list(dataset), "pairs": len(pairs)}
    result |= {"beam": config.beam, "length_penalty": config.length_penalty}
    precision = getattr(translator.model, "precision", config.precision)  # the engine has its own
    result |= {"precision": precision, **scores}
    result |= {"seconds": round(seconds, 2), "versions": versions()}
    taken = f"{len(pairs):,} of {' '.join(dataset)}, translated in {seconds:.1f} s"
    print_field("pairs", taken)
    print_score(result)
    if config.hypotheses:
        write_text(Path(config.hypotheses).expanduser(), "".join(f"{h}\n" for h in hypotheses))
    if config.json:
        write_json(Path(config.json).expanduser(), result)
    return 0


def export(config: ExportConfig) -> int:
    output = Path(config.output).expanduser()
    to_engine = config.to == "ctranslate2"
    require(to_engine or not config.quantization, "--quantization belongs to --to ctranslate2")
    check_output(output)
    model, tokenizer, languages = load_model(config.model, torch.device("cpu"))
    what = f"CTranslate2, {config.quantization or 'float32'}"
    if not to_engine:
        exported = to_transformers(model)
        complete_tokenizer(tokenizer, model.config)
        what = f"{type(exported).__name__}, float32, for transformers"

    def fill(folder: Path) -> None:
        save_tokenizer(tokenizer, folder)
        if not to_engine:
            exported.save_pretrained(folder)
            return
        to_ctranslate2(model, tokenizer, folder, config.quantization)
        content = {"source_lang": languages[0], "target_lang": languages[1]}
        write_json(folder / ENGINE_FILE, content | {"model": dataclasses.asdict(model.config)})
        for part in ("validation.tsv", "test.tsv"):  # for `evaluate`
            path = Path(config.model).expanduser() / part
            if path.is_file():
                shutil.copy(path, folder / part)

    write_folder(output, fill)
    print_field("exported", f"{what}: {output}")
    return 0


def main(arguments: list[str]) -> int:
    """Run a command. Errors that the user can fix are reported in one line on stderr."""
    commands = {"train": train, "translate": translate, "evaluate": evaluate, "export": export}
    try:
        if arguments[:1] == ["bench"]:
            from benchmarks import lightning

            return lightning.main(arguments[1:])
        command, config = parse_command_line(arguments)
        code = commands[command](config)
        sys.stdout.flush()
        return code
    except Interrupted as stopped:
        print("interrupted", file=sys.stderr)
        return stopped.args[0]
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (InputError, OSError) as error:  # disk full, no permission, name too long
        # All processes see the same input error; an OSError may hit only one.
        if is_first_process() or isinstance(error, OSError):
            print(f"error: {data.one_line(error, None)}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:  # only CUDA has a class for out of memory
        words = ("out of memory", "can't allocate memory", "not enough memory")
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in words):
            raise
        hint = "lower --batch-tokens or --batch-size, and raise --accumulate"
        print(f"\nerror: out of memory; {hint}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    for number in STOP_SIGNALS:
        signal.signal(number, raise_interrupted)
    code = main(sys.argv[1:])
    for number in STOP_SIGNALS:  # a signal during exit would print a traceback
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
