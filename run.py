"""Train an English -> Romanian Transformer, score it, use it.

    python run.py                                     the demo: built-in corpus, two minutes
    python run.py --preset tutorial                   Modlee's settings, with a correct model
    python run.py --preset small --dataset pairs.tsv  20,000 pairs of real sentences, 20 minutes
    python run.py --preset base                       WMT16, 610,000 pairs, on a GPU
    python run.py --loop raw                          the hand-written loop over the same model
    python run.py --resume runs/NAME                  continue a run that was stopped or killed
    python run.py --init runs/NAME --dataset more.tsv start a new run from these weights
    torchrun --nproc_per_node 2 run.py                on two devices, with either loop
    python run.py translate --model runs/NAME         lines on stdin -> lines on stdout
    python run.py evaluate --model runs/NAME          BLEU and chrF on what was held out
    python run.py export --model runs/NAME --to ctranslate2 OUT   for a fast engine
    python run.py bench                               what Lightning and Modlee cost per step

In reading order: settings, data of a run, the raw loop, the Lightning adapter, the folder of a run,
curves and MLflow, what surrounds a loop, training. Using a trained model is in translate.py.
"""

import os
import signal
import sys


def set_environment() -> None:
    """Set variables that libraries read, where the user has not."""
    # Lets torch use large memory pages on Linux, which makes steps on a CPU a few per cent faster.
    # Read when torch is imported.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # MLflow 3 sends telemetry unless disabled, and by default refuses the folder of files that
    # Modlee writes to. An unreachable server it would retry for minutes.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


if __name__ == "__main__":  # before the imports, so that Ctrl-C prints no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    set_environment()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115

import argparse
import atexit
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import shlex
import subprocess
import threading
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from itertools import chain, count, islice
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import tyro

# ---- settings ------------------------------------------------------------------------------------


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
    output: str | None = None  # folder of the run; None: a new one under runs/
    checkpoint_every: float = 10.0  # minutes between checkpoints, with one more at the end
    resume: str | None = None  # continue the run in this folder
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
# What --resume takes, because it changes nothing in the steps that are done.
RESUMABLE = {"max_epochs", "loop", "compile", "beam", "device", "precision", "checkpoint_every"}
RESUMABLE |= {"output", "resume", "modlee", "push", "mlruns"}
MODEL_SIZES = ("d_model", "nhead", "num_encoder_layers", "num_decoder_layers", "dim_feedforward")
MODEL_SIZES += ("activation", "positional", "norm_first", "max_length")
HELP = {"--help", "-h"}


def parse_settings(arguments: list[str]) -> TrainConfig:
    """Precedence: flags, then the preset, the resumed run or the initial model, then the defaults.
    Raises InputError for a flag that contradicts the resumed run or the initial model."""
    early = argparse.ArgumentParser("python run.py", add_help=False, allow_abbrev=False)
    for flag in ("--preset", "--resume", "--init"):
        early.add_argument(flag)
    given, _ = early.parse_known_args(arguments)
    settings, fixed = PRESETS.get(given.preset, {}), {}
    if not HELP & set(arguments):
        if given.resume is not None:
            settings = read_settings(given.resume)
            fixed = {name: settings[name] for name in settings.keys() - RESUMABLE}
        elif given.init is not None:
            languages, fixed = settings_of_model(given.init)
            settings = settings | languages | fixed
    defaults = TrainConfig(**settings)
    config = tyro.cli(TrainConfig, args=arguments, prog="python run.py", default=defaults)
    for name, value in fixed.items():
        found, hint = getattr(config, name), f"{config.init} has {value}; leave the flag out"
        if config.resume is not None:
            hint = f"{config.resume} has {value}, and --resume cannot change it; for a new run "
            hint += "from its model there is --init"
        require(found == value, f"{flag_of(name)} {found}: {hint}")
    return config


if __name__ == "__main__" and HELP & set(sys.argv) and not sys.argv[1].isalpha():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it in silence
    parse_settings(sys.argv[1:])  # answers and exits, before torch takes seconds to load

import numpy as np
import torch
from torch import Tensor, distributed, nn
from tqdm import tqdm

import data
import modlee_record
import translate
from data import InputError, is_first_process, print_field, require
from positional import POSITIONAL_KINDS
from seq2seq import Seq2SeqConfig, TransformerSeq2SeqModel
from translate import check_range, flag_of, write_file, write_json


def check_settings(config: TrainConfig) -> None:
    """Raise InputError for impossible settings, before anything is read or written."""
    check_range(config, "max_epochs batch_size batch_tokens accumulate num_samples max_length", 1)
    check_range(config, "learning_rate weight_decay clip_norm checkpoint_every seed", 0)
    check_range(config, "validation_size test_size", 0)
    check_range(config, "warmup cooldown label_smoothing", 0, 0.99)
    check_range(config, "beam", 1, 1000)
    for name in ("dataset", "validation_set", "test_set"):
        require(getattr(config, name) != (), f"{flag_of(name)} needs a value")
    for name in ("validation_size", "test_size"):
        value = getattr(config, name)
        require(value < 1 or value % 1 == 0, f"{flag_of(name)}: a share below 1 or a whole number")
    require(config.warmup + config.cooldown <= 1, "--warmup plus --cooldown must be at most 1")
    require(config.output != "", "--output needs a name")
    require(config.mlruns != "", "--mlruns needs a name; none: nothing is recorded")
    require(not config.compile or config.loop == "raw", "--compile is for --loop raw")
    kind, _, size = config.tokenizer.partition(":")
    right = kind != "train" or size.isdecimal()
    require(right, f"--tokenizer {config.tokenizer}: write train:N, for example train:8000")
    if config.preset == "small" and config.dataset == (data.PHRASEBOOK,):
        raise InputError("--preset small is for pairs of your own: add --dataset FILE")
    if config.push:
        records = config.loop == "lightning" and config.modlee and config.mlruns != "none"
        require(records, "--push uploads what Modlee records, which is switched off")
        key = os.environ.get("MODLEE_API_KEY")
        require(bool(key), "--push needs your key in the environment variable MODLEE_API_KEY")
        missing = "--push needs Modlee, which is not installed (Python 3.10 to 3.12)"
        require(find_spec("modlee") is not None, missing)
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
    validation, test = (read_held_out(config, name) for name in ("validation_set", "test_set"))
    held_out = {data.text_key(pair.source) for pair in chain(validation or (), test or ())}
    dropped, over_long = Counter(), Counter()
    pairs = data.read_pairs(config.dataset, config.subset, config.split, languages, config.columns)
    bar = partial(data.progress_bar, unit=" pairs", unit_scale=True, leave=False, delay=2)
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
    """The pairs of --validation-set or --test-set. None: hold pairs out of the training data.
    Raises InputError if a set given by hand does not exist."""
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
            data.note(f"{what} (from the preset): pairs are held out instead")
            return None
    pairs = data.read_pairs(*source, config.languages, config.columns)
    return translate.whole_pairs(pairs, " ".join(names))


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
    sampling = {"batch_tokens": config.batch_tokens, "seed": config.seed}
    if distributed.is_initialized():
        sampling |= {"rank": distributed.get_rank(), "world": distributed.get_world_size()}
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
        try:
            autocast(device, name)
        except RuntimeError as error:  # MPS, before torch 2.5
            raise InputError(f"--precision {name}: {data.one_line(error)}") from None
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
        data.note(f"ignoring --compile: {data.one_line(error)}")
        return False
    # By layer: layers of a kind share one graph, and what depends on pads stays outside.
    for layer in (*model.encoder_layers, *model.decoder_layers):
        layer.compile(dynamic=True)
    return True


