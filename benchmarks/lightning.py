"""What Lightning and Modlee cost per training step, beside the raw loop.

    python run.py bench --json bench.json    or python -m benchmarks.lightning; --quick: 2 minutes

Every arm is a process of its own and trains the same model on the same batches. Losses must agree
before anything is timed. Arms take turns of `WINDOW` steps and are compared turn by turn: medians
of the differences, with bootstrapped 95 % intervals, of whole steps and of the loop overhead: the
time outside of data, forward, backward, clipping and optimizer, which all arms share.
"""

import contextlib
import dataclasses
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import data
import modlee_record
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
from data import InputError, print_field, require
from run import PAPER_BASE, Prepared, Progress, TrainConfig
from seq2seq import Seq2SeqConfig, TransformerSeq2SeqModel, count_flops

WINDOW = run.LOG_EVERY  # steps in a turn: one period of all periodic work


@dataclass(frozen=True)
class BenchConfig:
    """What Lightning and Modlee cost per training step, beside the raw loop."""

    quick: bool = False  # one group of arms, one size, a few turns
    turns: int | None = None  # of 20 timed steps for every arm; None: 12, with --quick 4
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to train
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # arithmetic
    json: str | None = None  # file for the figures
    profile: str | None = None  # only write torch's trace of ten steps of the raw loop to this file


@dataclass(frozen=True)
class Arm:
    """A way to train."""

    label: str
    trainer: dict | None = None  # changes of the Trainer's arguments; None: the raw loop
    callback: str | None = None  # an added one, see `run_arm`
    modlee: tuple[str, ...] | None = None  # which of its callbacks, by parts of their names
    compile: bool = False
    wait: bool = False  # for the device after each phase, to measure how long it takes


DEFAULTS = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
ALL = ("Data", "Transforms", "Model", "Code")
ARMS = {
    "raw": Arm("raw loop"),
    "barebones": Arm("Lightning, barebones", {"barebones": True}),
    "defaults": Arm("Lightning as it comes", dict.fromkeys(DEFAULTS, True)),
    "adapter": Arm("this adapter, --no-modlee", {}),
    "modlee": Arm("this adapter with Modlee", {}, modlee=ALL),
    "compiled": Arm("raw loop, --compile", compile=True),
    "phases": Arm("raw loop, phase by phase", wait=True),
    "bar": Arm("+ Lightning's progress bar", {"enable_progress_bar": True}),
    "log": Arm("+ logging every step", {"logger": True, "log_every_n_steps": 1}, "log"),
    "save": Arm("+ checkpoint every 20 steps", {"enable_checkpointing": True}, "save"),
    "clip": Arm("+ clipping by Trainer", {"gradient_clip_val": TrainConfig.clip_norm}),
    "autolog": Arm("+ mlflow autolog", {}, modlee=()),
    "modlee-data": Arm("+ Modlee: data", {}, modlee=ALL[:2]),
    "modlee-model": Arm("+ Modlee: model", {}, modlee=("ModelMeta", "Code")),
}
# Arms that take turns together, each compared to the first of its group. The first group is all
# that --quick and the other sizes have.
GROUPS = (
    ("raw", "barebones", "defaults", "adapter", "modlee"),
    ("raw", "compiled"),
    ("adapter", "bar", "log", "save", "clip", "autolog"),
    ("autolog", "modlee-data", "modlee-model"),
    ("phases",),
)
SMALLEST = {"d_model": 64, "num_encoder_layers": 1, "num_decoder_layers": 1, "batch_size": 16}
WIDE = {"d_model": 256, "nhead": 8, "dim_feedforward": 1024}
WIDEST = PAPER_BASE | {"d_model": 1024, "nhead": 16, "dim_feedforward": 4096, "batch_size": 2048}
# Three models; the costs of the middle one are itemised. A GPU gets larger ones.
SIZES = {
    "cpu": {"small": SMALLEST, "demo": {}, "wide": WIDE},
    "cuda": {
        "demo": {"batch_size": 512},
        "tutorial": PAPER_BASE | {"batch_size": 2048},
        "widest": WIDEST,
    },
}


