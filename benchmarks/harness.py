"""What the benchmarks share: processes that take turns, the machine's rates, and statistics."""

import contextlib
import ctypes
import math
import multiprocessing
import platform
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

import run
import translate
from data import InputError


@contextlib.contextmanager
def serving(target: Callable, jobs: dict[str, tuple]) -> Iterator[dict[str, Callable]]:
    """Run target(*arguments, pipe) in a process of its own for each name -> arguments of `jobs`.

    Yields name -> function that sends what it is given, if anything, and returns the answer. A
    process that answers with an InputError, or dies, raises it here.
    """
    context, processes, pipes = multiprocessing.get_context("spawn"), [], {}

    def ask(name: str, *question):
        try:
            if question:
                pipes[name].send(question)
            answer = pipes[name].recv()
        except (EOFError, OSError):
            raise InputError(f"the process of {name} has died") from None
        if isinstance(answer, InputError):
            raise answer
        return answer

    try:
        for name, arguments in jobs.items():
            pipes[name], other_end = context.Pipe()
            arguments = (target, *arguments, other_end)
            process = context.Process(target=begin_service, args=arguments, daemon=True)
            with signals_later():  # until the process is in the list of those to kill
                process.start()
                processes.append(process)
            other_end.close()
        yield {name: partial(ask, name) for name in jobs}
    finally:
        for process in processes:
            process.kill()


@contextlib.contextmanager
def signals_later() -> Iterator[None]:
    """Defer signals until the block ends, by noting them, since other threads have no mask. A
    process started in the block begins with the signals masked: if it were killed before it has
    read its job, its parent would wait forever."""
    came = []
    handlers = {n: signal.signal(n, lambda n, _: came.append(n)) for n in run.STOP_SIGNALS}
    resource_tracker.ensure_running()  # its start would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, run.STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def begin_service(target: Callable, *arguments) -> None:
    """Entry point of the processes that `serving` starts and kills."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, run.STOP_SIGNALS)
    # tqdm's own lock is a semaphore, which a killed process would leave behind.
    tqdm.set_lock(threading.RLock())
    target(*arguments)


def start(serve: dict[str, Callable], left_out: dict[str, str]) -> None:
    """Wait until all are ready. Those that fail are moved from `serve` to `left_out`, with the
    reason."""
    for name in list(serve):
        try:
            serve[name]()
        except InputError as error:
            left_out[name] = str(error)
            del serve[name]


def take_turns(
    serve: dict[str, Callable], turns: int, bar, question: tuple = (True,)
) -> dict[str, list]:
    """Ask each in turn, in alternating order. Returns name -> answers [turns]."""
    answers = {name: [] for name in serve}
    for turn in range(turns):
        for name in serve if turn % 2 == 0 else reversed(serve):
            answers[name].append(serve[name](*question))
            bar.update()
    return answers


def median_interval(values: np.ndarray) -> list[float]:
    """values [N] -> [median, low, high]: their median with its bootstrapped 95 % interval."""
    picks = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return [float(np.median(values)), float(low), float(high)]


def with_interval(median: float, low: float, high: float) -> str:
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def matmul_rate(device: torch.device, precision: str = "fp32", size: int = 0, seconds=1.0) -> float:
    """FLOP/s of a product of two square matrices: the best within that time."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = size or (2048 if device.type == "cpu" else 8192)
    a, b = torch.ones(2, size, size, device=device, dtype=dtype)
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def memory_peak(device: torch.device, reset: bool = False) -> int | None:
    """Peak memory in bytes since the last reset: of the device, or of this process on Linux."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    try:
        if reset:
            # Returns freed memory to the system; its reuse would not raise the peak.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except (OSError, AttributeError):  # no Linux, or another libc
        return None
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def describe_machine(device: torch.device) -> dict:
    """What every report begins with."""
    machine = f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
    command = shlex.join(["python", *sys.orig_argv[1:]])
    return {"command": command, "machine": machine, "versions": translate.versions()}


def run_script(main: Callable, config: type, name: str) -> None:
    """`python -m benchmarks.NAME`: main(settings) prints and returns a report, which --json keeps.
    Errors that the user can fix are reported in one line."""
    run.set_environment()
    try:
        settings = tyro.cli(config, prog=f"python -m benchmarks.{name}")
        translate.check_output_file(settings.json)
        report = main(settings)
        for what, reason in report.get("left_out", {}).items():
            print(f"left out: {what}: {reason}")
        if settings.json and report:
            translate.write_json(Path(settings.json).expanduser(), report)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