# ---- the raw loop --------------------------------------------------------------------------------
# To copy it: contextlib, math, dataclass, field, islice, Iterator; torch, Tensor, distributed, nn.

LOG_EVERY = 20  # optimizer steps between points of the loss curve; the host waits only there
FP16_SCALE = 2.0**6  # of the loss, at first: lower than torch's, since a sum is scaled, not a mean


@dataclass
class Progress:
    """How far training is: with the states of model and optimizer, all that resuming needs."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # index of the current epoch
    batch: int = 0  # batches of it that are done
    # Loss and tokens [2] since the last point, on the device: no step waits for them.
    sums: Tensor = field(default_factory=lambda: torch.zeros(2))
    # Points (step, value); losses in nats per token.
    history: dict = field(default_factory=lambda: {"train": [], "validation": [], "rate": []})

    def add(self, loss_sum: Tensor, tokens: Tensor) -> None:
        self.sums = self.sums.to(loss_sum.device) + torch.stack([loss_sum.detach(), tokens])

    def log(self, config, rate: float) -> None:
        """Turn the sums into a point. Waits for the device."""
        loss, self.sums = mean_loss(self.sums), torch.zeros_like(self.sums)
        if math.isfinite(loss) or config.precision != "fp16":  # whose scaler skips such steps
            self.record("train", loss)
            self.history["rate"].append((self.step, rate))

    def record(self, name: str, loss: float) -> None:
        """Add a point. Raises FloatingPointError if the loss is not finite."""
        if not math.isfinite(loss):
            raise FloatingPointError(f"the {name} loss at step {self.step} is {loss}")
        self.history[name].append((self.step, loss))


class Hooks:
    """What surrounds a loop. This one prints; override its methods to save, stop or show more."""

    due = False  # whether to save now
    stop = False  # whether to end now

    def begin(self, progress: Progress, batches: int, model, optimizer, scaler) -> None: ...
    def save(self, progress: Progress) -> None: ...

    def after_step(self, progress: Progress) -> None:
        if progress.step % LOG_EVERY == 0:
            print("train", *progress.history["train"][-1:], flush=True)

    def after_epoch(self, progress: Progress) -> None:
        print("validation", *progress.history["validation"][-1:], flush=True)


def autocast(device: torch.device, precision: str):
    """The context of a forward pass; nothing for fp32, since not every device has autocast."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()


def build_optimizer(model: nn.Module, config) -> torch.optim.Optimizer:
    """Adam, or AdamW (Loshchilov and Hutter 2019) that keeps norms and biases from decay."""
    make, groups = torch.optim.Adam, list(model.parameters())
    # One kernel, and an fp16 overflow skips the step without the host waiting. CPU: since 2.4.
    fused = groups[0].is_cuda or (groups[0].is_cpu and torch.__version__ >= (2, 4)) or None
    if config.weight_decay:
        matrices, others = [p for p in groups if p.dim() > 1], [p for p in groups if p.dim() <= 1]
        make, groups = torch.optim.AdamW, [{"params": others, "weight_decay": 0.0}]
        groups.append({"params": matrices, "weight_decay": config.weight_decay})
    return make(groups, config.learning_rate, fused=fused)


def learning_rate(config, step: int, total_steps: int) -> float:
    """A trapezoid: up for a share of `warmup`, flat, down for `cooldown` (Hägele et al. 2024)."""
    rising = (step + 1) / max(1.0, config.warmup * total_steps)
    falling = (total_steps - step) / max(1.0, config.cooldown * total_steps)
    return config.learning_rate * max(0.0, min(1.0, rising, falling))


def start_step(optimizer, config, progress: Progress, batches: int) -> None:
    """Set learning rate and random state (dropout) by the place in the run; resuming repeats it."""
    per_epoch = math.ceil(batches / config.accumulate)
    done = progress.epoch * per_epoch + progress.batch // config.accumulate
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, done, config.max_epochs * per_epoch)
    # Not torch.manual_seed, which records the stack until CUDA is used: 0.5 ms inside Lightning.
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    seed = config.seed * 1_000_003 + progress.step + rank * 97_000_003
    torch.default_generator.manual_seed(seed)
    device = optimizer.param_groups[0]["params"][0].device.type
    if device != "cpu":
        getattr(torch, device).manual_seed(seed)


def on_device(loader, device: torch.device) -> Iterator[list[Tensor]]:
    """Batches on the device; to CUDA without the host waiting (to MPS that is unsafe)."""
    for batch in loader:
        if device.type == "cuda":
            batch = [ids.pin_memory() for ids in batch]
        yield [ids.to(device, non_blocking=device.type == "cuda") for ids in batch]


def finish_gradients(model: nn.Module, config, tokens: Tensor) -> None:
    """From the gradients of (summed loss / accumulate) to those of the mean over the tokens [] of
    the step, in which each counts the same: no mean of means. Then clip their norm."""
    factor = config.accumulate
    if distributed.is_initialized():  # DDP has averaged the gradients over the processes
        distributed.all_reduce(tokens)
        factor *= distributed.get_world_size()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    torch._foreach_mul_(gradients, factor / tokens.clamp_min(1))
    if config.clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)


def mean_loss(sums: Tensor) -> float:
    """Sums [2] of loss and tokens -> nats per token, over all processes. Waits for the device."""
    if distributed.is_initialized():
        distributed.all_reduce(sums)
    loss, tokens = sums.tolist()
    return loss / max(tokens, 1)