class RepeatingSampler(data.BucketBatchSampler):
    """The same WINDOW batches over and over in one long epoch: all turns are the same work."""

    repeats = 1000

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.batches = [self.batches[i % len(self.batches)] for i in range(WINDOW)] * self.repeats


class TurnTimer:
    """Called at the start of each step. Every WINDOW steps it sends their times and waits for the
    next turn."""

    def __init__(self, pipe, device: torch.device):
        self.pipe, self.device = pipe, device
        self.waited = self.started = 0.0
        self.phases: dict[str, float] = {}  # seconds, see `timed_phases`
        self.inside = False  # a phase
        self.events = []
        if device.type == "cuda":
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def clock(self) -> float:
        """Seconds, without the time spent waiting for a turn."""
        return time.perf_counter() - self.waited

    def __call__(self, progress: Progress) -> None:
        if progress.step % WINDOW:
            return
        paused = time.perf_counter()
        self.pipe.send(self.measure(progress) if progress.step else None)
        try:
            self.pipe.recv()
        except EOFError:
            os._exit(0)
        gc.collect()  # switched off within a turn
        # Wakes up threads and clocks, which idled during other turns.
        matmul_rate(self.device, size=256, seconds=0.1)
        memory_peak(self.device, reset=progress.step == WINDOW)
        self.phases.clear()
        if self.events:
            self.events[0].record()
        self.waited += time.perf_counter() - paused
        self.started = self.clock()

    def measure(self, progress: Progress) -> dict[str, object]:
        """Seconds of the turn: `whole`, `loop` (outside of all phases), `enqueue` (until the host
        was free) and `device`; peak memory; the losses."""
        answer = {"enqueue": self.clock() - self.started}
        if self.events:
            self.events[1].record()
        synchronize(self.device)
        answer["whole"] = self.clock() - self.started
        answer["loop"] = answer["whole"] - sum(self.phases.values())
        if self.events:
            answer["device"] = self.events[0].elapsed_time(self.events[1]) / 1e3
        answer |= {"peak": memory_peak(self.device), "phases": dict(self.phases)}
        return answer | {"losses": list(progress.history["train"])}


@contextlib.contextmanager
def timed_phases(timer: TurnTimer, wait: bool = False) -> Iterator[None]:
    """Call the timer before each step, and measure in timer.phases what every arm calls. The rest
    of a step is the loop around it. wait: for the device, after each phase."""
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    def timed(name: str, function: Callable) -> Callable:
        def wrapper(*arguments, **more):
            if timer.inside:  # of another phase, which counts it
                return function(*arguments, **more)
            timer.inside, started = True, timer.clock()
            try:
                result = function(*arguments, **more)
                if wait:
                    synchronize(timer.device)
                return result
            finally:  # also where Modlee reads a loader to its end
                timer.inside = False
                timer.phases[name] = timer.phases.get(name, 0.0) + timer.clock() - started

        return wrapper

    def start_step(optimizer, config: TrainConfig, progress: Progress, batches: int) -> None:
        timer(progress)
        plain(optimizer, config, progress, batches)

    plain = run.start_step
    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(run, "start_step", start_step))
        for name, owner, function in (
            ("data", _BaseDataLoaderIter, "__next__"),
            ("forward", TransformerSeq2SeqModel, "forward"),
            ("backward", Tensor, "backward"),
            ("clipping", run, "finish_gradients"),
            ("clipping", torch.nn.utils, "clip_grad_norm_"),  # where Lightning calls it
            ("optimizer", sys.modules[torch.optim.Adam.__module__], "adam"),
        ):
            whole = timed(name, getattr(owner, function))
            patches.enter_context(patch.object(owner, function, whole))
        yield


