"""Pairs of sentences: reading, cleaning, tokenizer, split, batches.

In reading order, which is also the order of the pipeline:

    read_pairs     a hub data set, .tsv .csv .jsonl .json .parquet files, two line-aligned text
                   files, or the built-in phrasebook    -> Pair(source, target)
    clean          drops unusable pairs and counts them
    load_tokenizer, train_tokenizer, hold_out, encode   -> (pair, source ids, target ids)
    PairDataset, BucketBatchSampler, pad_batch          -> DataLoader of (input_ids, labels)

`load_dataset_and_tokenize` and `create_dataloaders` are the tutorial's two calls. The file needs
torch, numpy, datasets, transformers, scikit-learn, requests and tqdm, and nothing else of this
repository.
"""

import contextlib
import csv
import logging
import math
import os
import random
import re
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset
from tqdm import tqdm

BATCH_ROWS = 10_000  # rows read or tokenized at a time
PHRASEBOOK = "phrasebook"  # the data set name of the built-in corpus


class Pair(NamedTuple):
    """A sentence and its translation."""

    source: str
    target: str


# ---- messages ------------------------------------------------------------------------------------


class InputError(Exception):
    """Invalid input from the user. The message is one line and says what to do."""


def one_line(error: BaseException, limit: int | None = 200) -> str:
    """The message of an error, or its class name if it has none, on one line of at most `limit`
    characters."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def require(holds: bool, message: str) -> None:
    """Raise InputError unless the condition holds."""
    if not holds:
        raise InputError(message)


def is_first_process() -> bool:
    """Whether this is the only process, or torchrun's rank 0, which prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def note(text: str) -> None:
    if is_first_process():
        print(f"note: {text}", file=sys.stderr)


def print_field(topic: str, text: str) -> None:
    """A result on stdout, under a topic."""
    print(f"{topic:<10} {text}", flush=True)


class LogLines:
    """Stands in for stderr: each redraw of a progress bar becomes a new line."""

    def write(self, text: str) -> None:
        if text := text.strip():
            with contextlib.suppress(OSError):  # the reader of a pipe has ended
                print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def progress_bar(iterable=None, **settings) -> tqdm:
    """tqdm on stderr, in the first process only; without a terminal, a line every half minute."""
    settings = {"disable": not is_first_process()} | settings
    if not sys.stderr.isatty():
        settings |= {"file": LogLines(), "mininterval": 30, "maxinterval": 30}
    return tqdm(iterable, **settings)


# ---- text ----------------------------------------------------------------------------------------

# How a language is written in flags, headers and file endings, without script or region: ISO 639-1
# and 639-3 codes and names. "mo" and "mol" are the withdrawn codes of Moldovan, which is Romanian.
LANGUAGES = {
    "en": ("en", "eng", "english", "engleză"),
    "ro": ("ro", "ron", "rum", "mo", "mol", "romanian", "română", "romana"),
}

# Romanian is written with comma below; older text often has the similar Turkish letters with
# cedilla.
_COMMA_BELOW = str.maketrans("şţŞŢ", "șțȘȚ")

# Invisible characters: soft hyphen and zero-width space (where a line may break), byte-order mark
# and word joiner (where it may not), direction marks, joiner and non-joiner. They matter in Arabic,
# Hebrew or Indic scripts, but not in Latin script. A joiner after a symbol is kept, since it
# combines emoji.
_INVISIBLE = re.compile(
    "[\u00ad\u061c\u180e\u200b\u200c\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]"
    "|(?<![\u2600-\u27bf\ufe0f\U0001f000-\U0001faff])\u200d"
)

# Lone surrogates, which JSON can express and UTF-8 cannot.
SURROGATE = re.compile("[\ud800-\udfff]")


@lru_cache
def language_code(name: str) -> str:
    """The code of a language: "ro" for ro, RO, ron, ro-RO, ron_Latn, Romanian. One that is not in
    `LANGUAGES` keeps its name, in lower case."""
    name = name.strip().lower()
    for code, spellings in LANGUAGES.items():
        if re.split("[-_]", name)[0] in spellings:
            return code
    return name


def normalize(text: str, language: str) -> str:
    """NFC and single spaces. English and Romanian also lose invisible characters, and Romanian gets
    comma-below ș ț. `language`: any spelling."""
    if text.isascii():  # like most English: four times as fast
        return " ".join(text.split())
    code = language_code(language)
    if code in LANGUAGES:
        text = _INVISIBLE.sub("", text)
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return text.translate(_COMMA_BELOW) if code == "ro" else text


# ---- reading -------------------------------------------------------------------------------------


class Table(NamedTuple):
    """An open file or hub data set."""

    label: str  # for messages
    rows: Iterator[tuple[str, list]]  # (place, fields)
    names: list[str] | None = None  # of the columns; None: the first row may be a header


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        yield from decode_lines(file, str(path))


def decode_lines(file: Iterable[bytes], name: str) -> Iterator[tuple[str, str]]:
    """(place, line without its end) of UTF-8 lines, split at line feeds only. Raises InputError
    with the line number."""
    for number, raw in enumerate(file, 1):
        place = f"{name}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{place}: not valid UTF-8 (byte {error.start + 1} of the line); "
                "convert (or unpack) the file first"
            ) from None
        yield place, line.removesuffix("\n").removesuffix("\r")