def train_raw(
    model: nn.Module, train_loader, validation_loader, config, progress=None, hooks=None
) -> Progress:
    """Train `model(input_ids, labels=..., label_smoothing=...)` -> (summed loss [], tokens []) on
    loaders of (input_ids, labels), in plain PyTorch; under torchrun with a process per device.

    config: max_epochs, accumulate, learning_rate, weight_decay, warmup, cooldown, clip_norm,
    label_smoothing, precision ("fp32", "bf16", "fp16"), seed.
    """
    progress, hooks = progress or Progress(), hooks or Hooks()
    device, batches = next(model.parameters()).device, len(train_loader)
    optimizer, smoothing = build_optimizer(model, config), config.label_smoothing
    scaler = torch.amp.GradScaler(device.type, FP16_SCALE, enabled=config.precision == "fp16")
    network = model
    if distributed.is_initialized():
        network = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    hooks.begin(progress, batches, model, optimizer, scaler)

    for epoch in range(progress.epoch, config.max_epochs):
        torch.manual_seed(config.seed * 1_000_003 - 1 - epoch)  # by which a plain loader shuffles
        for sampler in (train_loader.sampler, train_loader.batch_sampler):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        model.train()
        rest = islice(on_device(train_loader, device), progress.batch, None)  # what is not done
        while window := list(islice(rest, config.accumulate)):  # the batches of a step
            start_step(optimizer, config, progress, batches)
            optimizer.zero_grad(set_to_none=True)
            step_tokens = 0
            for number, (ids, labels) in enumerate(window, 1):
                alone = network is not model and number < len(window)  # DDP reduces once per step
                with network.no_sync() if alone else contextlib.nullcontext():
                    with autocast(device, config.precision):
                        loss_sum, tokens = network(ids, labels=labels, label_smoothing=smoothing)
                    scaler.scale(loss_sum / config.accumulate).backward()
                step_tokens = step_tokens + tokens
                progress.add(loss_sum, tokens)
            scaler.unscale_(optimizer)
            finish_gradients(model, config, step_tokens)
            scaler.step(optimizer)
            scaler.update()
            progress.step, progress.batch = progress.step + 1, progress.batch + len(window)
            if progress.step % LOG_EVERY == 0 or progress.batch == batches:
                progress.log(config, optimizer.param_groups[0]["lr"])
            hooks.after_step(progress)
            if progress.batch == batches:
                progress.record("validation", validate(model, validation_loader, config))
                progress.epoch, progress.batch = epoch + 1, 0
                hooks.after_epoch(progress)
            if hooks.due:
                hooks.save(progress)
            if hooks.stop:
                return progress
    return progress


@torch.no_grad()
def validate(model: nn.Module, loader, config) -> float:
    """Loss in nats per token over a loader, without dropout or smoothing."""
    device = next(model.parameters()).device
    sums = torch.zeros(2, device=device)
    model.eval()
    for ids, labels in on_device(loader, device):
        with autocast(device, config.precision):
            sums += torch.stack(model(ids, labels=labels, label_smoothing=0.0))
    return mean_loss(sums)


# ---- the Lightning adapter -----------------------------------------------------------------------


def adapter_class(base: type) -> type:
    """The LightningModule around a model; `base` is LightningModule or Modlee's subclass of it.
    Batches come in the order of the raw loop if their sampler has `set_epoch`."""

    class TextToTextAdapter(base):
        def __init__(self, model_config=None, model=None, *args, **kwargs):
            super().__init__()
            # Imported here, because Modlee copies this method into a file of its own.
            from seq2seq import TransformerSeq2SeqModel

            self.model_config = model_config  # a plain dict, so that Modlee keeps it
            self.model = model or TransformerSeq2SeqModel(**model_config)
            self.save_hyperparameters("model_config")  # for `load_from_checkpoint`
            self.batches = self.sums = 0  # of an epoch; of the validation: loss and tokens [2]

        def attach(self, config, progress=None, hooks=None) -> None:
            """Set what training needs, but Modlee's rebuilding does not."""
            self.config, self.progress = config, progress or Progress()
            self.hooks = hooks or Hooks()

        def forward(self, input_ids, decoder_input_ids=None):
            return self.model(input_ids, decoder_input_ids)

        def configure_optimizers(self):
            return build_optimizer(self.model, self.config)

        def on_train_start(self) -> None:
            check_trainer(self.trainer, self.config, self.progress)
            self.batches = self.trainer.num_training_batches
            self.optimizer = self.trainer.optimizers[0]
            self.scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            self.hooks.begin(self.progress, self.batches, self.model, self.optimizer, self.scaler)

        def training_step(self, batch, batch_idx):
            if self.progress.batch % self.config.accumulate == 0:
                start_step(self.optimizer, self.config, self.progress, self.batches)
                self.step_tokens = 0
            (ids, labels), smoothing = batch, self.config.label_smoothing
            loss_sum, tokens = self.model(ids, labels=labels, label_smoothing=smoothing)
            self.step_tokens = self.step_tokens + tokens
            self.progress.add(loss_sum, tokens)
            return loss_sum  # which Lightning divides by `accumulate`

        def configure_gradient_clipping(self, optimizer, *args, **kwargs) -> None:
            # Lightning leaves unscaling to a fused optimizer, which does it after clipping.
            if self.scaler is not None and optimizer.param_groups[0].get("fused"):
                self.scaler.unscale_(optimizer)
            finish_gradients(self.model, self.config, self.step_tokens)

        def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
            progress = self.progress
            progress.batch += 1
            ends_epoch = progress.batch == self.batches
            if ends_epoch or progress.batch % self.config.accumulate == 0:
                progress.step += 1
                if ends_epoch or progress.step % LOG_EVERY == 0:
                    progress.log(self.config, self.optimizer.param_groups[0]["lr"])
                self.hooks.after_step(progress)
                if not ends_epoch:
                    save_and_stop(self)

        def validation_step(self, batch, batch_idx) -> None:
            self.sums += torch.stack(self.model(batch[0], labels=batch[1], label_smoothing=0.0))

        def on_validation_epoch_end(self) -> None:
            loss, self.sums, progress = mean_loss(self.sums), 0, self.progress
            self.log("val_loss", loss, rank_zero_only=True)
            if self.batches and progress.batch == self.batches:  # not in a sanity check
                progress.record("validation", loss)
                progress.epoch, progress.batch = progress.epoch + 1, 0
                self.hooks.after_epoch(progress)
                save_and_stop(self)

    return TextToTextAdapter


def save_and_stop(adapter) -> None:
    """What the hooks ask for at the end of a step or of an epoch."""
    if adapter.hooks.due:
        adapter.hooks.save(adapter.progress)
    if adapter.hooks.stop:
        adapter.trainer.should_stop = True
        adapter.trainer.limit_val_batches = 0  # or it would validate before it stops


