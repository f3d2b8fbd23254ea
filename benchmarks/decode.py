"""Decoding speed: greedy_decode and beam_search, transformers' generate and CTranslate2, with the
same weights.

    python -m benchmarks.decode --model runs/NAME --json benchmarks/decode-demo.json
    python -m benchmarks.decode --size tutorial --batch 32 --beam 4    (as on the H200)

Every library is a process of its own. They take turns. The table says how many sentences have the
same output as ours. CTranslate2 takes part if it is installed.
"""

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch

import data
import run
import translate
from benchmarks.harness import (
    describe_machine,
    matmul_rate,
    median_interval,
    run_script,
    serving,
    start,
    synchronize,
    take_turns,
    with_interval,
)
from data import InputError
from run import TrainConfig
from seq2seq import TransformerSeq2SeqModel, beam_search, greedy_decode


@dataclass(frozen=True)
class DecodeBench:
    """Decoding speed, this program beside transformers' generate and CTranslate2."""

    model: str | None = None  # model folder; None: random weights, which never write eos
    size: Literal["demo", "tutorial"] = "demo"  # of random weights
    sentences: int = 64  # how many sentences to decode
    batch: tuple[int, ...] = (1, 32)  # sentences decoded together
    beam: tuple[int, ...] = (1, 4)  # beam sizes; 1: greedy
    max_new_tokens: int = 32  # where a translation is cut
    turns: int = 5  # timed turns of every library
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to decode
    json: str | None = None  # file for the figures


def reference_case(config: DecodeBench, device: torch.device):
    """(model, tokenizer, ids of the sentences)."""
    if config.model is None:
        sizes = run.sizes_of(TrainConfig(**run.PRESETS[config.size]))
        vocabulary = {"demo": 800, "tutorial": 32_100}[config.size]
        torch.manual_seed(0)
        model = TransformerSeq2SeqModel(vocab_size=vocabulary, **sizes).to(device)
        with torch.no_grad():  # eos never wins, so every sentence is as long as allowed
            model.embedding.weight[model.config.eos_id] = 0
        lengths = torch.randint(5, 25, (config.sentences,)).tolist()
        ids = [[*torch.randint(3, vocabulary, (length,)).tolist(), 1] for length in lengths]
        return model.eval(), Numbered(), ids
    model, tokenizer, languages = translate.load_model(config.model, device)
    pairs = data.phrasebook(config.sentences, seed=1)
    texts = [data.normalize(english, languages[0]) for english, _ in pairs]
    return model, tokenizer, data.encode_texts(texts, tokenizer)


class Numbered:
    """Stands in for a tokenizer: token i is "i"."""

    unk_token = None

    def convert_ids_to_tokens(self, ids) -> list[str]:
        return [str(i) for i in ids]


# A library, loaded: (ids of a batch, beam size) -> ids of each translation without eos.
Decoder = Callable[[list[list[int]], int], list[list[int]]]


def load_ours(model, tokenizer, limit: int) -> Decoder:
    device, config = next(model.parameters()).device, model.config

    def decode(rows: list[list[int]], beam: int) -> list[list[int]]:
        input_ids = data.pad_side(map(torch.tensor, rows), config.pad_id).to(device)
        if beam == 1:
            output = greedy_decode(model, input_ids, limit).tolist()
        else:
            found = beam_search(model, input_ids, beam, max_new_tokens=limit)
            output = [best.tokens for best, *_ in found]
        return [without_ends(row, config) for row in output]

    return decode


def load_transformers(model, tokenizer, limit: int) -> Decoder:
    """`generate`, with its cache, of the exported model."""
    import transformers

    transformers.logging.set_verbosity_error()
    device, config = next(model.parameters()).device, model.config
    exported = translate.to_transformers(model).to(device)
    exported.generation_config.max_length = None  # max_new_tokens decides

    @torch.inference_mode()
    def decode(rows: list[list[int]], beam: int) -> list[list[int]]:
        input_ids = data.pad_side(map(torch.tensor, rows), config.pad_id).to(device)
        output = exported.generate(
            input_ids=input_ids,
            attention_mask=input_ids.ne(config.pad_id).long(),
            max_new_tokens=limit,
            num_beams=beam,
            do_sample=False,
        )
        return [without_ends(row, config) for row in output[:, 1:].tolist()]  # after the start

    return decode


def load_ctranslate2(model, tokenizer, limit: int, quantization: str | None = None) -> Decoder:
    """CTranslate2, through our export."""
    device = next(model.parameters()).device.type
    with tempfile.TemporaryDirectory() as folder:
        translate.to_ctranslate2(model, tokenizer, Path(folder), quantization)
        engine = translate.Engine(Path(folder), model.config, tokenizer, device)

    def decode(rows: list[list[int]], beam: int) -> list[list[int]]:
        found = engine.decode(rows, beam, max_new_tokens=limit)
        return [without_ends(best.tokens, model.config) for (best,) in found]

    return decode