def _aligned_table(paths: list[Path], languages: tuple[str, str]) -> Table:
    """Line n of one file is the translation of line n of the other; endings may name languages."""
    label, names = " ".join(map(str, paths)), [path.suffix[1:] for path in paths]
    require(paths[0] != paths[1], f"{label}: the same file twice; give one file per language")
    if _find_columns(names, languages) == (1, 0):
        raise InputError(
            f"{label}: the source language is {languages[0]}, but the endings say {names[0]} to "
            f"{names[1]}; name the source file first, or swap --source-lang and --target-lang"
        )

    def rows() -> Iterator[tuple[str, list]]:
        for first, second in zip_longest(*map(read_lines, paths)):
            if first is None or second is None:
                short, (place, _) = (paths[0], second) if first is None else (paths[1], first)
                raise InputError(f"{short} ends before {place}: the files are not line-aligned")
            yield first[0], [first[1], second[1]]

    known = all(language_code(name) in LANGUAGES for name in names)
    return Table(label, rows(), names if known else None)


def _import_datasets():
    """Hugging Face's `datasets`, without its log output, which repeats its exceptions."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


def _csv_records(path: Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """(place, fields). Raises InputError, also for an unmatched quote, which would join many lines
    into one field."""
    lines = (f"{line}\n" for _, line in read_lines(path))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            yield f"{path}:{reader.line_num}", fields
    except csv.Error as error:
        hint = "write a quote inside a quoted text twice, or give a .tsv file, which has no quoting"
        raise InputError(f"{path}:{reader.line_num}: {one_line(error)}; {hint}") from None


def _csv_delimiter(path: Path) -> str:
    """The delimiter that gives the first records the same number of fields: a comma, else a
    semicolon (Excel's, where the comma is the decimal point), else a tab."""
    for delimiter in ",;\t":
        with contextlib.suppress(InputError):
            records = islice(_csv_records(path, delimiter), 100)
            widths = {len(fields) for _, fields in records if fields}
            if len(widths) == 1 and widths != {1}:
                return delimiter
    return ","


# By the ending of a file. TSV is read as it stands, without quoting; JSON and Parquet by
# `datasets`.
FORMATS = {".tsv": "tsv", ".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def _file_table(path: Path) -> Table:
    """A file in one of the `FORMATS`."""
    kind = FORMATS[path.suffix.lower()]
    if kind == "tsv" or path.stat().st_size == 0:
        return Table(str(path), ((place, line.split("\t")) for place, line in read_lines(path)))
    if kind == "csv":
        return Table(str(path), _csv_records(path, _csv_delimiter(path)))
    if kind == "json":  # checked here, because `datasets` reports no line numbers
        for _ in read_lines(path):
            pass
    # Streaming writes no cache.
    options = {"split": "train", "data_files": str(path), "streaming": True}
    return _datasets_table(str(path), lambda: _import_datasets().load_dataset(kind, **options))


def _datasets_table(label: str, load: Callable) -> Table:
    """The rows of the data set that `load` returns: of {"en": .., "ro": ..}, or of
    {"translation": {"en": .., "ro": ..}}."""

    def records() -> Iterator[dict]:
        try:
            for batch in load().iter(BATCH_ROWS):
                for values in zip(*batch.values()):
                    record = dict(zip(batch, values))
                    nested = record.get("translation")
                    yield nested if isinstance(nested, dict) else record
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001 - of many types, which differ between versions
            raise InputError(f"{label}: not readable: {one_line(error)}") from None

    found = records()
    first = next(found, {})
    rows = enumerate(chain([first] if first else [], found), 1)
    fields = ((f"{label} row {i}", [record.get(name) for name in first]) for i, record in rows)
    return Table(label, fields, list(first))


def hub_reachable() -> bool:
    """Whether the Hugging Face hub answers. Asked before anything that would retry for minutes.

    If not, HF_HUB_OFFLINE is set for the process, so that cached files load and everything else
    fails at once. The libraries read that variable when they are imported, hence our late imports.
    If they were imported earlier, they keep retrying.
    """
    import requests

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    try:
        requests.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5)
    except requests.RequestException:
        os.environ["HF_HUB_OFFLINE"] = "1"
        return False
    return True


def _cannot_load(what: str, error: Exception, online: bool, advice: str) -> InputError:
    reason = "it is not cached here and the hub cannot be reached"
    if online:
        reason = f"{type(error).__name__}: {one_line(error)}"
    return InputError(f"cannot load {what}: {reason}; {advice}")


@lru_cache(maxsize=4)  # `has_split` may ask for several splits of one
def _hub_dataset(name: str, subset: str | None, split: str | None):
    """A split of a hub data set; None: all of them by name. Raises InputError."""
    online = hub_reachable()
    try:
        return _import_datasets().load_dataset(name, subset, split=split)
    except Exception as error:  # noqa: BLE001 - of many types, which differ between versions
        what = "data set " + "/".join(filter(None, (name, subset, split)))
        advice = "check the name, connect once, or give a file: --dataset pairs.tsv"
        raise _cannot_load(what, error, online, advice) from None


def has_split(name: str, subset: str | None, split: str) -> bool:
    """Whether a hub data set has this split, such as validation[:50%]. Raises InputError."""
    return split.partition("[")[0] in _hub_dataset(name, subset, None)


def is_on_hub(names: list[str]) -> bool:
    """Whether `read_pairs` treats `names` as the name of a hub data set."""
    (name, *others) = names
    path = Path(name).expanduser()
    is_file = bool(others) or path.suffix.lower() in FORMATS or path.exists()
    return not is_file and name != PHRASEBOOK


def _open_tables(
    names: list[str], subset: str | None, split: str, languages: tuple[str, str]
) -> Iterable[Table]:
    paths = [Path(name).expanduser() for name in names]
    unknown = [path for path in paths if path.suffix.lower() not in FORMATS]
    if names == [PHRASEBOOK]:
        rows = ((f"phrase {i}", list(pair)) for i, pair in enumerate(phrasebook(), 1))
        return [Table(PHRASEBOOK, rows, ["en", "ro"])]
    if is_on_hub(names):
        label = "/".join(filter(None, (names[0], subset, split)))
        return [_datasets_table(label, partial(_hub_dataset, names[0], subset, split))]
    if unknown and not len(unknown) == len(paths) == 2:
        raise InputError(
            f"cannot tell what {unknown[0]} is: give unpacked {' '.join(FORMATS)} files, "
            "or exactly two line-aligned text files, source first"
        )
    for path in paths:
        if not path.is_file():
            problem = "is not a regular file" if path.exists() else "does not exist"
            raise InputError(f"{path} {problem}")
    return [_aligned_table(paths, languages)] if unknown else map(_file_table, paths)


def _find_columns(names: list[str], languages: tuple[str, str]) -> tuple[int, int] | None:
    """Which columns hold source and target, by their names; None: the names do not say."""
    codes = [language_code(name) for name in names]
    wanted = [[language_code(language)] for language in languages]
    for sides in (wanted, [["source", "src"], ["target", "tgt", "trg"]]):
        found = [[i for i, code in enumerate(codes) if code in side] for side in sides]
        if all(found) and found[0] != found[1]:
            # Prefer the exact name of the language: "en" or "english", not "en_id".
            spellings = {*chain(*LANGUAGES.values())}
            order = [(name.lower() not in spellings, len(name)) for name in names]
            source, target = (min(side, key=order.__getitem__) for side in found)
            return source, target
    return None


def _choose_columns(
    table: Table, first: list, languages: tuple[str, str], columns: tuple[str, str] | None
) -> tuple[int, int, bool]:
    """(source column, target column, whether the row `first` is a header).

    Raises InputError if it is unclear which columns to take.
    """
    names = [str(name).strip() for name in (first if table.names is None else table.names)]
    listed = ", ".join(" ".join(name.split())[:40] for name in names[:10]) or "none"
    found = _find_columns(names, languages)
    is_header = table.names is None and found is not None
    if columns is not None:
        positions = {str(i): i - 1 for i in range(1, len(names) + 1)}
        numbers = {name: i for i, name in enumerate(names)} | positions  # a text may be a number
        for column in columns:
            if column not in numbers:
                raise InputError(f"{table.label}: no column {column!r}; found {listed}")
        found = numbers[columns[0]], numbers[columns[1]]
        require(found[0] != found[1], f"{table.label}: --columns names one column twice")
        is_header = is_header or (table.names is None and not set(columns) <= positions.keys())
        if table.names is None and not is_header:
            note(f"{table.label}: line 1 is read as a pair; for a header, give --columns by name")
    elif is_header:
        source, target = (names[i] for i in found)
        note(f"{table.label}: line 1 is a header; source is {source!r}, target is {target!r}")
    elif found is None:
        # A known or requested language in line 1: a header, but of other languages.
        known = {*LANGUAGES, *map(language_code, languages)}
        named = table.names is not None or any(language_code(name) in known for name in names)
        if named or len(names) != 2:
            hint = "pick two by name or number, such as --columns 1 2"
            if len(names) < 2:
                hint = "each side needs a column of its own"
            raise InputError(
                f"{table.label}: no columns for {languages[0]} and {languages[1]}, found {listed}; "
                f"{hint}"
            )
        note(f"{table.label} names no languages: column 1 is {languages[0]}, 2 is {languages[1]}")
        found = 0, 1
    for name in [names[i] for i in found] if is_header else []:
        by_name = columns is None or name in columns
        require(
            not by_name or names.count(name) == 1,
            f"{table.label}: several columns are called {name!r}; pick two by number, such as "
            "--columns 1 2",
        )
    return *found, is_header


def read_pairs(
    dataset: str | list[str],
    subset: str | None = None,
    split: str = "train",
    languages: tuple[str, str] = ("en", "ro"),
    columns: tuple[str, str] | None = None,
) -> Iterator[Pair]:
    """Normalised sentence pairs.

    Args:
        dataset: "phrasebook", a name on the Hugging Face hub, or one or more files: .tsv
            (source<TAB>target, no quoting), .csv, .jsonl or .json (objects), .parquet; or exactly
            two files of any other name, line-aligned, source first.
        subset, split: of a hub data set.
        languages: of source and target, in any spelling; they decide how text is normalised, and
            find the columns by their names.
        columns: the columns of source and target instead, by name or by number from 1. With
            numbers, a header without known languages is read as a pair.

    Raises InputError, for text files with file and line.
    """
    for language in languages:
        if language_code(language) not in LANGUAGES:
            note(f"no rules are known for the language {language!r}: its text gets only NFC")
    names = [dataset] if isinstance(dataset, str) else list(dataset)
    for table in _open_tables(names, subset, split, languages):
        first = next(table.rows, None)
        if first is None:
            note(f"{table.label} is empty")
            continue
        source, target, is_header = _choose_columns(table, first[1], languages, columns)
        width = len(first[1])
        for place, fields in table.rows if is_header else chain([first], table.rows):
            if len(fields) != width and any(fields):
                raise InputError(f"{place}: {len(fields)} columns, where line 1 has {width}")
            texts = [fields[i] if len(fields) == width else "" for i in (source, target)]
            texts = ["" if text is None else text for text in texts]
            for text in texts:
                if isinstance(text, list):
                    raise InputError(f"{place}: expected one text, found a list; keep one of them")
                if not isinstance(text, str) or SURROGATE.search(text):
                    raise InputError(f"{place}: expected text, found {text!r:.40}")
            yield Pair(*map(normalize, texts, languages))


# ---- cleaning ------------------------------------------------------------------------------------


def text_key(text: str) -> str:
    """The text without case and punctuation, for comparisons."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def clean(
    pairs: Iterable[Pair], dropped: Counter, held_out: set[str] = frozenset()
) -> Iterator[Pair]:
    """Usable pairs; the others are counted in `dropped` by reason.

    Dropped: pairs with an empty side; exact duplicates; held-out sources (`text_key`s of validation
    and test); pairs with one side longer than three times the other plus 20 characters.
    """
    seen = set()
    for pair in pairs:
        short, long = sorted(map(len, pair))
        if not short:
            dropped["empty"] += 1
        elif pair in seen:
            dropped["duplicate"] += 1
        elif held_out and text_key(pair.source) in held_out:
            dropped["held out"] += 1
        elif long > 3 * short + 20:
            dropped["length ratio"] += 1
        else:
            yield pair
        seen.add(pair)


def describe_dropped(dropped: dict[str, int]) -> str:
    """Text such as " (dropped: 3 duplicate, 1 empty)"; empty if nothing was dropped."""
    reasons = [f"{count:,} {reason}" for reason, count in dropped.items() if count]
    return f" (dropped: {', '.join(reasons)})" if reasons else ""


# ---- tokenizer -----------------------------------------------------------------------------------


def load_tokenizer(name: str):
    """A Hugging Face tokenizer by hub name or folder, with distinct pad and eos tokens.

    Pad also starts the decoder, so both must exist and differ. A missing one is added (GPT-2 has no
    pad, BERT no eos).
    """
    folder = Path(name).expanduser()
    if folder.is_file() or (not folder.is_dir() and name.startswith((".", "/", "~"))):
        raise InputError(f"tokenizer {name} is not the folder of a tokenizer")
    online = folder.is_dir() or hub_reachable()
    from transformers import AutoTokenizer

    try:
        with warnings.catch_warnings():  # 4.41 calls what newer huggingface_hub deprecates
            warnings.simplefilter("ignore", FutureWarning)
            # Explicit, because by default it asks on stdin whether to run a repository's code.
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder) if folder.is_dir() else name,
                local_files_only=not online,
                trust_remote_code=False,
            )
    except Exception as error:  # noqa: BLE001 - of many types, which differ between versions
        if folder.is_dir():  # of a model, where no other would do
            reason = one_line(error)
            raise InputError(f"{name} holds neither a model nor a tokenizer: {reason}") from None
        advice = "give another name, the folder of a tokenizer, or train one: train:8000"
        raise _cannot_load(f"tokenizer {name}", error, online, advice) from None
    if tokenizer.eos_token_id is None:
        tokenizer.add_special_tokens({"eos_token": "</s>"})
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    # Without the length limit of the model that it came with.
    tokenizer.model_max_length = int(1e30)
    return _plain_text(tokenizer)


def _plain_text(tokenizer):
    """Make the tokenizer read "</s>" in a text as plain characters."""
    tokenizer.split_special_tokens = True  # where transformers 5 looks
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.encode_special_tokens = True  # and 4
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """A byte-level BPE (Radford et al. 2019): every text round-trips, nothing is `<unk>`.

    Args: texts: sentences, source and target alike. vocab_size: 300 to 1,000,000, or InputError.
    Returns: a `PreTrainedTokenizerFast` with <pad> 0, </s> 1, <unk> 2.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if not 300 <= vocab_size <= 1_000_000:
        raise InputError(f"a vocabulary has 300 to 1,000,000 tokens, not {vocab_size:,}")
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return _plain_text(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special))