def check_trainer(trainer, config, progress: Progress) -> None:
    """Raise ValueError if a Trainer would train otherwise than the settings say."""
    wanted = {"max_epochs": [config.max_epochs], "accumulate_grad_batches": [config.accumulate]}
    wanted |= {"gradient_clip_val": [None, 0, config.clip_norm], "max_steps": [-1]}
    wanted |= {"limit_train_batches": [1.0], "enable_validation": [True]}
    wanted |= {"check_val_every_n_epoch": [1], "val_check_interval": [1.0]}
    names = {"fp32": ["32-true"], "bf16": ["bf16-mixed"], "fp16": ["16-mixed"]}
    wanted["precision"] = names.get(config.precision, [trainer.precision])
    for name, values in wanted.items():
        found = getattr(trainer, name)
        share = name in ("limit_train_batches", "val_check_interval")  # 1 is a number of batches
        if found not in values or (share and isinstance(found, int)):
            raise ValueError(f"the Trainer has {name}={found}, the adapter needs {values[-1]}")
    if trainer.global_step != progress.step:
        at = f"ckpt_path is at step {trainer.global_step}, the adapter at step {progress.step}"
        raise ValueError(f"{at}: give its Progress to attach(), or leave ckpt_path out")


def train_lightning(adapter, train_loader, validation_loader, config, **changes) -> None:
    """`Trainer.fit` on the adapter. changes: of the Trainer's arguments."""
    lightning, progress = import_lightning(), adapter.progress
    device = next(adapter.parameters()).device.type
    here, world = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1
    if distributed.is_initialized():
        world = distributed.get_world_size()
    precision = {"precision": {"fp32": "32-true", "bf16": "bf16-mixed"}.get(config.precision)}
    if config.precision == "fp16":
        scaler = torch.amp.GradScaler(device, FP16_SCALE)
        plugin = lightning.plugins.MixedPrecision("16-mixed", device, scaler)
        precision = {"plugins": [plugin]}
    arguments = {
        "accelerator": "gpu" if device == "cuda" else device,
        "devices": here,
        "num_nodes": world // here,
        "strategy": "auto",
        "max_epochs": config.max_epochs,
        "accumulate_grad_batches": config.accumulate,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,  # the hooks have one, which costs less
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # the batch sampler is already ours
    }
    if world > 1:
        arguments["strategy"] = lightning.strategies.DDPStrategy(broadcast_buffers=False)
    trainer = lightning.Trainer(**(arguments | precision | changes))
    if progress.step:
        continue_from(progress, trainer.fit_loop, train_loader)
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        # Collating is cheaper than passing batches between processes.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        # Our batch sampler starts at the right batch.
        warnings.filterwarnings("ignore", ".*dataloader is not resumable.*")
        # The loss is averaged over all processes before it is logged.
        warnings.filterwarnings("ignore", ".*sync_dist.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")  # caused by the newest Lightning itself
        trainer.fit(adapter, train_loader, validation_loader)


def continue_from(progress: Progress, loop, train_loader) -> None:
    """Make Lightning start at progress.epoch and progress.batch, as its own checkpoint would."""
    state, begun = loop.state_dict(), progress.epoch + (progress.batch > 0)
    epochs = {"ready": begun, "started": begun}
    epochs |= {"processed": progress.epoch, "completed": progress.epoch}
    batches = dict.fromkeys(epochs, progress.batch)
    for span in ("total", "current"):
        state["epoch_progress"][span].update(epochs)
        state["epoch_loop.batch_progress"][span].update(batches)
    optimizer = state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    optimizer["step"]["total"].update(ready=progress.step, completed=progress.step)
    state["epoch_loop.state_dict"]["_batches_that_stepped"] = progress.step
    loop.load_state_dict(state)
    # Only in the middle of an epoch; at its start, "restarting" would validate first.
    loop.restarting = progress.batch > 0
    # Lightning does not skip the batches that are done.
    train_loader.batch_sampler.start = (progress.epoch, progress.batch)


