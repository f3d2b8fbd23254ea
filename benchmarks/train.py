"""Training speed beside nn.Transformer, transformers, x-transformers and the tutorial.

    python -m benchmarks.train --dataset pairs.tsv --json benchmarks/train.json

Same start, optimizer and machine. Every trainee is a process of its own; they take turns. Batches
of their own hold pairs in random order, padded to the longest (the tutorial's: cut or padded to
50). x-transformers takes part if it is installed.
"""

import dataclasses
import math
import time
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

import data
import run
import translate
from benchmarks.harness import (
    describe_machine,
    matmul_rate,
    median_interval,
    memory_peak,
    run_script,
    serving,
    start,
    synchronize,
    take_turns,
    with_interval,
)
from benchmarks.lightning import WIDE, WIDEST
from data import InputError
from positional import sinusoidal_positional_encoding
from run import TrainConfig
from seq2seq import (
    VOCAB_MULTIPLE,
    Seq2SeqConfig,
    TransformerSeq2SeqModel,
    count_flops,
    shift_right,
)

TUTORIAL_LENGTH = 50  # tokens to which the tutorial pads and cuts every sentence
SIZES = {"demo": {}, "wide": WIDE, "tutorial": run.PAPER_BASE, "widest": WIDEST}


@dataclass(frozen=True)
class TrainBench:
    """Training speed beside other implementations."""

    dataset: tuple[str, ...] = ("phrasebook",)  # what to train on, as for training
    tokenizer: str = "t5-small"  # hub name, folder, or train:N
    max_length: int = 128  # tokens per sentence; longer pairs are dropped
    size: Literal["demo", "wide", "tutorial", "widest"] = "tutorial"  # of the model
    batch_tokens: int | None = None  # per batch and side; None: 2048, on a GPU 25000
    steps: int = 2  # different batches in a turn
    turns: int = 5  # timed turns of every trainee
    compile: bool = False  # also ours with torch.compile
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to train
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # arithmetic
    json: str | None = None  # file for the figures


def torch_layers(config: Seq2SeqConfig, **more) -> nn.Transformer:
    sizes = (config.d_model, config.nhead, config.num_encoder_layers, config.num_decoder_layers)
    return nn.Transformer(*sizes, config.dim_feedforward, batch_first=True, **more)


def sinusoids(x: Tensor) -> Tensor:
    """x [B, T, D] -> the position table [T, D] that `nn.Transformer` comes without."""
    return sinusoidal_positional_encoding(x.size(1), x.size(2)).to(x)