def encode_texts(texts: list[str], tokenizer) -> list[list[int]]:
    """Token ids of each text, ending in eos whether or not the tokenizer adds it by itself."""
    if not texts:
        return []
    if tokenizer.is_fast:
        # Bypasses the wrapper, which doubles the time; `encode_batch_fast` skips offsets.
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encode_batch = getattr(backend, "encode_batch_fast", backend.encode_batch)
        ids = [row.ids for row in encode_batch(texts, add_special_tokens=False)]
    else:
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[*row, tokenizer.eos_token_id] for row in ids]


def decode_ids(ids: list[list[int]], tokenizer, language: str) -> list[str]:
    """One line of normalised text per row of ids."""
    # Clean-up would change spaces around punctuation, unlike in training.
    texts = tokenizer.batch_decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [normalize(text, language) for text in texts]


def round_trip_loss(texts: list[str], tokenizer, language: str, sample: int = 5000) -> float:
    """Share of the texts, of `sample` of them, that encoding and decoding changes.

    Unlike a count of `<unk>`, it notices vocabularies that drop letters silently.
    """
    texts = random.Random(0).sample(texts, min(sample, len(texts)))
    decoded = decode_ids(encode_texts(texts, tokenizer), tokenizer, language)
    return sum(a != b for a, b in zip(texts, decoded)) / max(1, len(texts))