def import_lightning():
    """lightning.pytorch, without its startup messages."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*pkg_resources.*")  # of 2.3
        import lightning.pytorch
    for name in ("lightning.pytorch", "pytorch_lightning"):  # it logs under either
        logging.getLogger(name).setLevel(logging.WARNING)
    return lightning.pytorch


# ---- the folder of a run -------------------------------------------------------------------------
# While it trains, runs/NAME has loss.png and checkpoints/: the newest two states, the settings and,
# after --init, the tokenizer. Then model.safetensors, the tokenizer's files, metrics.json,
# validation.tsv, test.tsv and, last of all, config.json.


class TrainingError(Exception):
    """Training cannot go on. The message is one line and says what to do next."""


def steps_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    return sorted((folder / "checkpoints").glob("step-*.pt"))


@contextlib.contextmanager
def run_folder(config: TrainConfig) -> Iterator[Path]:
    """The folder of a run, the same in all processes: of the run to resume, or a new one, which is
    deleted if nothing is in it at the end. Raises InputError if it is taken."""
    names = [config.output]
    paths = [Path(name or ".").expanduser().resolve() for name in (config.output, config.resume)]
    is_new = is_first_process() and (config.resume is None or paths[0] != paths[1])
    if is_new:
        names = [str(create_folder(config))]
    if distributed.is_initialized():
        distributed.broadcast_object_list(names)
    folder = Path(names[0]).expanduser()
    try:
        yield folder
    finally:
        for path in (folder / "checkpoints", folder) if is_new else ():
            with contextlib.suppress(OSError):  # something is in it
                path.rmdir()


def create_folder(config: TrainConfig) -> Path:
    """The new folder of a new run."""
    now = f"runs/{datetime.now():%Y%m%d-%H%M%S}-{config.preset}"
    names = chain([now], (f"{now}-{number}" for number in count(2)))
    for name in names if config.output is None else [config.output]:
        folder = Path(name).expanduser()
        checkpoints = folder / "checkpoints"
        if config.output is not None:
            hint = f"continue it with --resume {shlex.quote(name)}, or choose another folder"
            require(not steps_in(folder), f"{folder} belongs to another run: {hint}")
            left = {path.name for path in folder.iterdir()} if checkpoints.is_dir() else {""}
            if not left <= {"checkpoints", "loss.png"}:  # of a run without a checkpoint
                translate.check_free(folder)
        try:
            checkpoints.mkdir(parents=True, exist_ok=config.output is not None)
            return folder
        except OSError as error:
            if isinstance(error, FileExistsError) and checkpoints.exists():
                continue  # another run has just chosen the same name
            reason = f"{data.one_line(error)}; choose another --output"
            raise InputError(f"cannot create {checkpoints}: {reason}") from None


def read_settings(resume: str) -> dict:
    """The settings of the run to resume. Raises InputError."""
    folder = Path(resume).expanduser()
    path = folder / "checkpoints" / "settings.json"
    if not path.is_file():
        older = [p for p in (folder, Path(f"{folder}.checkpoints")) if p.suffix == ".checkpoints"]
        older = [old for old in older if old.is_dir()]
        what = f"{resume} is not the folder of a run: {path} is missing"
        if older:
            what = f"{older[0]} was written by an older version, which this one cannot resume"
        raise InputError(f"{what}; --init starts a new run from a model folder")
    saved = json.loads(path.read_text(encoding="utf-8"))
    settings = {n: tuple(v) if isinstance(v, list) else v for n, v in saved.items()}
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    require(settings.keys() == known, f"{resume} was written by another version of this program")
    if (path.parent / "tokenizer").is_dir():
        settings["tokenizer"] = str(path.parent / "tokenizer")
    return settings | {"output": str(folder), "resume": resume}


def write_checkpoint(folder: Path, content: dict, last: Path | None) -> Path:
    """Write a checkpoint beside `last`, the newest so far; older ones go. Raises OSError."""
    path = folder / "checkpoints" / f"step-{content['step']:09}.pt"
    outdated = [old for old in steps_in(folder) if old != last]
    left = [*folder.glob(".[0-9]*"), *path.parent.glob(".[0-9]*")]  # by a killed process
    for old in (*outdated, *left):
        old.unlink()
    write_file(path, partial(torch.save, content))
    return path


def read_checkpoint(folder: Path) -> tuple[Path, dict]:
    """The newest checkpoint that can be read; unreadable ones are reported and set aside. No code
    in them is executed. Raises InputError if there is none."""
    for path in reversed(steps_in(folder)):
        try:
            with path.open("rb") as file:
                # Another format than zip could execute code, up to torch 2.5 (CVE-2025-32434).
                if file.read(4) != b"PK\x03\x04":
                    raise ValueError("it is not a zip archive")
                if damaged := zipfile.ZipFile(file).testzip():  # torch compares no checksums
                    raise ValueError(f"{damaged} is damaged")
            return path, torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - of many types
            if is_first_process():
                data.note(f"{path} cannot be read ({data.one_line(error)}): it is set aside")
                path.rename(path.with_suffix(".damaged"))  # and counts as none of the newest
    raise InputError(f"--resume: there is no checkpoint in {folder} yet; start the run again")


def digest_pairs(pairs: data.PairDataset) -> str:
    """SHA-256 of the token ids, in order."""
    content = hashlib.sha256()
    for ids in (*pairs.lengths, *pairs.sources, *pairs.targets):
        content.update(ids.tobytes())
    return content.hexdigest()


def save_model(
    folder: Path, model: nn.Module, prepared: Prepared, config: TrainConfig, metrics: dict
) -> None:
    """Write a model folder, with the pairs that were held out."""
    from safetensors.torch import save_model as save_weights

    languages = config.languages
    content = {"source_lang": languages[0], "target_lang": languages[1]}
    content |= {"model": dataclasses.asdict(model.config), "training": dataclasses.asdict(config)}
    parts = {"validation.tsv": prepared.validation_pairs, "test.tsv": prepared.test_pairs}

    def fill(temporary: Path) -> None:
        translate.save_tokenizer(prepared.tokenizer, temporary)
        save_weights(model, str(temporary / "model.safetensors"))
        write_json(temporary / "config.json", content)
        write_json(temporary / "metrics.json", metrics)
        for name, pairs in parts.items():
            text = "".join(f"{source}\t{target}\n" for source, target in [languages, *pairs])
            if pairs:
                translate.write_text(temporary / name, text)

    translate.write_model_folder(folder, fill)


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

TRACKING_URI = os.environ.get("MLFLOW_TRACKING_URI") or None  # MLflow overwrites the variable


def draw_curves(path: Path, history: dict[str, list[tuple[int, float]]]) -> None:
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
        (rates, "rate", "learning rate", "k:"),
    ):
        if points := history.get(name):
            axes.plot(*zip(*points), style, label=label)
    losses.set(ylabel="loss (nats per token)", yscale="log")
    losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    losses.yaxis.set_major_formatter("{x:g}")  # 0.1 and not 10^-1
    losses.yaxis.set_minor_formatter(NullFormatter())
    top = 1.05 * max((bleu for _, bleu in history.get("bleu", [])), default=0) or 1
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


class MlflowRun:
    """The curves and scores of a run in MLflow: in Modlee's run, or in one of our own."""

    def __init__(self, config: TrainConfig, name: str):
        self.config, self.name, self.id = config, name, None
        self.sent = Counter()  # points of each name

    def log(self, history: dict[str, list[tuple[int, float]]], **final: float) -> None:
        """Send what is new in the history, and final scores."""
        import mlflow

        if mlflow.active_run() is None:
            set_mlflow_store(self.config.mlruns)
            mlflow.start_run(run_id=self.id)
        if self.id is None:
            self.id = mlflow.active_run().info.run_id
            mlflow.set_tag("mlflow.runName", self.name)
            # With a prefix: autolog has already logged a "weight_decay", which is Adam's default.
            settings = dataclasses.asdict(self.config).items()
            mlflow.log_params({f"config.{name}": value for name, value in settings})
        for name, points in history.items():
            for step, value in points[self.sent[name] :]:
                mlflow.log_metric(name, value, step=step)
            self.sent[name] = len(points)
        for name, value in final.items():
            mlflow.log_metric(f"final_{name}", value)

    def close(self, status: str) -> None:
        if self.id is not None:
            import mlflow

            mlflow.end_run(status)
            # Modlee's run has ended with the fit.
            mlflow.MlflowClient().set_terminated(self.id, status)


