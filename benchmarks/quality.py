"""Quality of translations beside transformers: the same pairs, vocabulary, minutes and cores.

    python -m benchmarks.quality --dataset rosts.en-ro.tsv tatoeba.en-ro.tsv \\
        --json benchmarks/quality-0.json

Ours is `run.py --preset small`. Each peer then trains for as long as ours did, by transformers'
`Seq2SeqTrainer` (which needs `pip install accelerate`). All translate the test pairs with four
beams, and sacreBLEU scores them alike. The pre-LN model's learning rate and batch were the best on
the validation pairs in a quarter of the time (README.md has the figures), by this, and by
`--batch-size 24` and `96`:

    python -m benchmarks.quality --dataset rosts.en-ro.tsv tatoeba.en-ro.tsv \\
        --peers pegasus --learning-rates 1e-3 2e-3 4e-3 --max-epochs 4

Marian's rate was the best of four in a trial with ReLU; here it has its own GELU.
`--texts FOLDER` trains nothing and writes the pairs for other tools, such as JoeyNMT.
"""

import contextlib
import dataclasses
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import run
import translate
from benchmarks.harness import describe_machine, run_script
from run import Prepared, TrainConfig
from seq2seq import Seq2SeqConfig

BEAM = 4


@dataclass(frozen=True)
class QualityBench:
    """Train ours and its peers on the same pairs, and compare their translations."""

    dataset: tuple[str, ...]  # pairs, as for training
    held_out: int = 1000  # sentences for validation, and as many for the test
    seed: int = 0  # of weights, split and order
    peers: tuple[str, ...] = ("pegasus", "marian")
    # of the peers, compared on the validation pairs; None: the best one, on the test pairs
    learning_rates: tuple[float, ...] | None = None
    batch_size: int = 48  # pairs, of the peers
    max_epochs: int | None = None  # of ours; None: as the preset has it
    texts: str | None = None  # folder for the three parts as line-aligned texts; nothing is trained
    json: str | None = None  # file for the figures


@dataclass(frozen=True)
class Peer:
    """A model of transformers and how it is trained."""

    label: str
    pre_norm: bool
    learning_rate: float
    weight_decay: float  # of the matrices


PEERS = {
    "pegasus": Peer("transformers, pre-LN (Pegasus)", True, 2e-3, 0.2),
    "marian": Peer("transformers Marian as it comes", False, 1e-3, 0.0),
}
WARMUP_STEPS, SMOOTHING, DROPOUT = 400, 0.1, 0.1


def build_peer(peer: Peer, config: TrainConfig, tokenizer):
    """The peer in our size, with transformers' own initialisation."""
    import transformers

    ids = {"pad_id": tokenizer.pad_token_id, "eos_id": tokenizer.eos_token_id}
    sizes = run.sizes_of(config) | ids | {"vocab_size": len(tokenizer), "dropout": DROPOUT}
    settings = translate.transformers_settings(Seq2SeqConfig(**sizes), len(tokenizer))
    torch.manual_seed(config.seed)
    if peer.pre_norm:  # with the standard deviation that embeddings need
        made = transformers.PegasusConfig(**settings, init_std=config.d_model**-0.5)
        return transformers.PegasusForConditionalGeneration(made)
    del settings["activation_function"]  # its own, GELU
    made = transformers.MarianConfig(**settings, decoder_vocab_size=len(tokenizer))
    return transformers.MarianMTModel(made)