# ---- split ---------------------------------------------------------------------------------------


def hold_out(
    items: Sequence, keys: Iterable[Hashable], size: float, seed: int = 0
) -> tuple[list, list]:
    """Split into (rest, held out), both in order; no key is in both.

    A random split would leak: a source sentence with two translations could be in both parts.

    Args: keys: one per item. size: share of the distinct keys (below 1) or their number. Raises
    InputError if either part would be empty.
    """
    from sklearn.model_selection import GroupShuffleSplit

    numbers: dict[Hashable, int] = {}
    groups = [numbers.setdefault(key, len(numbers)) for key in keys]
    size = float(size) if size < 1 else int(size)
    splitter = GroupShuffleSplit(n_splits=1, test_size=size, random_state=seed)
    try:
        rest, part = next(splitter.split(groups, groups=groups))
    except ValueError:
        raise InputError(
            f"cannot hold out {size} of {len(numbers)} source sentences; "
            "give more pairs or another size"
        ) from None
    return [items[row] for row in sorted(rest)], [items[row] for row in sorted(part)]


# ---- token ids -----------------------------------------------------------------------------------


class PairDataset(Dataset):
    """Token ids of sentence pairs.

    `dataset[i]` is (source ids [S] int64, target ids [T] int64), both ending in eos. `lengths`:
    tokens of each source and of each target, 2 x [N].
    """

    def __init__(self, encoded: Iterable[tuple[object, list[int], list[int]]]):
        """What `encode` yields."""
        self.sources, self.targets = [], []
        for _, source, target in encoded:
            self.sources.append(np.array(source, np.int32))
            self.targets.append(np.array(target, np.int32))
        sides = (self.sources, self.targets)
        self.lengths = tuple(np.array([len(ids) for ids in side], np.int64) for side in sides)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return tuple(torch.from_numpy(side[row]).long() for side in (self.sources, self.targets))