# ---- what surrounds the loop of a run ------------------------------------------------------------

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Raised on a signal, with the exit code. Not KeyboardInterrupt, which Lightning swallows."""


def raise_interrupted(number: int, frame) -> NoReturn:
    raise Interrupted(128 + number)


@contextlib.contextmanager
def stopping_on_signals(hooks: "RunHooks") -> Iterator[None]:
    """Ctrl-C or SIGTERM ends training after the current step; before the first, the program. In
    another thread than the main one, which alone handles signals, nothing."""

    def handle(number: int, frame) -> None:
        first, hooks.signal = not hooks.signal, number
        if not hooks.started:
            raise_interrupted(number, frame)
        if first:
            with contextlib.suppress(OSError):  # `| tee log` has ended by the same Ctrl-C
                os.write(2, b"\nstopping after this step ...\n")  # print is not reentrant

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = [signal.signal(number, handle) for number in STOP_SIGNALS]
    hooks.handler = handle
    try:
        yield
    finally:
        hooks.handler = None
        for number, handler in zip(STOP_SIGNALS, previous):
            # A second signal must not interrupt an orderly stop.
            signal.signal(number, signal.SIG_IGN if hooks.stop else handler)


class RunHooks(Hooks):
    """Progress bar and checkpoints; after an epoch BLEU, two samples, loss.png and MLflow.

    Attributes:
        found: what checkpoints hold beside the progress: `seconds` in steps, checkpoints and
            validation; `best`, the lowest validation loss, with its `step` and its `weights`,
            which are on the CPU.
        last: the newest checkpoint, if there is one.
        signal: the number of the one that asks training to stop.
    """

    def __init__(self, config: TrainConfig, prepared: Prepared, folder: Path, about, resumed=None):
        """about: of the data, for checkpoints. resumed: what `read_checkpoint` returned."""
        self.config, self.prepared, self.folder, self.about = config, prepared, folder, about
        self.given = config  # as the command line has it, for `--resume`
        self.last, self.resumed = resumed or (None, {})
        self.found = {"seconds": 0.0, "best": math.inf, "step": 0, "weights": None}
        self.found |= self.resumed.get("found", {})
        self.signal, self.handler, self.started, self.bar = 0, None, 0.0, None
        self.mlflow, self.given_up = MlflowRun(config, folder.name), set()

    def begin(self, progress: Progress, batches: int, model, optimizer, scaler) -> None:
        self.batches, self.model, self.optimizer, self.scaler = batches, model, optimizer, scaler
        if self.resumed:
            # Only the moments: the optimizer keeps its own settings, such as fused kernels.
            groups = optimizer.state_dict()["param_groups"]
            moments = {"state": self.resumed["optimizer"], "param_groups": groups}
            optimizer.load_state_dict(moments)
            if scaler is not None and self.resumed["scaler"]:
                scaler.load_state_dict(self.resumed["scaler"])
            self.resumed = {}
        if self.handler:  # again: Lightning has put another in its place
            signal.signal(signal.SIGTERM, self.handler)
        self.first_batch = progress.batch  # of the epoch, for the bar
        self.saved_at = time.perf_counter()
        self.started = self.saved_at - self.found["seconds"]

    def after_step(self, progress: Progress) -> None:
        if self.bar is None:
            title = f"epoch {progress.epoch + 1}/{self.config.max_epochs}"
            self.bar = data.progress_bar(desc=title, total=self.batches, initial=self.first_batch)
        self.bar.update(progress.batch - self.bar.n)
        self.found["seconds"] = time.perf_counter() - self.started
        logged = progress.step % LOG_EVERY == 0
        if logged and progress.history["train"]:
            shown = {"train_loss": f"{progress.history['train'][-1][1]:.3f}"}
            self.bar.set_postfix(shown | {"left": self.time_left(progress)}, refresh=False)
        self.due = False
        if logged or not distributed.is_initialized():
            late = time.perf_counter() - self.saved_at >= 60 * self.config.checkpoint_every
            self.decide(progress, logged and late)

    def decide(self, progress: Progress, due: bool) -> None:
        """Set `due` and `stop`, alike in all processes."""
        wishes = torch.tensor([due, self.signal != 0], dtype=torch.int32)
        if distributed.is_initialized():
            wishes = wishes.to(progress.sums.device)
            distributed.all_reduce(wishes, op=distributed.ReduceOp.MAX)
        self.stop = bool(wishes[1])
        self.due = bool(wishes[0]) or self.stop

    def after_epoch(self, progress: Progress) -> None:
        self.bar.close()
        self.bar, self.first_batch = None, 0
        self.found["seconds"] = time.perf_counter() - self.started
        step, loss = progress.history["validation"][-1]
        if loss < self.found["best"]:
            weights = self.model.state_dict()
            self.found |= {"best": loss, "step": step}
            self.found["weights"] = {name: weights[name].cpu().clone() for name in weights}
        if is_first_process():
            self.show(progress)
        self.started = time.perf_counter() - self.found["seconds"]  # samples do not count
        self.decide(progress, self.due or progress.epoch == self.config.max_epochs)

    def show(self, progress: Progress) -> None:
        """BLEU of 100 validation pairs, a line with the time left, two samples; the curves in
        loss.png; all points in MLflow."""
        pairs, config = self.prepared.validation_pairs, self.config
        # Spread over the set, which may be a concatenation of several.
        rows = np.linspace(0, len(pairs) - 1, min(100, len(pairs))).astype(int)
        sources, references = zip(*(pairs[row] for row in rows))
        tools = (self.model, self.prepared.tokenizer, config.languages)
        translations = translate.Translator(*tools, silent=True).translate(list(sources))
        bleu = translate.score(translations, references)["bleu"]
        progress.history.setdefault("bleu", []).append((progress.step, bleu))
        train, validation = (progress.history[name][-1][1] for name in ("train", "validation"))
        best = " (best)" if self.found["step"] == progress.step else ""
        tqdm.write(
            f"epoch {progress.epoch}/{config.max_epochs}: train {train:.3f}, validation "
            f"{validation:.3f}{best}, BLEU {bleu:.1f} of {len(rows)} pairs, "
            f"{self.time_left(progress)} left",
            file=sys.stderr,
        )
        for source, translation in list(zip(sources, translations))[:2]:
            tqdm.write(f"    {source}\n    {translation}", file=sys.stderr)
        self.attempt("loss.png", draw_curves, self.folder / "loss.png", progress.history)
        if config.mlruns != "none":
            self.attempt("MLflow", self.mlflow.log, progress.history)

    def time_left(self, progress: Progress) -> str:
        """Estimated from the share of the run that is done, as 1:23:45."""
        share = (progress.epoch + progress.batch / self.batches) / self.config.max_epochs
        seconds = round(self.found["seconds"] * (1 / share - 1))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def attempt(self, what: str, function: Callable, *arguments, **more) -> None:
        """Call a function that must not end training. After an error print a note, never retry."""
        if what not in self.given_up:
            try:
                function(*arguments, **more)
            except Exception as error:  # noqa: BLE001 - a store may raise anything
                data.note(f"{what} failed and is disabled: {data.one_line(error)}")
                self.given_up.add(what)

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, in the first process. Raises FloatingPointError if a weight is not
        finite, and TrainingError if it cannot be written and training is not complete."""
        self.saved_at = time.perf_counter()
        for name, weight in self.model.state_dict().items():
            if not weight.isfinite().all():
                raise FloatingPointError(f"{name} after step {progress.step} is not finite")
        if not is_first_process():
            return
        newest = steps_in(self.folder)[-1:]
        if newest and newest[0] != self.last:
            raise TrainingError(f"another run writes to {self.folder}: {newest[0]} is not of this")
        content = self.about | {"step": progress.step, "progress": vars(progress)}
        content |= {"model": self.model.state_dict(), "found": self.found}
        content["optimizer"] = self.optimizer.state_dict()["state"]
        content["scaler"] = self.scaler.state_dict() if self.scaler else {}
        try:
            self.keep_settings()
            self.last = write_checkpoint(self.folder, content, self.last)
        except OSError as error:
            if progress.epoch == self.config.max_epochs:  # the model may still fit
                data.note(str(error))
                return
            then = f"{self.last} is intact: make room, then --resume {self.folder}"
            raise TrainingError(f"{error}; {then if self.last else 'make room'}") from None

    def keep_settings(self) -> None:
        """Write what `--resume` reads: the settings as they were given, such as "auto"."""
        checkpoints = self.folder / "checkpoints"
        write_json(checkpoints / "settings.json", dataclasses.asdict(self.given))
        if self.given.init is not None and not (checkpoints / "tokenizer").is_dir():
            # By then the initial model may have been moved.
            translate.save_tokenizer(self.prepared.tokenizer, checkpoints / "tokenizer")