def train_peer(
    model, batch_size: int, prepared: Prepared, config: TrainConfig, seconds: float
) -> int:
    """Train for that long, with our optimizer: linear warm-up, then a cosine to zero over the time.
    Returns the steps done."""
    import transformers

    begun = time.perf_counter()

    def share(step: int) -> float:
        done = min(1.0, (time.perf_counter() - begun) / seconds)
        return min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * done)) / 2

    class StopInTime(transformers.TrainerCallback):
        def on_step_end(self, arguments, state, control, **_):
            control.should_training_stop = time.perf_counter() - begun >= seconds

    train = prepared.train
    rows = [
        {"input_ids": s.tolist(), "labels": t.tolist()}
        for s, t in map(train.__getitem__, range(len(train)))
    ]
    grouped = {"train_sampling_strategy": "group_by_length"}  # the name since transformers 5
    if not hasattr(transformers.TrainingArguments, "train_sampling_strategy"):
        grouped = {"group_by_length": True}
    optimizer = run.build_optimizer(model, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.Seq2SeqTrainingArguments(
            folder,
            per_device_train_batch_size=batch_size,
            max_steps=10**6,
            label_smoothing_factor=SMOOTHING,
            bf16=torch.cuda.is_available(),
            seed=config.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            **grouped,
        )
        trainer = transformers.Seq2SeqTrainer(
            model,
            arguments,
            transformers.DataCollatorForSeq2Seq(prepared.tokenizer, model),
            rows,
            callbacks=[StopInTime()],
            optimizers=(optimizer, schedule),
        )
        with contextlib.redirect_stdout(sys.stderr):
            return trainer.train().global_step


@torch.inference_mode()
def translate_peer(model, texts: list[str], prepared: Prepared, config: TrainConfig) -> list[str]:
    """Translations by `generate`, in batches of like lengths."""
    rows = data.encode_texts(texts, prepared.tokenizer)
    order, found = sorted(range(len(rows)), key=lambda i: len(rows[i])), [""] * len(rows)
    device = next(model.parameters()).device
    model.eval()
    for start in data.progress_bar(range(0, len(rows), 32), desc="translate"):
        places = order[start : start + 32]
        ids = data.pad_side([torch.tensor(rows[i]) for i in places], model.config.pad_token_id)
        ids = ids.to(device)
        mask, limit = ids.ne(model.config.pad_token_id).long(), 2 * ids.size(1) + 10
        output = model.generate(
            input_ids=ids, attention_mask=mask, num_beams=BEAM, max_length=limit
        )
        texts = data.decode_ids(output.tolist(), prepared.tokenizer, config.target_lang)
        for place, text in zip(places, texts):
            found[place] = text
    return found


def write_texts(folder: Path, prepared: Prepared, config: TrainConfig) -> None:
    """train, dev and test, a file for each language, as our tokenizer reads them."""
    sides = ([row.tolist() for row in side] for side in zip(*prepared.train))
    decoded = (
        data.decode_ids(rows, prepared.tokenizer, code)
        for rows, code in zip(sides, config.languages)
    )
    parts = {"train": list(zip(*decoded)), "dev": prepared.validation_pairs}
    parts["test"] = prepared.test_pairs
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in parts.items():
        for place, code in enumerate(config.languages):
            lines = "".join(f"{pair[place]}\n" for pair in pairs)
            translate.write_text(folder / f"{name}.{code}", lines)


def compare(hypotheses: dict[str, list[str]], references: list[str]) -> dict[str, float]:
    """p-values of sacreBLEU's paired bootstrap test, of BLEU, ours beside each."""
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    test = PairedTest(
        list(hypotheses.items()), {"BLEU": BLEU()}, [references], test_type="bs", n_samples=1000
    )
    _, results = test()
    values = dict(zip(results["System"], results["BLEU"]))
    return {name: value.p_value for name, value in values.items() if value.p_value is not None}


def main(config: QualityBench) -> dict:
    for name in config.peers:
        data.require(name in PEERS, f"--peers {name}: there are {' and '.join(PEERS)}")
    flags = ["--preset", "small", "--dataset", *config.dataset, "--seed", str(config.seed)]
    flags += ["--validation-size", str(config.held_out), "--test-size", str(config.held_out)]
    flags += ["--loop", "raw", "--mlruns", "none"]
    if config.max_epochs:
        flags += ["--max-epochs", str(config.max_epochs)]
    settings = run.parse_settings(flags)
    if config.texts:
        write_texts(Path(config.texts).expanduser(), run.prepare_data(settings), settings)
        return {}
    report = describe_machine(translate.choose_device("auto")) | {"rows": {}}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "ours"
        data.require(run.main([*flags, "--output", str(output)]) == 0, "ours did not train")
        metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
        prepared = run.prepare_data(settings)
        pairs = prepared.validation_pairs if config.learning_rates else prepared.test_pairs
        report |= {"seed": config.seed, "training_pairs": len(prepared.train)}
        report["scored_pairs"] = len(pairs)
        sources, references = [pair.source for pair in pairs], [pair.target for pair in pairs]
        translator = translate.load_translator(str(output), beam=BEAM)
        hypotheses = {"ours": translator.translate(sources)}
    seconds = metrics["train_seconds"]
    done = {"ours": ("ours, --preset small", metrics["steps"], seconds)}
    for name in config.peers:
        for rate in config.learning_rates or (PEERS[name].learning_rate,):
            peer, key = PEERS[name], f"{name} {rate:g}"
            model, started = build_peer(peer, settings, prepared.tokenizer), time.perf_counter()
            own = dataclasses.replace(settings, learning_rate=rate, weight_decay=peer.weight_decay)
            steps = train_peer(model, config.batch_size, prepared, own, seconds)
            done[key] = (f"{peer.label}, {rate:g}", steps, time.perf_counter() - started)
            hypotheses[key] = translate_peer(model, sources, prepared, settings)
    p_values = compare(hypotheses, references)
    for name, (label, steps, taken) in done.items():
        row = {"label": label, "steps": steps, "seconds": round(taken, 1)}
        row |= translate.score(hypotheses[name], references) | {"p": p_values.get(name)}
        report["rows"][name] = row
        print(f"{label:40}{row['bleu']:7.2f} BLEU{row['chrf']:7.2f} chrF  {steps:6,} steps")
    return report


if __name__ == "__main__":
    run_script(main, QualityBench, "quality")