class TorchTransformer(nn.Module):
    """`nn.Transformer` with what it lacks to translate: embeddings, positions, masks, output."""

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
    """The tutorial's model, except that batches come first: no masks, a loss over pads, nothing
    shifted."""

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.transformer = torch_layers(config)
        self.output = nn.Linear(config.d_model, config.vocab_size)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        sides = [self.embedding(ids) for ids in (input_ids, labels)]  # [B, T, D]
        hidden = self.transformer(*(side + sinusoids(side) for side in sides))
        logits = self.output(hidden)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Marian(nn.Module):
    """transformers' Marian: the same layers with norms after the sums."""

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        from transformers import MarianConfig, MarianMTModel

        rows = data.round_up(config.vocab_size, VOCAB_MULTIPLE)
        settings = MarianConfig(**translate.transformers_settings(config, rows), use_cache=False)
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
        for side, layers in (("enc", "num_encoder_layers"), ("dec", "num_decoder_layers")):
            sides |= {
                f"{side}_num_tokens": data.round_up(config.vocab_size, VOCAB_MULTIPLE),
                f"{side}_depth": getattr(config, layers),
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
    def __init__(self, config: Seq2SeqConfig):
        super().__init__(**dataclasses.asdict(config))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        loss_sum, tokens = super().forward(input_ids, labels=labels)
        return loss_sum / tokens


@dataclass(frozen=True)
class Trainee:
    """A model and its kind of batches: "buckets" (ours), "longest" (shuffled pairs, as many, padded
    to the longest) or "fixed" (the tutorial's, 50 tokens)."""

    label: str
    build: type
    batches: str
    compile: bool = False


TRAINEES = {
    "ours": Trainee("ours", Ours, "buckets"),
    "compiled": Trainee("ours, compiled", Ours, "buckets", True),
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
    trainee: Trainee, config: Seq2SeqConfig, batches: list, device_name: str, precision: str, pipe
) -> None:
    """Runs in a process of its own. Sends None when ready, then, whenever asked, the seconds and
    the peak memory of a turn over the batches."""
    warnings.filterwarnings("ignore", "enable_nested_tensor")  # of nn.Transformer
    device = translate.choose_device(device_name)
    run.use_tensor_cores(device)
    torch.manual_seed(0)
    try:
        model = trainee.build(config)
        same_scale(model, config.d_model)
        model.to(device).train()
        if trainee.compile and not run.compile_model(model):
            raise InputError("nothing can compile here")
    except (ImportError, InputError) as error:
        pipe.send(InputError(str(error)))
        return
    optimizer = run.build_optimizer(model, TrainConfig(learning_rate=1e-4))
    batches = [[ids.to(device) for ids in batch] for batch in batches]
    pipe.send(None)
    while pipe.recv():
        memory_peak(device, reset=True)
        started = time.perf_counter()
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            with run.autocast(device, precision):
                loss = model(*batch)
            loss.backward()
            optimizer.step()
        synchronize(device)
        pipe.send({"seconds": time.perf_counter() - started, "memory": memory_peak(device)})


def cut_batches(dataset: data.PairDataset, kind: str, budget: int, steps: int, multiple: int):
    """`steps` batches of a kind (see Trainee) that represent an epoch, and the lengths of the pairs
    in them."""
    sampler = data.BucketBatchSampler(*dataset.lengths, batch_tokens=budget, multiple=multiple)
    if kind == "buckets":  # from short to long, each for an equal share of the batches
        order = sorted(sampler.batches, key=lambda rows: dataset.lengths[1][rows].mean())
        chosen = [order[int((i + 0.5) / steps * len(order))] for i in range(steps)]
    else:
        size = len(dataset) // len(sampler) if kind == "longest" else budget // TUTORIAL_LENGTH
        rows, size = np.random.default_rng(0).permutation(len(dataset)), max(1, size)
        chosen = [rows[i * size : (i + 1) * size] for i in range(steps)]
    limit = TUTORIAL_LENGTH if kind == "fixed" else None
    multiple = limit or multiple
    pairs = [[tuple(ids[:limit] for ids in dataset[row]) for row in rows] for rows in chosen]
    lengths = [(len(source), len(target)) for rows in pairs for source, target in rows]
    return [data.pad_batch(rows, 0, multiple) for rows in pairs], lengths


def describe_trainee(answers: list[dict], batches: list, lengths: list, config, peak: float):
    """The figures of a row; medians over the turns."""
    tokens, padded = sum(map(sum, lengths)), sum(ids.numel() for pair in batches for ids in pair)
    flops = 3 * sum(count_flops(config, *pair) for pair in lengths)
    seconds = float(np.median([answer["seconds"] for answer in answers]))
    memory = [answer["memory"] for answer in answers if answer["memory"]]
    row = {"tokens_per_second": round(tokens / seconds, 1), "mfu": round(flops / seconds / peak, 4)}
    row |= {"step_ms": round(1e3 * seconds / len(batches), 1)}
    row |= {"tokens_per_step": round(tokens / len(batches), 1)}
    row |= {"padding_share": round(1 - tokens / padded, 4)}
    row |= {"memory_mib": round(max(memory) / 2**20) if memory else None}
    return row | {"turn_seconds": [round(answer["seconds"], 4) for answer in answers]}


def main(config: TrainBench) -> dict:
    """Trainees run in small groups, close in time, each with ours."""
    data.require(min(config.steps, config.max_length) >= 1, "--steps, --max-length: at least 1")
    data.require(config.turns >= 3, "--turns must be at least 3, or there is no interval")
    device = translate.choose_device(config.device)
    precision = run.choose_precision(config.precision, device)
    budget = config.batch_tokens or (25_000 if device.type == "cuda" else 2048)
    names = ("dataset", "tokenizer", "max_length")
    settings = TrainConfig(**{name: getattr(config, name) for name in names})
    prepared, multiple = run.prepare_data(settings), 8 if device.type == "cuda" else 1
    sizes = run.sizes_of(TrainConfig(**SIZES[config.size])) | {"max_length": 1024}
    model = Seq2SeqConfig(vocab_size=len(prepared.tokenizer), **sizes)
    cases, groups = {}, {}  # name -> (batches, lengths); model -> names, ours among them
    for name, trainee in TRAINEES.items():
        if name != "compiled" or config.compile:
            more = (budget, config.steps, multiple)
            cases[name] = cut_batches(prepared.train, trainee.batches, *more)
            groups.setdefault(trainee.build, {"ours": None})[name] = None
    groups = [list(group) for group in groups.values() if len(group) > 1]
    report = describe_machine(device) | {"precision": precision, "size": config.size}
    report |= {"batch_tokens": budget, "rows": {}, "left_out": {}}
    peak, found = 0.0, {}  # name -> answers, each with that of ours
    total = (config.turns + 1) * sum(map(len, groups))
    with data.progress_bar(desc="train", total=total, unit="turn") as bar:
        for group in groups:
            # The best rate of the whole run: a slow moment would inflate every MFU.
            peak = max(peak, matmul_rate(device, precision))
            more = (config.device, precision)
            jobs = {name: (TRAINEES[name], model, cases[name][0], *more) for name in group}
            with serving(serve_trainee, jobs) as serve:
                start(serve, report["left_out"])
                take_turns(serve, 1, bar)  # to warm up
                answers = take_turns(serve, config.turns, bar)
            for name in answers:
                found.setdefault(name, []).extend(zip(answers[name], answers["ours"]))
    for name, pairs in found.items():
        batches, lengths = cases[name]
        row = describe_trainee([mine for mine, _ in pairs], batches, lengths, model, peak)
        # A real token takes so many times as long as with ours.
        ratio = sum(map(sum, cases["ours"][1])) / sum(map(sum, lengths))
        values = np.array([mine["seconds"] / ours["seconds"] * ratio for mine, ours in pairs])
        row["ours_is_faster"] = [round(value, 3) for value in median_interval(values)]
        report["rows"][name] = row
    report["matmul_gflops"] = round(peak / 1e9, 1)
    print_rows(report)
    return report


def print_rows(report: dict) -> None:
    """The table. On a shared machine only the ratios, in the last column, are reliable."""
    print(
        f"\n{report['machine']}, {report['precision']}, {report['size']} size, "
        f"{report['batch_tokens']:,} tokens per batch; matmul {report['matmul_gflops']:,.0f} "
        f"GFLOP/s\n\n{'':34}real tokens/s  ms a step   pads  memory MiB   MFU  ours is faster by"
    )
    for name, row in report["rows"].items():
        ratio = "" if name == "ours" else with_interval(*row["ours_is_faster"])
        print(
            f"{TRAINEES[name].label:34}{row['tokens_per_second']:13,.0f}{row['step_ms']:11,.0f}"
            f"{row['padding_share']:7.1%}{row['memory_mib'] or 0:12,}{row['mfu']:6.0%}  {ratio}"
        )


if __name__ == "__main__":
    run_script(main, TrainBench, "train")