LIBRARIES = {
    "ours": load_ours,
    "transformers": load_transformers,
    "ctranslate2": load_ctranslate2,
    "ctranslate2 int8": partial(load_ctranslate2, quantization="int8"),
}


def without_ends(row: list[int], config) -> list[int]:
    row = [token for token in row if token != config.pad_id]
    return row[: row.index(config.eos_id)] if config.eos_id in row else row


def serve_library(name: str, config: DecodeBench, pipe) -> None:
    """Runs in a process of its own. Sends None once the library is loaded, then answers (batch
    size, beam size, passes): without passes (outputs, seconds) of a first run, else seconds of a
    pass."""
    device = translate.choose_device(config.device)
    try:
        model, tokenizer, sentences = reference_case(config, device)
        library = LIBRARIES[name](model, tokenizer, config.max_new_tokens)
        library(sentences[:1], 1)  # CTranslate2 asks for CUDA's libraries only now
    except (InputError, RuntimeError) as error:
        pipe.send(InputError(data.one_line(error)))
        return
    pipe.send(None)

    def decode(batches: list) -> tuple[list, float]:
        started = time.perf_counter()
        outputs = [output for rows in batches for output in library(rows, beam)]
        synchronize(device)
        return outputs, time.perf_counter() - started

    with contextlib.suppress(EOFError):
        while True:
            size, beam, passes = pipe.recv()
            batches = [sentences[i : i + size] for i in range(0, len(sentences), size)][:16]
            if not passes:
                pipe.send(decode(batches))
                continue
            # Wakes up threads and caches, which idled during other turns.
            warm = time.perf_counter() + 0.2
            while time.perf_counter() < warm:
                decode([batches[0][:1]])
            pipe.send(decode(batches * passes)[1] / passes)


def compare(serve: dict[str, Callable], size: int, beam: int, config: DecodeBench, bar) -> list:
    """The rows of one batch size and beam."""
    outputs, first = {}, {}
    for name, ask in serve.items():
        outputs[name], first[name] = ask(size, beam, 0)
        bar.update()
    passes = math.ceil(0.5 / first["ours"])  # a stall weighs less in a longer turn
    seconds = take_turns(serve, config.turns, bar, (size, beam, passes))
    ours = outputs["ours"]
    tokens = sum(min(len(row) + 1, config.max_new_tokens) for row in ours)  # with eos
    rows = []
    for name, taken in seconds.items():
        ratios = np.divide(taken, seconds["ours"])
        row = {"library": name, "batch": size, "beam": beam, "sentences": len(ours)}
        row["same_output"] = sum(map(list.__eq__, ours, outputs[name]))
        row |= {"tokens": tokens, "tokens_per_second": round(tokens / median(taken), 1)}
        row["ms_per_sentence"] = round(1e3 * median(taken) / len(ours), 3)
        row["ours_is_faster"] = [round(value, 2) for value in median_interval(ratios)]
        rows.append(row | {"passes": passes, "turn_seconds": [round(v, 5) for v in taken]})
    return rows


def main(config: DecodeBench) -> dict:
    counts = (config.sentences, config.max_new_tokens, config.turns, *config.batch, *config.beam)
    data.require(min(counts) >= 1, "all counts must be at least 1")
    device = translate.choose_device(config.device)
    model, _, sentences = reference_case(config, device)
    rate = matmul_rate(device)
    names = [name for name in LIBRARIES if name == "ours" or find_spec(name.split()[0])]
    report = describe_machine(device)
    report |= {"model": dataclasses.asdict(model.config), "sentences": len(sentences)}
    report |= {"matmul_gflops": round(rate / 1e9, 1), "rows": [], "left_out": {}}
    total = len(config.batch) * len(config.beam) * len(names) * (config.turns + 1)
    jobs = {name: (name, config) for name in names}
    with serving(serve_library, jobs) as serve, data.progress_bar(total=total) as bar:
        start(serve, report["left_out"])
        for size in config.batch:
            for beam in config.beam:
                report["rows"] += compare(serve, size, beam, config, bar)
    print(f"{report['machine']}; {len(sentences)} sentences, {report['matmul_gflops']} GFLOP/s")
    print(f"{'':18}batch  beam  same  tokens/s  ms/sentence  ours is faster by")
    for row in report["rows"]:
        ratio = with_interval(*row["ours_is_faster"])
        print(
            f"{row['library']:18}{row['batch']:5}{row['beam']:6}{row['same_output']:6}"
            f"{row['tokens_per_second']:10,.0f}{row['ms_per_sentence']:13.2f}  {ratio}"
        )
    return report


if __name__ == "__main__":
    run_script(main, DecodeBench, "decode")