def encode(
    pairs: Iterable[Pair], tokenizer, max_length: int, dropped: Counter
) -> Iterator[tuple[Pair, list[int], list[int]]]:
    """(pair, source ids, target ids) of the pairs that have at most `max_length` tokens a side.

    Longer ones are dropped and counted, not cut: half a sentence does not translate a whole one.
    """
    pairs = iter(pairs)
    while batch := list(islice(pairs, BATCH_ROWS)):
        sources = encode_texts([pair.source for pair in batch], tokenizer)
        targets = encode_texts([pair.target for pair in batch], tokenizer)
        for pair, source, target in zip(batch, sources, targets):
            if max(len(source), len(target)) > max_length:
                dropped["over-long"] += 1
            else:
                yield pair, source, target


# ---- batches -------------------------------------------------------------------------------------


@dataclass(eq=False)
class BucketBatchSampler(Sampler[list[int]]):
    """Batches of rows of similar length, in an order that depends only on (seed, epoch).

    A batch has `batch_size` rows, or with `batch_tokens` as many as fit: rows x the longest source
    and rows x the longest target are at most that, each rounded up to a `multiple` (a longer row
    makes a batch by itself). Rows are shuffled, sorted by target length into strata and by source
    length in each, so that neither side holds many pads; cut into batches, as many in every epoch;
    and the batches shuffled. `shuffle=False`: always the same batches in the same order.

    Of `world` processes, each takes every world-th batch, from its `rank` on. All take equally
    many; missing batches are empty. With `batch_tokens`, batches taken at the same time are of
    similar size, so that no process waits.
    """

    source_lengths: np.ndarray  # [N]
    target_lengths: np.ndarray  # [N]
    batch_size: int | None = None
    seed: int = 0
    shuffle: bool = True
    rank: int = 0
    world: int = 1
    batch_tokens: int | None = None
    multiple: int = 1
    start: tuple[int, int] = (0, 0)  # an epoch, and the batch with which it begins

    def __post_init__(self) -> None:
        if not self.batch_size and not self.batch_tokens:
            raise ValueError("a batch needs batch_size or batch_tokens")
        self.sampler = self  # where Lightning looks for set_epoch
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Lay out the batches of an epoch, counted from 0."""
        self.epoch = epoch
        count = len(self.source_lengths)
        random_state = np.random.default_rng([self.seed, epoch])
        rows = random_state.permutation(count) if self.shuffle else np.arange(count)
        batches = self._cut(rows)
        together = self.world if self.batch_tokens else 1
        groups = [batches[i : i + together] for i in range(0, len(batches), together)]
        if self.shuffle:  # an incomplete group stays the last
            complete = len(batches) // together
            groups = [groups[i] for i in random_state.permutation(complete)] + groups[complete:]
        self.batches = [batch for group in groups for batch in group]

    def _cut(self, rows: np.ndarray) -> list[np.ndarray]:
        source, target = self.source_lengths[rows], self.target_lengths[rows]
        budget = self.batch_tokens or self.batch_size
        longest = np.ones(len(rows), int)
        if self.batch_tokens:
            longest = round_up(np.maximum(source, target), self.multiple)
        # As many strata as a stratum has batches, which balances the pads of the two sides.
        strata = max(1, round(math.sqrt(longest.sum() / budget)))
        by_target = np.empty(len(rows), int)
        by_target[np.lexsort((source, target))] = np.arange(len(rows))
        stratum = by_target * strata // max(len(rows), 1)
        # Alternating direction, so that a batch across two strata mixes similar lengths.
        by_source = np.where(stratum % 2, -source, source)
        order = np.lexsort((by_source, stratum))
        # Rows equal in stratum and source length come in random order. Cut by the longest of them,
        # so that every epoch has as many batches, as schedules and Lightning expect.
        place = np.stack([stratum, source])[:, order]  # [2, N]
        starts = np.ones(len(rows), bool)
        starts[1:] = (place[:, 1:] != place[:, :-1]).any(axis=0)
        widths = np.maximum.reduceat(longest[order], np.flatnonzero(starts))
        widths = widths[np.cumsum(starts) - 1]  # [N]
        batches, start, widest = [], 0, 0
        for i, width in enumerate(widths.tolist()):
            widest = max(widest, width)
            if i > start and (i + 1 - start) * widest > budget:
                batches.append(rows[order[start:i]])
                start, widest = i, width
        batches.append(rows[order[start:]])
        return batches

    def rows(self, index: int) -> np.ndarray:
        """Row numbers of this process's batch number `index`; none where there is no batch left."""
        number = index * self.world + self.rank
        return self.batches[number] if number < len(self.batches) else np.array([], int)

    def padding_share(self) -> float:
        """Pads among all positions of this epoch's batches, both sides, from 0 to 1."""
        lengths = np.stack([self.source_lengths, self.target_lengths])  # [2, N]
        padded = sum(
            len(rows) * round_up(lengths[:, rows].max(axis=1), self.multiple).sum()
            for rows in self.batches
        )
        return 1.0 - lengths.sum() / padded

    def __iter__(self) -> Iterator[list[int]]:
        # A generator: it reads the epoch only when iteration starts.
        first = self.start[1] if self.epoch == self.start[0] else 0
        for index in range(first, len(self)):
            yield self.rows(index).tolist()

    def __len__(self) -> int:
        return math.ceil(len(self.batches) / self.world)