def bench_case(config: TrainConfig, prepared: Prepared, device: torch.device):
    """(model, [training loader, validation loader]): the same in every arm."""
    model = run.build_model(config, prepared.tokenizer).to(device)
    train, validation = run.build_loaders(config, prepared, device)
    sampler = RepeatingSampler(*prepared.train.lengths, config.batch_size, config.seed)
    train = torch.utils.data.DataLoader(
        train.dataset, batch_sampler=sampler, collate_fn=train.collate_fn
    )
    return model, [train, validation]


def run_arm(arm: Arm, model, loaders: list, config: TrainConfig, prepared) -> Progress:
    """Train as the arm does, in the current folder."""
    progress = Progress()
    if arm.trainer is None:
        return run.train_raw(model, *loaders, config, progress)
    lightning, changes = run.import_lightning(), dict(arm.trainer)

    class LogEveryStep(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            module.log("step_loss", outputs["loss"])

    saving = partial(lightning.callbacks.ModelCheckpoint, os.getcwd(), every_n_train_steps=WINDOW)
    if arm.callback:
        changes["callbacks"] = [{"log": LogEveryStep, "save": saving}[arm.callback]()]
    modlee = None if arm.modlee is None else modlee_record.import_modlee()
    base = modlee_record.modlee_base() if modlee else lightning.LightningModule
    adapter = run.adapter_class(base)(dataclasses.asdict(model.config), model)
    adapter.attach(config, progress)
    if "gradient_clip_val" in changes:

        def clip(optimizer, *arguments, **more) -> None:  # Lightning's own way
            run.finish_gradients(model, unclipped, adapter.step_tokens)
            lightning.LightningModule.configure_gradient_clipping(
                adapter, optimizer, *arguments, **more
            )

        unclipped = dataclasses.replace(config, clip_norm=0.0)
        adapter.configure_gradient_clipping = clip
    fit = partial(run.train_lightning, adapter, *loaders, config, **changes)
    if modlee:
        record = modlee_record.ModleeRecord(modlee, prepared.train, prepared.tokenizer, arm.modlee)
        record.fit(adapter, fit, partial(run.set_mlflow_store, config.mlruns))
    else:
        fit()
    return progress


def serve_arm(arm: Arm, config: TrainConfig, prepared: Prepared, device_name: str, pipe) -> None:
    """Runs an arm in a process of its own. Sends None when ready, then, whenever asked, the times
    of the next WINDOW steps."""
    os.chdir(Path(config.mlruns).parent)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    try:
        device = translate.choose_device(device_name)
        model, loaders = bench_case(config, prepared, device)
        gc.disable()
        require(not arm.compile or run.compile_model(model), "nothing can compile here")
        with timed_phases(TurnTimer(pipe, device), arm.wait):
            run_arm(arm, model, loaders, config, prepared)
    except Exception as error:  # noqa: BLE001 - any error must reach the parent
        pipe.send(InputError(f"{arm.label}: {type(error).__name__}: {data.one_line(error)}"))


def check_losses(answers: dict[str, list[dict]]) -> None:
    """Raise InputError if an arm trains differently: its times would mean nothing."""
    losses = {name: found[-1]["losses"] for name, found in answers.items()}
    expected = next(iter(losses.values()))
    for name, points in losses.items():
        # Bit for bit if possible. Compiled code and GPUs add in another order, and the difference
        # grows from step to step: only the first point shows whether the work is the same.
        exact = not ARMS[name].compile and not torch.cuda.is_available()
        tolerance, count = (0, None) if exact else (1e-2, 1)
        same = np.allclose(points[:count], expected[:count], rtol=tolerance, atol=0)
        what = f"the losses of {ARMS[name].label} are {points[-1]}, others have {expected[-1]}"
        require(same, f"{what}: the times cannot be compared")


def describe_work(sampler: data.BucketBatchSampler, config: Seq2SeqConfig) -> dict:
    """Tokens and FLOPs of a step without pads, averaged over a turn."""
    rows = np.concatenate(sampler.batches[:WINDOW])
    source, target = sampler.source_lengths[rows], sampler.target_lengths[rows]
    flops = 3 * sum(count_flops(config, *pair) for pair in zip(source.tolist(), target.tolist()))
    work = {"source_tokens": source.sum(), "target_tokens": target.sum(), "flops": flops}
    return {name: float(value) / WINDOW for name, value in work.items()}


def describe_arms(size: str, answers: dict[str, list[dict]], work: dict, peak: float) -> list[dict]:
    """The figures of a group, in milliseconds per step; each arm beside the first."""

    def of(name: str, kind: str) -> np.ndarray:
        """Of every turn but the warm-up."""
        return np.array([answer[kind] for answer in answers[name][1:]]) * 1e3 / WINDOW

    rows, base = [], next(iter(answers))
    for name, (warm_up, *turns) in answers.items():
        ms = float(np.median(of(name, "whole")))
        peaks = [turn["peak"] for turn in turns if turn["peak"]]
        phases = {
            phase: float(np.median([turn["phases"][phase] for turn in turns])) * 1e3 / WINDOW
            for phase in warm_up["phases"]
        }
        row = {
            "size": size,
            "arm": name,
            "label": ARMS[name].label,
            "beside": base,
            "ms": ms,
            "source_tokens_per_second": 1e3 * work["source_tokens"] / ms,
            "target_tokens_per_second": 1e3 * work["target_tokens"] / ms,
            "mfu": work["flops"] / (ms / 1e3) / peak,
            "peak_mib": max(peaks) / 2**20 if peaks else None,
            "warm_up_seconds": warm_up["whole"],
            "turns_ms": of(name, "whole").tolist(),
            "phases_ms": phases | {"loop": float(np.median(of(name, "loop")))},
            # [median, low, high] of the differences turn by turn
            "more_loop_ms": median_interval(of(name, "loop") - of(base, "loop")),
            "more_whole_ms": median_interval(of(name, "whole") - of(base, "whole")),
        }
        for kind in ("device", "enqueue") if "device" in warm_up else ():
            row[f"{kind}_ms"] = float(np.median(of(name, kind)))
        rows.append(row)
    return rows


def print_bench(report: dict) -> None:
    print_field("machine", f"{report['machine']}, {report['precision']}")
    rate = f"{report['matmul_gflops']:,.0f} GFLOP/s"
    print_field("matmul", f"{rate} at best in that precision; MFU is a share of it")
    for size, work in report["sizes"].items():
        tokens = f"{work['source_tokens']:.0f} source and {work['target_tokens']:.0f} target tokens"
        print(f"\n{size}: a step has {tokens}, {work['flops'] / 1e9:.1f} GFLOP")
        print(
            f"{'':30}ms a step  source, target tokens/s   MFU  peak MiB  warm-up   more ms a step "
            "(95 %): loop overhead, whole step"
        )
        for row in (row for row in report["rows"] if row["size"] == size):
            line = (
                f"  {row['label']:28}{row['ms']:9.2f}  {row['source_tokens_per_second']:11,.0f}"
                f" {row['target_tokens_per_second']:11,.0f}  {row['mfu']:4.0%}"
                f"  {row['peak_mib'] or 0:8.0f}  {row['warm_up_seconds']:5.1f} s"
            )
            if row["arm"] != row["beside"]:
                for kind in ("loop", "whole"):
                    line += f"   {with_interval(*row[f'more_{kind}_ms'])}"
                line += f" than {ARMS[row['beside']].label}"
            if "device_ms" in row:
                line += f"; device {row['device_ms']:.2f}, enqueued in {row['enqueue_ms']:.2f} ms"
            print(line)
    for row in report["rows"]:
        if row["arm"] == "phases":
            phases = ", ".join(f"{name} {ms:.2f}" for name, ms in row["phases_ms"].items())
            print(f"\na step of the raw loop, ms: {phases}")


def profile_steps(config: TrainConfig, prepared: Prepared, device, path: Path) -> None:
    """Write torch's trace of ten steps of the raw loop, after a turn of warming up."""
    from torch.profiler import profile, schedule

    model, loaders = bench_case(config, prepared, device)
    loaders[0].batch_sampler.repeats = 2
    loaders[0].batch_sampler.set_epoch(0)
    plain = run.start_step

    def save(profiler) -> None:
        translate.write_file(path, lambda part: profiler.export_chrome_trace(str(part)))

    def start_step(*arguments) -> None:
        profiler.step()
        plain(*arguments)

    ten = schedule(wait=0, warmup=WINDOW, active=10, repeat=1)
    with (
        profile(schedule=ten, on_trace_ready=save) as profiler,  # of all devices there are
        patch.object(run, "start_step", start_step),
    ):
        run.train_raw(model, *loaders, config)
    print_field("profile", f"ten steps of the raw loop: {path}")


def main(config: BenchConfig) -> dict:
    """Group by group of arms and size by size; then the table."""
    require(not (config.json and config.profile), "--profile measures nothing: leave --json out")
    translate.check_output_file(config.profile, key="schemaVersion")
    turns = config.turns
    if turns is None:
        turns = 4 if config.quick else 12
    require(turns >= 3, "--turns must be at least 3, or there is no interval")
    device = translate.choose_device(config.device)
    precision = run.choose_precision(config.precision, device)
    run.use_tensor_cores(device)
    sizes = SIZES["cuda" if device.type == "cuda" else "cpu"]
    middle = list(sizes)[1]
    plan = [(middle, group) for group in (GROUPS[:1] if config.quick else GROUPS)]
    plan += [(size, GROUPS[0]) for size in sizes if size != middle and not config.quick]
    report = describe_machine(device) | {"precision": precision}
    report |= {"steps_per_turn": WINDOW, "turns": turns, "sizes": {}, "left_out": {}}
    if not find_spec("modlee"):
        report["left_out"]["Modlee"] = "not installed"
        plan = [(size, [a for a in group if ARMS[a].modlee is None]) for size, group in plan]
        plan = [(size, group) for size, group in plan if len(group) > 1 or group == ["phases"]]
    data.hub_reachable()  # or Modlee would try for minutes
    peak, found = 0.0, []  # found: (size, answers, work) of every group
    total = sum((turns + 1) * len(group) for _, group in plan)
    bar = data.progress_bar(desc="bench", total=total, unit="turn")
    with bar, tempfile.TemporaryDirectory() as folder:
        fixed = {"max_epochs": 1, "precision": precision, "mlruns": f"{folder}/mlruns"}
        settings = {}
        for size, changes in sizes.items():
            pairs = max(6400, 25 * changes.get("batch_size", 64))
            settings[size] = TrainConfig(**changes, **fixed, num_samples=pairs)
        prepared = run.prepare_data(settings[middle])
        if config.profile:
            path = Path(config.profile).expanduser()
            profile_steps(settings[middle], prepared, device, path)
            return {}
        for size, group in plan:
            # The best rate of the whole run: a slow moment would inflate every MFU.
            peak = max(peak, matmul_rate(device, precision))
            case = (settings[size], prepared, config.device)
            with serving(serve_arm, {name: (ARMS[name], *case) for name in group}) as serve:
                start(serve, report["left_out"])
                if len(serve) == 1 < len(group):
                    continue  # nothing to compare it with
                warm_up = take_turns(serve, 1, bar)  # whose losses must agree
                check_losses(warm_up)
                timed = take_turns(serve, turns, bar)
            answers = {name: warm_up[name] + timed[name] for name in timed}
            check_losses(answers)
            model, loaders = bench_case(settings[size], prepared, device)
            report["sizes"][size] = describe_work(loaders[0].batch_sampler, model.config)
            found.append((size, answers, report["sizes"][size]))
    report["matmul_gflops"] = peak / 1e9
    report["rows"] = [row for group in found for row in describe_arms(*group, peak)]
    print_bench(report)
    return report


if __name__ == "__main__":
    run_script(main, BenchConfig, "lightning")