# ---- training ------------------------------------------------------------------------------------


def train(config: TrainConfig) -> int:
    """Prepare data, train, save, evaluate. Returns the exit code."""
    check_settings(config)
    device = translate.choose_device(config.device)
    precision = choose_precision(config.precision, device)
    resumed = read_checkpoint(Path(config.resume).expanduser()) if config.resume else None
    join_processes(device)
    use_tensor_cores(device)
    with run_folder(config) as folder:  # before the data, which may take minutes to read
        chosen = dataclasses.replace(config, output=str(folder), precision=precision)
        prepared = prepare_data(chosen)
        model = build_model(chosen, prepared.tokenizer)
        if config.init is not None and resumed is None:
            model.load_state_dict(
                translate.load_model(config.init, torch.device("cpu"))[0].state_dict()
            )
        model.to(device)
        loaders = build_loaders(chosen, prepared, device)
        metrics = report_run(chosen, prepared, model, loaders[0], device)
        world = distributed.get_world_size() if distributed.is_initialized() else 1
        about = {"data": f"{digest_pairs(prepared.train)} {digest_pairs(prepared.validation)}"}
        multiple = loaders[0].batch_sampler.multiple if config.batch_tokens else 1
        about["layout"] = (len(loaders[0]), world, multiple)
        progress = Progress()
        if resumed:
            progress = resume(chosen, model, resumed[1], about)
            if resumed[0].parent.parent.resolve() != folder.resolve():
                resumed = (None, resumed[1])  # --output: the checkpoint is in another folder
        hooks, status = RunHooks(chosen, prepared, folder, about, resumed), "FAILED"
        hooks.given, resumed = dataclasses.replace(config, output=str(folder)), None
        try:
            code = train_and_save(model, loaders, chosen, progress, hooks, metrics)
            status = "KILLED" if hooks.stop else "FINISHED"
            return code
        except FloatingPointError as error:
            if hooks.bar is not None:
                hooks.bar.close()  # or it would be drawn behind the message
            last = f"last good checkpoint: {hooks.last or 'none'}"
            hint = "start again with a lower --learning-rate"
            raise TrainingError(f"{error}; {last}; {hint}") from None
        except Interrupted:
            status = "KILLED"
            raise
        finally:
            hooks.attempt("MLflow", hooks.mlflow.close, status)


def resume(config: TrainConfig, model: nn.Module, checkpoint: dict, about: dict) -> Progress:
    """Restore a checkpoint. Raises InputError if it does not fit the data or the devices."""
    same = checkpoint["data"] == about["data"]
    hint = "to train on others, start a new run from its model with --init"
    require(same, f"the training pairs or the tokenizer are not those of {config.resume}: {hint}")
    progress = Progress(**checkpoint["progress"])
    # Within an epoch, a batch number means another batch in another layout.
    same = progress.batch == 0 or tuple(checkpoint["layout"]) == about["layout"]
    what = "the number of processes, --compile, and with --batch-tokens the kind of device"
    require(same, f"{config.resume} was stopped within an epoch: {what} must be as before")
    done, most = progress.epoch, config.max_epochs
    require(done <= most, f"{done} epochs are done, which is more than --max-epochs {most}")
    model.load_state_dict(checkpoint["model"])
    print_field("resumed", f"after step {progress.step} of {config.resume}")
    return progress


def train_and_save(
    model, loaders: list, config: TrainConfig, progress: Progress, hooks: RunHooks, metrics: dict
) -> int:
    """Train, write the model, score it. Returns the exit code."""
    prepared, folder, record = hooks.prepared, hooks.folder, None
    device, place = next(model.parameters()).device, shlex.quote(str(folder))
    with stopping_on_signals(hooks):
        if progress.epoch < config.max_epochs:
            record = fit(model, loaders, config, progress, hooks)
        if hooks.stop:
            return print_stopped(progress, hooks)
        if not is_first_process():
            return 0
        model.to(device)  # Lightning takes it to the CPU at the end
        model.load_state_dict(hooks.found["weights"])
        metrics |= describe_training(progress, hooks, record)
        try:  # before printing and scoring, so that an interruption loses no training
            save_model(folder, model, prepared, config, metrics)
        except OSError as error:
            hint = f"training is complete: make room, then --resume {place}"
            raise TrainingError(f"{error}; {hint}") from None
        print_training(metrics)
    search = f" --beam {config.beam}" if config.beam > 1 else ""
    evaluation = f"python run.py evaluate --model {place}{search}"
    try:
        if hooks.signal:  # it came while the model was written
            raise_interrupted(hooks.signal, None)
        score_model(model, prepared, config, metrics)
    except BaseException:
        print(f"the model is complete, its score is not: {evaluation}", file=sys.stderr)
        raise
    write_json(folder / "metrics.json", metrics)
    scores = {name: metrics[name] for name in ("bleu", "chrf")}
    if config.mlruns != "none":
        hooks.attempt("MLflow", hooks.mlflow.log, progress.history, **scores)
    if record and record.run_path:
        print_field("modlee", f"took {record.seconds:.1f} s and recorded {record.run_path}")
        print_field("artifacts", ", ".join(record.artifacts))
        if config.push:
            print_field("modlee", "uploading source, graphs, parameters, metrics and paths")
            reason = record.push()
            print_field("modlee", f"not accepted by the server: {reason}" if reason else "uploaded")
    print_field("saved", f"{folder}")
    more = f"--resume {place} --max-epochs {2 * progress.epoch}"
    print_field("", f"{folder / 'checkpoints'} is kept for python run.py {more}; else delete it")
    example = shlex.quote(min((pair.source for pair in prepared.validation_pairs), key=len))
    print(f"\nnext:  python run.py translate --model {place}{search} {example}")
    print(f"       {evaluation} --dataset unseen.tsv")
    return 0