def round_up(length, multiple: int):
    """`length`, a number or an array, rounded up to a `multiple`."""
    return -(-length // multiple) * multiple


def pad_side(rows: Iterable[Tensor], pad_id: int = 0, multiple: int = 1) -> Tensor:
    """Id rows [T_i] -> [B, T] int64, padded on the right up to the longest row, whose length is
    rounded up to a `multiple`."""
    ids = pad_sequence(list(rows), batch_first=True, padding_value=pad_id)
    used = ids.ne(pad_id).any(dim=0).nonzero()  # columns that hold a token, [K, 1]
    width = round_up(int(used.max()) + 1, multiple)
    return torch.nn.functional.pad(ids, (0, width - ids.size(1)), value=pad_id)  # or cut


def pad_batch(
    rows: list[tuple[Tensor, Tensor]], pad_id: int = 0, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Rows (source [S_i], target [T_i]) -> (input_ids [B, S], labels [B, T]) int64."""
    if not rows:  # for a process that has run out of batches
        return torch.full((2, 1, 1), pad_id).unbind()
    sources, targets = zip(*rows)
    return pad_side(sources, pad_id, multiple), pad_side(targets, pad_id, multiple)


def make_loader(
    dataset: Dataset, batch_size: int | None, pad_id: int = 0, multiple: int = 1, **sampling
) -> DataLoader:
    """Batches (input_ids [B, S], labels [B, T]) of (source, target) rows with `.lengths`.

    `sampling`: what else `BucketBatchSampler` takes. Every epoch has the same order unless
    `loader.batch_sampler.set_epoch(epoch)` is called before it.
    """
    sampler = BucketBatchSampler(*dataset.lengths, batch_size, multiple=multiple, **sampling)
    collate = partial(pad_batch, pad_id=pad_id, multiple=multiple)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)


# ---- the tutorial's two calls --------------------------------------------------------------------


def load_dataset_and_tokenize(
    num_samples: int | None,
    dataset_name: str | list[str] = "wmt16",
    subset: str | None = "ro-en",
    split: str = "train[:80%]",
    max_length: int = 50,
    tokenizer: str = "t5-small",
    languages: tuple[str, str] = ("en", "ro"),
):
    """The first `num_samples` usable pairs of a data set as padded matrices.

    Returns: (input_ids [N, max_length], decoder_input_ids [N, max_length], tokenizer), int64,
    padded on the right. The second matrix holds the target sentences, each ending in eos: the
    labels, which `seq2seq.shift_right` turns into what the decoder reads. N is below num_samples
    only if the data has fewer pairs. Raises InputError.
    """
    dropped = Counter()
    tokenizer = load_tokenizer(tokenizer)
    pairs = clean(read_pairs(dataset_name, subset, split, languages), dropped)
    rows = list(islice(encode(pairs, tokenizer, max_length, dropped), num_samples))
    if not rows:
        raise InputError(f"no pairs left after cleaning{describe_dropped(dropped)}")
    matrices = torch.full((2, len(rows), max_length), tokenizer.pad_token_id)
    for row, (_, *sides) in enumerate(rows):
        for matrix, ids in zip(matrices, sides):
            matrix[row, : len(ids)] = torch.tensor(ids)
    return *matrices, tokenizer


def create_dataloaders(
    input_ids: Tensor,
    decoder_input_ids: Tensor,
    test_size: float = 0.2,
    batch_size: int = 16,
    pad_id: int = 0,
    seed: int = 0,
) -> tuple[DataLoader, DataLoader]:
    """Training and validation loaders over padded matrices [N, max_length] of token ids.

    Exact duplicate pairs are dropped, and no source sentence is in both parts. A batch is
    (input_ids [B, S], labels [B, T]), trimmed to its longest row; an item of `.dataset` keeps its
    full width, which is what Modlee's callbacks read. For a new order in every epoch call
    `train.batch_sampler.set_epoch(epoch)` before it.
    """
    pairs = torch.cat([input_ids, decoder_input_ids], dim=1)  # [N, S + T]
    sources, targets = pairs.unique(dim=0).tensor_split([input_ids.size(1)], dim=1)
    keys = map(tuple, sources.tolist())
    loaders = []
    for rows in hold_out(range(len(sources)), keys, test_size, seed):
        part = PaddedPairs(sources[rows], targets[rows], pad_id)
        loaders.append(make_loader(part, batch_size, pad_id, seed=seed, shuffle=not loaders))
    return loaders[0], loaders[1]


class PaddedPairs(TensorDataset):
    """`PairDataset` for pairs that are rows of padded matrices [N, S] and [N, T]."""

    def __init__(self, sources: Tensor, targets: Tensor, pad_id: int):
        super().__init__(sources, targets)
        self.lengths = tuple(ids.ne(pad_id).sum(dim=1).numpy() for ids in self.tensors)


# ---- the built-in corpus -------------------------------------------------------------------------
#
# Artificial sentences from a grammar that builds an English sentence and its Romanian translation
# side by side. Not a benchmark, but harder than replacing words: adjectives after the noun,
# agreement, the suffixed article and prepositions that drop it, verb persons, clitics (also
# doubling a human object: "Îl văd pe profesor"), the dative of "a plăcea", numerals.


def _table(text: str) -> list[list[str]]:
    return [line.split() for line in text.strip().splitlines()]


# English singular, plural; gender; kind (h human, a animal, t thing, p place); Romanian singular,
# with the article, plural, with the article.
_NOUNS = _table("""
teacher teachers m h profesor profesorul profesori profesorii
child children m h copil copilul copii copiii
girl girls f h fată fata fete fetele
nurse nurses f h asistentă asistenta asistente asistentele
cat cats f a pisică pisica pisici pisicile
dog dogs m a câine câinele câini câinii
book books f t carte cartea cărți cărțile
key keys f t cheie cheia chei cheile
apple apples n t măr mărul mere merele
house houses f p casă casa case casele
garden gardens f p grădină grădina grădini grădinile
school schools f p școală școala școli școlile
city cities n p oraș orașul orașe orașele
""")
# English; the kinds it describes; Romanian masculine, feminine, and both plurals (neuter nouns are
# masculine in the singular and feminine in the plural).
_ADJECTIVES = _table("""
big atp mare mare mari mari
small atp mic mică mici mici
beautiful hatp frumos frumoasă frumoși frumoase
good hatp bun bună buni bune
new tp nou nouă noi noi
old a bătrân bătrână bătrâni bătrâne
old tp vechi veche vechi vechi
tired ha obosit obosită obosiți obosite
red tp roșu roșie roșii roșii
""")
# English base, third person, past ("_" is a space); the kinds of its object, "-" for a place; who
# does it; Romanian I, you, he, we, they; past participle; infinitive.
_VERBS = _table("""
see sees saw hatp ha văd vezi vede vedem văd văzut vedea
look_for looks_for looked_for hat ha caut cauți caută căutăm caută căutat căuta
help helps helped h h ajut ajuți ajută ajutăm ajută ajutat ajuta
buy buys bought at h cumpăr cumperi cumpără cumpărăm cumpără cumpărat cumpăra
lose loses lost t h pierd pierzi pierde pierdem pierd pierdut pierde
sleep sleeps slept - ha dorm dormi doarme dormim dorm dormit dormi
eat eats ate - ha mănânc mănânci mănâncă mâncăm mănâncă mâncat mânca
""")
# English subject and object; person; form of adjectives; Romanian subject, where it is not dropped;
# clitic as object, and before "am"; emphatic dative; clitic as dative, and before "am".
_PRONOUNS = _table("""
I me 0 0 _ mă m- _ îmi mi-
you you 1 0 _ te te- _ îți ți-
he him 2 0 el îl l- lui îi i-
she her 2 1 ea o _ ei îi i-
we us 3 2 _ ne ne- _ ne ne-
they them 4 2 ei îi i- lor le le-
""")
# Masculine, feminine, and the plurals of both.
_DETERMINERS = _table("""
the _ _ _ _
a un o _ _
my meu mea mei mele
your tău ta tăi tale
his lui lui lui lui
this acest această _ _
these _ _ acești aceste
two _ _ doi două
twenty _ _ douăzeci_de douăzeci_de
""")
_DEFINITE = ("the", "my", "your", "his", "this", "these")
_PREPOSITIONS = (("in", "în"), ("near", "lângă"))
_TENSES = {  # "to be" in English and Romanian, by person; the auxiliary of other verbs
    "present": ("am are is are are", "sunt ești este suntem sunt", "_ _ _ _ _"),
    "past": ("was were was were were", "eram erai era eram erau", "am ai a am au"),
    "future": ("will will will will will", "voi vei va vom vor", "voi vei va vom vor"),
}


def _join(*words: str) -> str:
    return " ".join(word for word in words if word not in ("", "_")).replace("_", " ")


def _noun_phrase(rng: random.Random, kinds: str, determiners: tuple[str, ...] = ()) -> dict:
    """A noun of one of the kinds, with a determiner and perhaps an adjective."""
    word, *forms = rng.choice([d for d in _DETERMINERS if not determiners or d[0] in determiners])
    suffixed = word in ("the", "my", "your", "his")  # the noun has the article
    plural = rng.random() < 0.35 if suffixed else forms[0] == "_"
    noun = rng.choice([noun for noun in _NOUNS if noun[3] in kinds])
    gender, kind, bare, definite = *noun[2:4], *noun[4 + 2 * plural : 6 + 2 * plural]
    form = 2 * plural + (gender == "f" or (gender == "n" and plural))
    adjective = rng.choice([a for a in _ADJECTIVES if kind in a[1]])
    adjective = rng.choice(([""] * 6, adjective))
    ro = _join(forms[form], bare, adjective[2 + form])
    if suffixed:
        ro = _join(definite, forms[form], adjective[2 + form])
    en = _join(adjective[0], noun[plural])
    return {
        "en": f"{'an' if word == 'a' and en[0] in 'aeiou' else word} {en}",
        "ro": ro,
        # A preposition drops the article of a noun that stands alone: "în grădină".
        "governed": bare if word == "the" and not adjective[0] else ro,
        "person": 4 if plural else 2,
        "form": form,
        "kind": kind,
        "clitic": (("îl", "l-"), ("o", "_"), ("îi", "i-"), ("le", "le-"))[form],
        "definite": word in _DEFINITE,
    }


def _subject(rng: random.Random, kinds: str) -> dict:
    en, _, person, form, ro, *_ = rng.choice(_PRONOUNS)
    pronoun = {"en": en, "ro": ro, "person": int(person), "form": int(form), "kind": "h"}
    return rng.choice((pronoun, _noun_phrase(rng, kinds)))


def _action(rng: random.Random, tense: str, no: str, question: bool) -> tuple[str, str]:
    """A subject, a verb, and an object or a place."""
    subject, clitic, short = _subject(rng, "ha"), "", ""
    person = subject["person"]
    verb = rng.choice([verb for verb in _VERBS if subject["kind"] in verb[4]])
    if verb[3] == "-":
        thing, (en, ro) = _noun_phrase(rng, "p", _DEFINITE), rng.choice(_PREPOSITIONS)
        en_object, ro_object = f"{en} {thing['en']}", f"{ro} {thing['governed']}"
    elif "h" in verb[3] and rng.random() < 0.3:  # not "I see me", "we see me", "she sees her"
        same = (0, 3) if person in (0, 3) else (person,)
        others = [p for p in _PRONOUNS if int(p[2]) not in same]
        _, en_object, _, _, _, clitic, short, *_ = rng.choice(others)
        ro_object = ""
    else:
        thing = _noun_phrase(rng, verb[3])
        en_object, ro_object = thing["en"], thing["ro"]
        if thing["kind"] == "h" and thing["definite"]:
            # A definite person is doubled by a clitic and marked with "pe".
            ro_object, (clitic, short) = f"pe {thing['governed']}", thing["clitic"]
    *present, participle, infinitive = verb[5:]
    auxiliary = _TENSES[tense][2].split()[person]
    if tense == "past":  # "o" alone follows the participle
        after = "-o" if clitic == "o" else ""
        ro_verb = f"{short.strip('_')}{auxiliary} {participle}{after}"
    else:
        content = present[person] if tense == "present" else infinitive
        ro_verb = _join(clitic, auxiliary, content)
    english = _english(subject, verb, tense, no, question, en_object)
    if question and not no and rng.random() < 0.5:  # the subject goes behind the verb
        return f"why {english}", _join("de ce", ro_verb, subject["ro"], ro_object)
    return english, _join(subject["ro"], "nu" if no else "", ro_verb, ro_object)


def _state(rng: random.Random, tense: str, no: str, question: bool) -> tuple[str, str]:
    """To be something."""
    subject = _subject(rng, "hatp")
    adjective = rng.choice([a for a in _ADJECTIVES if subject["kind"] in a[1]])
    en_be, ro_be = (forms.split()[subject["person"]] for forms in _TENSES[tense][:2])
    start = (en_be, subject["en"]) if question else (subject["en"], en_be)
    be, fi = ("be", "fi") if tense == "future" else ("", "")
    ro = _join(subject["ro"], "nu" if no else "", ro_be, fi, adjective[2 + subject["form"]])
    return _join(*start, no, be, adjective[0]), ro


def _liking(rng: random.Random, tense: str, no: str, question: bool) -> tuple[str, str]:
    """What is liked becomes the subject, and who likes it a dative: "Îmi place casa"."""
    en, _, person, *_, emphatic, clitic, short = rng.choice(_PRONOUNS)
    thing = _noun_phrase(rng, "hatp", _DEFINITE)
    plural = thing["person"] == 4
    ro_verb = {
        "present": f"{clitic} {'plac' if plural else 'place'}",
        "past": f"{short}{'au' if plural else 'a'} plăcut",
        "future": f"{clitic} {'vor' if plural else 'va'} plăcea",
    }[tense]
    subject, verb = {"en": en, "person": int(person)}, ("like", "likes", "liked")
    english = _english(subject, verb, tense, no, question, thing["en"])
    return english, _join(emphatic, "nu" if no else "", ro_verb, thing["ro"])


def _english(subject: dict, verb, tense: str, no: str, question: bool, rest: str) -> str:
    base, third, past = verb[:3]
    present = ("does", third) if subject["person"] == 2 else ("do", base)
    helper, alone = {"present": present, "past": ("did", past), "future": ("will", "")}[tense]
    if question:
        return _join(helper, subject["en"], no, base, rest)
    if no or tense == "future":
        return _join(subject["en"], helper, no, base, rest)
    return _join(subject["en"], alone, rest)


def phrasebook(count: int = 50_000, seed: int = 0) -> Iterator[tuple[str, str]]:
    """`count` (English, Romanian) pairs; the same for the same seed, English never twice."""
    rng, seen = random.Random(seed), set()
    while len(seen) < count:
        make = rng.choice((_action, _action, _state, _liking))
        question, no = rng.random() < 0.25, rng.choice(("", "", "", "not"))
        pair = make(rng, rng.choice(list(_TENSES)), no, question)
        en, ro = (text[0].upper() + text[1:] + (".?"[question]) for text in pair)
        if en not in seen:
            seen.add(en)
            yield en, ro