def fit(model, loaders: list, config: TrainConfig, progress: Progress, hooks: RunHooks):
    """Train with the selected loop. Returns Modlee's record or None."""
    if config.loop == "raw":
        print_field("modlee", "off: it needs --loop lightning")
        if config.compile:
            compile_model(model)
        train_raw(model, *loaders, config, progress, hooks)
        return None
    record = start_modlee(config, hooks.prepared) if is_first_process() else None
    base = modlee_record.modlee_base() if record else import_lightning().LightningModule
    adapter = adapter_class(base)(dataclasses.asdict(model.config), model)
    adapter.attach(config, progress, hooks)
    start = partial(train_lightning, adapter, *loaders, config)
    record.fit(adapter, start, partial(set_mlflow_store, config.mlruns)) if record else start()
    return record


def start_modlee(config: TrainConfig, prepared: Prepared):
    """Import Modlee if it is wanted and installed, and print its status in one line. Returns a
    `ModleeRecord` or None."""
    if not config.modlee or config.mlruns == "none":
        print_field("modlee", f"off ({'--mlruns none' if config.modlee else '--no-modlee'})")
        return None
    started, modlee = time.perf_counter(), modlee_record.import_modlee()
    if modlee is None:
        print_field("modlee", "not installed: training without it")
        return None
    upload = "uploads when done (--push)" if config.push else "keeps everything on this machine"
    print_field("modlee", f"{translate.versions()['modlee']}, {upload}")
    record = modlee_record.ModleeRecord(modlee, prepared.train, prepared.tokenizer)
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
        "versions": translate.versions(),
    }


def describe_training(progress: Progress, hooks: RunHooks, record) -> dict:
    """The second half of metrics.json, without scores."""
    found = hooks.found
    tokens = progress.epoch * sum(int(lengths.sum()) for lengths in hooks.prepared.train.lengths)
    return {
        "modlee": bool(record and record.run_path),
        "run_path": record and record.run_path,
        "artifacts": list(record.artifacts) if record else [],
        "modlee_seconds": record and round(record.seconds, 2),
        "steps": progress.step,
        "skipped_steps": count_skipped(progress, hooks),
        "train_seconds": round(found["seconds"], 2),
        "tokens_per_second": round(tokens / max(found["seconds"], 1e-9), 1),
        "train_loss": progress.history["train"][-1][1],  # of the last steps
        "val_loss": found["best"],  # of the weights in the folder, which are the best
        "best_step": found["step"],
        "last_val_loss": progress.history["validation"][-1][1],
        **dict.fromkeys(("scored", "bleu", "chrf", "signature")),
    }


def print_training(metrics: dict) -> None:
    took = f"{metrics['steps']} steps in {metrics['train_seconds']:.0f} s"
    print_field("trained", f"{took}, {metrics['tokens_per_second']:,.0f} real tokens/s")
    if skipped := metrics["skipped_steps"]:
        print_field("", f"{skipped} steps were skipped: a gradient overflowed fp16")
    is_last = metrics["best_step"] == metrics["steps"]
    which = "" if is_last else f", the best, of step {metrics['best_step']}"
    losses = f"training {metrics['train_loss']:.4f}, validation {metrics['val_loss']:.4f}"
    print_field("loss", losses + which)


def count_skipped(progress: Progress, hooks: RunHooks) -> int:
    """Steps that fp16's scaler skipped, because a gradient overflowed. Waits for the device."""
    if hooks.config.precision != "fp16" or not hooks.started:
        return 0
    states = hooks.optimizer.state.values()
    return progress.step - max((int(each["step"]) for each in states), default=0)


def print_stopped(progress: Progress, hooks: RunHooks) -> int:
    """Print how to continue. Returns the exit code."""
    print_field("stopped", f"after step {progress.step}: {hooks.last}")
    command = "python run.py"
    if distributed.is_initialized():  # within an epoch, as many processes are needed again
        command = f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE')} run.py"
    command += f" --resume {shlex.quote(str(hooks.folder))}"
    print(f"\nnext:  {command}")
    if epochs := progress.epoch:
        print(f"       {command} --max-epochs {epochs}  # to finish with what it has learnt")
    return 128 + (hooks.signal or signal.SIGTERM)


def score_model(model, prepared: Prepared, config: TrainConfig, metrics: dict) -> None:
    """Translate the test pairs, or the validation pairs if there are none, and put the scores into
    `metrics`."""
    part = "test" if prepared.test_pairs else "validation"
    pairs = prepared.test_pairs or prepared.validation_pairs
    translator = translate.Translator(model, prepared.tokenizer, config.languages, config.beam)
    hypotheses, scores = translate.score_pairs(translator, pairs)
    metrics |= {"scored": part} | scores
    search = "greedy" if config.beam == 1 else f"beam {config.beam}"
    print_field("scored", f"{len(pairs):,} {part} pairs, {search}")
    translate.print_score(metrics)
    for pair, hypothesis in list(zip(pairs, hypotheses))[:6]:
        print(f"\n  source       {pair.source}\n  translation  {hypothesis}")
        print(f"  reference    {pair.target}")
    print()


def bench(arguments: list[str]) -> int:
    """`python -m benchmarks.lightning`, from whichever folder. Returns the exit code."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks.lightning", *arguments]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False).returncode


def main(arguments: list[str]) -> int:
    """Run a command. Errors that the user can fix are reported in one line on stderr."""
    set_environment()
    command = arguments[0] if arguments[:1] else ""
    try:
        if command == "bench":
            return bench(arguments[1:])
        if command in translate.COMMANDS:
            code = translate.main(arguments)
        else:
            code = train(parse_settings(arguments))
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
        if is_first_process():
            print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:  # only CUDA has a class for out of memory
        words = ("out of memory", "can't allocate memory", "not enough memory")
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in words):
            raise
        hints = {"export": "", "translate": "; lower --batch-tokens or --beam"}
        hints["evaluate"] = hints["translate"]
        training = "; lower --batch-tokens or --batch-size, and raise --accumulate"
        print(f"\nerror: out of memory{hints.get(command, training)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    for number in STOP_SIGNALS:
        signal.signal(number, raise_interrupted)
    code = main(sys.argv[1:])
    for number in STOP_SIGNALS:  # a signal during exit would print a traceback
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
