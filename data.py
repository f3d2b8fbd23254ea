"""Pairs of sentences: reading, cleaning, tokenizer, split, batches.

In reading order, which is also the way of the data:

    read_pairs     a hub data set, .tsv .csv .jsonl .json .parquet files, two line-aligned text
                   files, or the built-in phrasebook    -> Pair(source, target, place)
    clean          drops what teaches nothing, and counts it
    prepare        holds out validation and test, trains or loads the tokenizer, encodes
    PairDataset, BucketBatchSampler, pad_batch          -> DataLoader of (input_ids, labels)

`load_dataset_and_tokenize` and `create_dataloaders` are the tutorial's two calls. The file needs
torch, numpy, datasets, transformers, scikit-learn and tqdm, and nothing else of this repository.
"""

import csv
import hashlib
import logging
import math
import os
import random
import re
import ssl
import sys
import threading
import unicodedata
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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


class InputError(Exception):
    """The user gave something that cannot be used. The message is one line and says what to do."""


class Pair(NamedTuple):
    """A sentence, its translation, and where they stand, such as "pairs.tsv:17"."""

    source: str
    target: str
    place: str


def one_line(error: BaseException, limit: int | None = 200) -> str:
    """The message of an error on one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit]


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


# ---- text ----------------------------------------------------------------------------------------

# How a language is written in flags, headers and file endings, without script or region: ISO 639-1
# and 639-3 codes and names. "mo" and "mol" are the withdrawn codes of Moldovan, which is Romanian.
LANGUAGES = {
    "en": ("en", "eng", "english", "engleză"),
    "ro": ("ro", "ron", "rum", "mo", "mol", "romanian", "română", "romana"),
}

# Romanian is written with comma below; older text has the cedilla of Turkish, which looks alike.
_COMMA_BELOW = str.maketrans("şţŞŢ", "șțȘȚ")

# Characters that nobody sees: soft hyphen and zero-width space (where a line may break), byte-order
# mark and word joiner (where it may not), direction marks, joiner and non-joiner. They change how
# Arabic, Hebrew or Indic scripts look, and nothing in Latin script; the joiner stays after a
# symbol, where it makes one emoji of two.
_INVISIBLE = re.compile(
    "[\u00ad\u061c\u180e\u200b\u200c\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]"
    "|(?<![\u2600-\u27bf\ufe0f\U0001f000-\U0001faff])\u200d"
)


@lru_cache
def language_code(name: str) -> str:
    """ "ro" for ro, RO, ron, ro-RO, ron_Latn, Romanian; a language that is not in `LANGUAGES` keeps
    its name, in lower case."""
    name = name.strip().lower()
    for code, spellings in LANGUAGES.items():
        if re.split("[-_]", name)[0] in spellings:
            return code
    return name


def normalize(text: str, language: str) -> str:
    """Unicode NFC and single spaces; of English and Romanian without characters that nobody sees,
    of Romanian with comma-below ș ț. `language`: any spelling."""
    if text.isascii():  # which most English is: four times as fast
        return " ".join(text.split())
    code = language_code(language)
    if code in LANGUAGES:
        text = _INVISIBLE.sub("", text)
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return text.translate(_COMMA_BELOW) if code == "ro" else text


def is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can spell and no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---- reading -------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A file or a hub data set while it is read."""

    label: str  # for messages
    rows: Iterator[tuple[str, list]]  # (place, fields)
    names: list[str] | None = None  # of the columns; None: the first row may be a header


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path} {'is not a regular file' if path.exists() else 'does not exist'}")


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line without its end) of a UTF-8 file. Raises InputError with the line's number."""
    _require_file(path)
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            place = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{place}: not valid UTF-8 (byte {error.start + 1} of the line); "
                    "convert (or unpack) the file first"
                ) from None
            yield place, line.removesuffix("\n").removesuffix("\r")


def _tsv_table(path: Path) -> Table:
    """Fields with tabs between them, without quoting."""
    return Table(str(path), ((place, line.split("\t")) for place, line in read_lines(path)))


def _aligned_table(paths: list[Path], languages: tuple[str, str]) -> Table:
    """Line n of one file is the translation of line n of the other; endings may name languages."""
    label, names = " ".join(map(str, paths)), [path.suffix[1:] for path in paths]
    if _find_columns(names, languages) == (1, 0):
        raise InputError(
            f"{label}: the source language is {languages[0]}, but the endings say {names[0]} to "
            f"{names[1]}; name the source file first, or give the languages the other way round"
        )

    def rows() -> Iterator[tuple[str, list]]:
        for pair in zip_longest(*map(read_lines, paths)):
            if None in pair:
                short, (place, _) = (paths[0], pair[1]) if pair[0] is None else (paths[1], pair[0])
                raise InputError(f"{short} ends before {place}: the files are not line-aligned")
            yield pair[0][0], [line for _, line in pair]

    known = all(language_code(name) in LANGUAGES for name in names)
    return Table(label, rows(), names if known else None)


def _import_datasets():
    """Hugging Face's `datasets`, silent: what it reports it also raises."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


def _file_table(kind: str, path: Path) -> Table:
    """A csv, json or parquet file, read by `datasets`, streaming, which leaves no cache."""
    _require_file(path)
    lines = read_lines(path) if kind != "parquet" else ()
    empty, options = True, {"data_files": str(path), "split": "train", "streaming": True}
    for place, line in lines:  # checked here, because errors of `datasets` tell no line
        empty = empty and not line.strip()
        if kind == "csv" and "\0" in line:  # older pandas cut the field there
            raise InputError(f"{place}: a NUL character, which .csv cannot hold")
    if lines and empty:
        return Table(str(path), iter(()))

    def load():
        datasets = _import_datasets()
        if kind == "csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                columns = [str(number) for number, _ in enumerate(next(csv.reader(file)))]
            features = dict.fromkeys(columns, datasets.Value("string"))
            options.update(header=None, column_names=columns, features=datasets.Features(features))
            # "NA" and "null" are words, and an empty line is a row.
            options.update(keep_default_na=False, na_filter=False, skip_blank_lines=False)
        return datasets.load_dataset(kind, **options)

    table = _datasets_table(str(path), load)
    return table._replace(names=None) if kind == "csv" else table


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
        except Exception as error:  # noqa: BLE001 - of many kinds, others in every version
            raise InputError(f"{label}: not readable: {one_line(error)}") from None

    found = records()
    first = next(found, {})
    rows = enumerate(chain([first] if first else [], found), 1)
    fields = ((f"{label} row {i}", [record.get(name) for name in first]) for i, record in rows)
    return Table(label, fields, list(first))


def hub_reachable(seconds: float = 5.0) -> bool:
    """Whether the Hugging Face hub answers. Asked before anything that would retry for minutes.

    Where it does not, HF_HUB_OFFLINE is set, so that what is cached loads and all else fails at
    once. The libraries read that variable when they are imported, hence our late imports.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answers = []

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # an answer, if not a friendly one
        except OSError as error:
            # Without certificates (python.org's macOS builds) this call fails, not the libraries.
            if not isinstance(getattr(error, "reason", None), ssl.SSLError):
                return
        answers.append(True)

    # In a thread, because a time-out does not cover looking up the host's name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answers:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return bool(answers)


@lru_cache(maxsize=4)  # it is asked for its splits and for its rows
def _hub_dataset(name: str, subset: str | None, split: str | None):
    """A split of a hub data set; None: all of them by name. Raises InputError."""
    online = hub_reachable()
    datasets = _import_datasets()
    try:
        return datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # noqa: BLE001 - of many kinds, others in every version
        reason = "it is not cached here and the hub cannot be reached"
        if online:
            reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(
            f"cannot load data set {'/'.join(filter(None, (name, subset, split)))}: {reason}; "
            "check the name, connect once, or give a file: --dataset pairs.tsv"
        ) from None


def has_split(name: str, subset: str | None, split: str) -> bool:
    """Whether a hub data set has this split, such as validation[:50%]. Raises InputError."""
    return split.partition("[")[0] in _hub_dataset(name, subset, None)


READERS: dict[str, Callable[[Path], Table]] = {
    ".tsv": _tsv_table,
    ".csv": partial(_file_table, "csv"),
    ".jsonl": partial(_file_table, "json"),
    ".json": partial(_file_table, "json"),
    ".parquet": partial(_file_table, "parquet"),
}


def is_on_hub(names: list[str]) -> bool:
    """Whether `read_pairs` takes it for the name of a hub data set."""
    (name, *others) = names
    path = Path(name).expanduser()
    is_file = bool(others) or path.suffix.lower() in READERS or path.exists()
    return not is_file and name != PHRASEBOOK


def _open_tables(
    names: list[str], subset: str | None, split: str, languages: tuple[str, str]
) -> Iterator[Table]:
    paths = [Path(name).expanduser() for name in names]
    unknown = [path for path in paths if path.suffix.lower() not in READERS]
    if names == [PHRASEBOOK]:
        rows = ((f"phrase {i}", list(pair)) for i, pair in enumerate(phrasebook(), 1))
        yield Table(PHRASEBOOK, rows, ["source", "target"])
    elif is_on_hub(names):
        label = "/".join(filter(None, (names[0], subset, split)))
        yield _datasets_table(label, partial(_hub_dataset, names[0], subset, split))
    elif not unknown:
        yield from (READERS[path.suffix.lower()](path) for path in paths)
    elif len(unknown) == len(paths) == 2:
        yield _aligned_table(paths, languages)
    else:
        raise InputError(
            f"cannot tell what {unknown[0]} is: give files ending in {' '.join(READERS)}, "
            "or exactly two line-aligned text files, source first"
        )


def _find_columns(names: list[str], languages: tuple[str, str]) -> tuple[int, int] | None:
    """Which columns hold source and target, by their names; None: the names do not say."""
    codes = [language_code(name) for name in names]
    wanted = [[language_code(language)] for language in languages]
    for sides in (wanted, [["source", "src"], ["target", "tgt", "trg"]]):
        found = [[i for i, code in enumerate(codes) if code in side] for side in sides]
        if all(found) and found[0] != found[1]:
            return found[0][0], found[1][0]
    return None


def _choose_columns(
    table: Table, first: list, languages: tuple[str, str], columns: tuple[str, str] | None
) -> tuple[int, int, bool]:
    """(source column, target column, whether the row `first` is a header).

    Raises InputError where nothing says which columns to take, or names and languages disagree.
    """
    names = [str(name).strip() for name in (first if table.names is None else table.names)]
    listed = ", ".join(" ".join(name.split())[:40] for name in names[:10]) or "none"
    found, may_be_header = _find_columns(names, languages), table.names is None
    if columns is not None:
        numbers = {str(i): i - 1 for i in range(1, len(names) + 1)}
        numbers |= {name: i for i, name in enumerate(names)}
        for column in columns:
            if column not in numbers:
                raise InputError(f"{table.label}: no column {column!r}; found {listed}")
        header = may_be_header and (found is not None or set(columns) <= set(names))
        return numbers[columns[0]], numbers[columns[1]], header
    if found is not None:
        if may_be_header:
            source, target = (names[i] for i in found)
            note(f"{table.label}: line 1 is a header; source is {source!r}, target is {target!r}")
        return *found, may_be_header
    # Short codes, one of them of a language that is asked for: a header, but of other languages.
    codes = {language_code(language) for language in languages} & set(map(language_code, names))
    coded = codes and all(re.fullmatch("[A-Za-z]{2,3}([-_][A-Za-z]+)?", name) for name in names)
    if may_be_header and len(names) == 2 and not coded:
        note(f"{table.label} names no languages: column 1 is {languages[0]}, 2 is {languages[1]}")
        return 0, 1, False
    raise InputError(
        f"{table.label}: no columns for {languages[0]} and {languages[1]}, found {listed}; "
        "pick two by name or number, such as --columns 1 2"
    )


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
        columns: the columns of source and target instead, by name or by number from 1.

    Raises InputError, for text files with file and line.
    """
    for language in languages:
        if language_code(language) not in LANGUAGES:
            note(f"no rules are known for the language {language!r}: its text gets NFC alone")
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
            texts = [fields[i] or "" if len(fields) == width else "" for i in (source, target)]
            for text in texts:
                if not isinstance(text, str) or not is_unicode(text):
                    raise InputError(f"{place}: expected text, found {text!r:.40}")
            yield Pair(*map(normalize, texts, languages), place)


# ---- cleaning ------------------------------------------------------------------------------------


def text_key(text: str) -> str:
    """What is left of a text for somebody who ignores case and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def clean(
    pairs: Iterable[Pair], dropped: Counter, held_out: set[str] = frozenset()
) -> Iterator[Pair]:
    """Pairs that can teach something; the others are counted in `dropped` by reason.

    Dropped: a side is empty; the very same pair came before; its source is held out (`text_key`s of
    validation and test); one side is over three times as long as the other (in characters, with 20
    to spare for short sentences).
    """
    seen = set()
    for pair in pairs:
        texts = pair[:2]
        short, long = sorted(map(len, texts))
        if not short:
            dropped["empty"] += 1
        elif texts in seen:
            dropped["duplicate"] += 1
        elif held_out and text_key(pair.source) in held_out:
            dropped["held out"] += 1
        elif long > 3 * short + 20:
            dropped["length ratio"] += 1
        else:
            yield pair
        seen.add(texts)


def describe_dropped(dropped: dict[str, int]) -> str:
    """ " (dropped: 3 duplicate, 1 empty)", or nothing where nothing was."""
    reasons = [f"{count:,} {reason}" for reason, count in dropped.items() if count]
    return f" (dropped: {', '.join(reasons)})" if reasons else ""


# ---- tokenizer -----------------------------------------------------------------------------------


def load_tokenizer(name: str):
    """A Hugging Face tokenizer by hub name or folder, with a pad and an eos of its own.

    Ids are what the model sees, and pad also starts the decoder, so pad and eos must exist and
    differ. A missing one is added (GPT-2 has no pad, BERT no eos).
    """
    import warnings

    folder = Path(name).expanduser()
    if folder.is_dir():
        name = str(folder)
    elif folder.is_file() or name.startswith((".", "/", "~")):
        raise InputError(f"tokenizer {name} is no folder that a tokenizer was saved in")
    online = folder.is_dir() or hub_reachable()
    from transformers import AutoTokenizer

    try:
        with warnings.catch_warnings():  # 4.41 warns of what the newest hub deprecates
            warnings.simplefilter("ignore", FutureWarning)
            # Said, and not left out: asked for code, it would wait for an answer on stdin.
            tokenizer = AutoTokenizer.from_pretrained(
                name, local_files_only=not online, trust_remote_code=False
            )
    except Exception as error:  # noqa: BLE001 - of many kinds, others in every version
        reason = "it is not cached here and the hub cannot be reached"
        if online:
            reason = one_line(error, 120)
        raise InputError(
            f"cannot load tokenizer {name}: {reason}; give another name, the folder of a "
            "tokenizer, or train one: --tokenizer train:8000"
        ) from None
    if tokenizer.eos_token_id is None:
        tokenizer.add_special_tokens({"eos_token": "</s>"})
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    # Otherwise the limit of the model it came with, which is not ours.
    tokenizer.model_max_length = int(1e30)
    return _plain_text(tokenizer)


def _plain_text(tokenizer):
    """The tokenizer, told that "</s>" in a text is five characters and no end."""
    tokenizer.split_special_tokens = True  # where transformers 5 looks
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.encode_special_tokens = True  # and 4
    return tokenizer


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write the tokenizer's files such that transformers 4 and 5 both load them."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    text = path.read_text(encoding="utf-8")
    # Version 5 renamed the class, and reads the old name; version 4 knows no other.
    text = text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
    path.write_text(text, encoding="utf-8")


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """A byte-level BPE (Radford et al. 2019): every text round-trips, nothing is `<unk>`.

    Args: texts: sentences, source and target alike. vocab_size: at least 300.
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
        # Past the wrapper, which takes as long again; without offsets where that can be said.
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
    # Clean-up would move spaces around punctuation, which training never saw.
    texts = tokenizer.batch_decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [normalize(text, language) for text in texts]


def round_trip_loss(texts: list[str], tokenizer, language: str, sample: int = 5000) -> float:
    """Share of the texts that encoding and decoding changes, of `sample` of them.

    It sees what a share of `<unk>` does not: a vocabulary without `<unk>` leaves letters out.
    """
    texts = random.Random(0).sample(texts, min(sample, len(texts)))
    decoded = decode_ids(encode_texts(texts, tokenizer), tokenizer, language)
    return sum(a != b for a, b in zip(texts, decoded)) / max(1, len(texts))


# ---- split ---------------------------------------------------------------------------------------


def grouped_split(groups: np.ndarray, size: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers that stay and row numbers held out, in order; no group has rows in both.

    A random split would leak: a source sentence with two translations would stand on both sides.

    Args: groups: [N], equal for rows of one group. size: share of the groups (below 1) or their
    number. Raises InputError where that leaves either side empty.
    """
    from sklearn.model_selection import GroupShuffleSplit

    size = float(size) if size < 1 else int(size)
    splitter = GroupShuffleSplit(n_splits=1, test_size=size, random_state=seed)
    try:
        rest, part = next(splitter.split(groups, groups=groups))
    except ValueError:
        raise InputError(
            f"cannot hold out {size} of {len(set(groups.tolist()))} source sentences; "
            "give more pairs or hold out fewer"
        ) from None
    return np.sort(rest), np.sort(part)


def hold_out(pairs: list[Pair], size: float, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """(those that stay, those held out), grouped by `text_key` of the source; see `grouped_split`."""
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(text_key(pair.source), len(numbers)) for pair in pairs]
    rest, part = grouped_split(np.array(groups), size, seed)
    return [pairs[row] for row in rest], [pairs[row] for row in part]


# ---- token ids -----------------------------------------------------------------------------------


class PairDataset(Dataset):
    """Token ids of sentence pairs, flat: row i of a side is ids[offsets[i]:offsets[i + 1]].

    `dataset[i]` is (source ids [S] int64, target ids [T] int64), both ending in eos; it was read
    at `dataset.places[i]`.
    """

    def __init__(self, sources: list[np.ndarray], targets: list[np.ndarray], places: list[str]):
        """sources, targets: int32 ids of each row."""
        self.places, self.sides = places, []
        for rows in (sources, targets):
            offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
            self.sides.append((np.concatenate([np.array([], np.int32), *rows]), offsets))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        source, target = (
            torch.from_numpy(ids[offsets[row] : offsets[row + 1]]).long()
            for ids, offsets in self.sides
        )
        return source, target

    @property
    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens per row of source and target, eos included, each [N]."""
        source, target = (np.diff(offsets) for _, offsets in self.sides)
        return source, target

    def digest(self) -> str:
        """The same for the same ids in the same order, and for no others."""
        content = hashlib.sha256()
        for ids, offsets in self.sides:
            content.update(offsets.tobytes())
            content.update(ids.tobytes())
        return content.hexdigest()


def _batched(rows: Iterable) -> Iterator[list]:
    rows = iter(rows)
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch


def encode(
    pairs: Iterable[Pair], tokenizer, max_length: int, dropped: Counter, limit: int | None = None
) -> tuple[list[Pair], PairDataset]:
    """The first `limit` pairs of at most `max_length` tokens a side, as they are and as ids.

    Longer ones are dropped and counted, not cut: half a sentence is no translation of a whole one.
    """
    kept, sides = [], ([], [])
    for batch in _batched(pairs):
        texts = [[pair[side] for pair in batch] for side in (0, 1)]
        for pair, *ids in zip(batch, *(encode_texts(side, tokenizer) for side in texts)):
            if len(kept) == limit:
                break
            if max(map(len, ids)) > max_length:
                dropped["over-long"] += 1
                continue
            kept.append(pair)
            for side, row in zip(sides, ids):
                side.append(np.array(row, np.int32))
        if len(kept) == limit:
            break
    return kept, PairDataset(*sides, [pair.place for pair in kept])


@dataclass
class Data:
    """What a training run needs to know of its data."""

    tokenizer: object
    train: PairDataset
    validation: PairDataset
    validation_pairs: list[Pair]  # of a given set also what is over-long
    test_pairs: list[Pair]  # may be empty
    dropped: dict[str, int]  # pairs lost in cleaning, by reason
    round_trip_loss: tuple[float, float]  # of the training pairs, source and target


def whole_pairs(pairs: Iterable[Pair], name: str) -> list[Pair]:
    """Those that have two sides, which are all that is scored. Raises InputError without any."""
    found = [pair for pair in pairs if pair.source and pair.target]
    if not found:
        raise InputError(f"{name} holds no pair of two sides")
    return found


def prepare(
    pairs: Iterable[Pair],
    tokenizer: str,
    max_length: int,
    validation_size: float = 0.02,
    test_size: float = 0.0,
    num_samples: int | None = None,
    seed: int = 0,
    validation: Iterable[Pair] | None = None,
    test: Iterable[Pair] | None = None,
    languages: tuple[str, str] = ("en", "ro"),
) -> Data:
    """From sentence pairs to token ids of training and validation.

    Args:
        tokenizer: a hub name, a folder, or "train:N", a vocabulary of N learnt from the training
            pairs alone.
        max_length: tokens per sentence, eos included; longer pairs are dropped.
        validation_size, test_size: share of the source sentences held out, or their number.
        num_samples: stop after this many pairs that survived cleaning.
        validation, test: pairs of their own, instead of some held out; whatever has a source in
            common with them is left out of training.

    Raises InputError where nothing is left.
    """
    dropped = Counter()
    kind, _, size = tokenizer.partition(":")
    if kind == "train" and not size.isdecimal():
        raise InputError(f"--tokenizer {tokenizer}: write train:N, for example train:8000")
    validation = None if validation is None else whole_pairs(validation, "the validation set")
    test = None if test is None else whole_pairs(test, "the test set")
    held_out = {text_key(pair.source) for pair in chain(validation or (), test or ())}
    bar = partial(tqdm, unit=" pairs", unit_scale=True, leave=False, delay=2)
    kept = clean(bar(pairs, desc="read"), dropped, held_out)
    if kind == "train":
        kept = list(islice(kept, num_samples))
    else:
        tokenizer = load_tokenizer(tokenizer)
        kept = list(kept) if num_samples is None else kept
        kept, _ = encode(kept, tokenizer, max_length, dropped, num_samples)
    if not kept:
        raise InputError(f"no pairs left after cleaning{describe_dropped(dropped)}")
    if test is None and test_size:
        kept, test = hold_out(kept, test_size, seed)
    own_validation = validation is None
    if own_validation:
        kept, validation = hold_out(kept, validation_size, seed)
    if kind == "train":
        tokenizer = train_tokenizer((text for pair in kept for text in pair[:2]), int(size))
    kept, train_ids = encode(bar(kept, desc="encode"), tokenizer, max_length, dropped)
    beyond = dropped if own_validation else Counter()
    fitting, validation_ids = encode(validation, tokenizer, max_length, beyond)
    if own_validation:
        validation = fitting
    else:
        dropped["over-long validation"] = beyond["over-long"]
    if not kept or not fitting:
        raise InputError(f"training or validation is empty{describe_dropped(dropped)}")
    lost = tuple(
        round_trip_loss([pair[side] for pair in kept], tokenizer, languages[side])
        for side in (0, 1)
    )
    return Data(tokenizer, train_ids, validation_ids, validation, test or [], dict(dropped), lost)


# ---- batches -------------------------------------------------------------------------------------


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of rows of similar length, in an order that follows from (seed, epoch) alone.

    A batch has `batch_size` rows, or with `batch_tokens` as many as fit: rows x the longest source
    and rows x the longest target are at most that, each rounded up to a `multiple` (a longer row
    makes a batch by itself). Rows are shuffled, sorted by target length into strata and by source
    length in each, so that neither side holds many pads; cut into batches, as many in every epoch;
    and the batches shuffled. `shuffle=False`: always the same batches in the same order.

    Of `world` processes, each takes every world-th batch, from its `rank` on. All take equally many:
    where the batches run out, an empty one. With `batch_tokens` those taken together are alike, so
    that none waits for another.
    """

    def __init__(
        self,
        source_lengths: np.ndarray,
        target_lengths: np.ndarray,
        batch_size: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        batch_tokens: int | None = None,
        multiple: int = 1,
    ):
        self.source_lengths, self.target_lengths = source_lengths, target_lengths
        self.multiple = multiple
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self.seed, self.shuffle = seed, shuffle
        self.rank, self.world = rank, world
        self.sampler = self  # where Lightning looks for set_epoch
        self._start = (0, 0)
        self.set_epoch(0)

    def start_at(self, epoch: int, index: int) -> None:
        """Let that epoch begin with batch number `index`; the numbers stay what they are."""
        self._start = (epoch, index)

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
        self._tokens = [int(self.target_lengths[rows].sum()) for rows in self.batches]

    def _cut(self, rows: np.ndarray) -> list[np.ndarray]:
        source, target = self.source_lengths[rows], self.target_lengths[rows]
        budget = self.batch_tokens or self.batch_size
        longest = np.ones(len(rows), int)
        if self.batch_tokens:
            longest = round_up(np.maximum(source, target), self.multiple)
        # As many strata as a stratum has batches: pads of the two sides weigh the same.
        strata = max(1, round(math.sqrt(longest.sum() / budget)))
        rank = np.empty(len(rows), int)
        rank[np.lexsort((source, target))] = np.arange(len(rows))
        stratum = rank * strata // max(len(rows), 1)
        # There and back, so that a batch over the border of two strata is no odd one.
        by_source = np.where(stratum % 2, -source, source)
        order = np.lexsort((by_source, stratum))
        # Cut by the longest of those alike in stratum and source length, among which the order is
        # random: as many batches in every epoch, which schedules and Lightning count on.
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
        """Row numbers of this process's batch number `index`; none where the batches have run out."""
        number = index * self.world + self.rank
        return self.batches[number] if number < len(self.batches) else np.array([], int)

    def target_tokens(self, index: int) -> int:
        """Target tokens of this process's batch number `index`."""
        number = index * self.world + self.rank
        return self._tokens[number] if number < len(self._tokens) else 0

    def window_tokens(self, index: int, accumulate: int) -> int:
        """Target tokens, of all processes, in the accumulation window of batch number `index`."""
        size = accumulate * self.world
        start = index // accumulate * size
        return sum(self._tokens[start : start + size])

    def padding_share(self) -> float:
        """Pads among all positions of this epoch's batches, both sides, from 0 to 1."""
        real = padded = 0
        for lengths in (self.source_lengths, self.target_lengths):
            real += lengths.sum()
            padded += sum(
                len(rows) * round_up(lengths[rows].max(), self.multiple) for rows in self.batches
            )
        return 1.0 - real / padded

    def __iter__(self) -> Iterator[list[int]]:
        # A generator, which looks at the epoch when it is first asked.
        first = self._start[1] if self.epoch == self._start[0] else 0
        for index in range(first, len(self)):
            yield self.rows(index).tolist()

    def __len__(self) -> int:
        return math.ceil(len(self.batches) / self.world)


def round_up(length, multiple: int):
    """A number, or an array of them."""
    return -(-length // multiple) * multiple


def pad_side(rows: Iterable[Tensor], pad_id: int = 0, multiple: int = 1) -> Tensor:
    """Id rows [T_i] -> [B, T] int64, padded on the right up to the longest row, whose length is
    rounded up to a `multiple`, so that a compiler meets few shapes."""
    ids = pad_sequence(list(rows), batch_first=True, padding_value=pad_id)
    used = ids.ne(pad_id).any(dim=0).nonzero()  # columns that hold a token, [K, 1]
    width = round_up(int(used.max()) + 1, multiple)
    more = max(0, width - ids.size(1))
    return torch.nn.functional.pad(ids[:, :width], (0, more), value=pad_id)


def pad_batch(
    rows: list[tuple[Tensor, Tensor]], pad_id: int = 0, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Rows (source [S_i], target [T_i]) -> (input_ids [B, S], labels [B, T]) int64."""
    if not rows:  # what a process gets when the batches have run out: nothing to learn
        return torch.full((2, 1, 1), pad_id).unbind()
    sources, targets = zip(*rows)
    return pad_side(sources, pad_id, multiple), pad_side(targets, pad_id, multiple)


def make_loader(
    dataset: Dataset,
    batch_size: int | None,
    pad_id: int = 0,
    seed: int = 0,
    shuffle: bool = True,
    rank: int = 0,
    world: int = 1,
    batch_tokens: int | None = None,
    multiple: int = 1,
) -> DataLoader:
    """Batches (input_ids [B, S], labels [B, T]) of (source, target) rows with `.lengths`; see
    `BucketBatchSampler` for what makes a batch."""
    sampler = BucketBatchSampler(
        *dataset.lengths, batch_size, seed, shuffle, rank, world, batch_tokens, multiple
    )
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
    labels, which `seq2seq.shift_right` turns into what the decoder reads. N falls short of
    num_samples only where the data does. Raises InputError.
    """
    dropped = Counter()
    tokenizer = load_tokenizer(tokenizer)
    pairs = clean(read_pairs(dataset_name, subset, split, languages), dropped)
    _, encoded = encode(pairs, tokenizer, max_length, dropped, num_samples)
    if not len(encoded):
        raise InputError(f"no pairs left after cleaning{describe_dropped(dropped)}")
    sides = []
    for rows in zip(*encoded):
        matrix = torch.full((len(rows), max_length), tokenizer.pad_token_id)
        for line, ids in zip(matrix, rows):
            line[: len(ids)] = ids
        sides.append(matrix)
    return sides[0], sides[1], tokenizer


def create_dataloaders(
    input_ids: Tensor,
    decoder_input_ids: Tensor,
    test_size: float = 0.2,
    batch_size: int = 16,
    pad_id: int = 0,
    seed: int = 0,
) -> tuple[DataLoader, DataLoader]:
    """Training and validation loaders over padded matrices [N, max_length] of token ids.

    Exact duplicate pairs are dropped, and no source sentence stands on both sides. A batch is
    (input_ids [B, S], labels [B, T]), trimmed to its longest row; an item of `.dataset` keeps its
    full width, which is what Modlee's callbacks read.
    """
    widths = [input_ids.size(1), decoder_input_ids.size(1)]
    pairs = torch.cat([input_ids, decoder_input_ids], dim=1)  # [N, S + T]
    sources, targets = pairs.unique(dim=0).split(widths, dim=1)
    _, groups = sources.unique(dim=0, return_inverse=True)
    rows, held_out = grouped_split(groups.numpy(), test_size, seed)
    train = PaddedPairs(sources[rows], targets[rows], pad_id)
    validation = PaddedPairs(sources[held_out], targets[held_out], pad_id)
    return (
        make_loader(train, batch_size, pad_id, seed),
        make_loader(validation, batch_size, pad_id, seed, shuffle=False),
    )


class PaddedPairs(TensorDataset):
    """Pairs as rows of padded matrices [N, S] and [N, T]; the other side of `PairDataset`."""

    def __init__(self, sources: Tensor, targets: Tensor, pad_id: int):
        super().__init__(sources, targets)
        self.lengths = tuple(ids.ne(pad_id).sum(dim=1).numpy() for ids in self.tensors)


# ---- the built-in corpus -------------------------------------------------------------------------
#
# An invented phrasebook: a grammar that builds an English sentence and its Romanian translation side
# by side. It is no benchmark, but takes more than replacing words: adjectives after the noun,
# agreement in gender and number, the suffixed article and prepositions that drop it, verb persons,
# clitics (also doubling a human object: "Îl văd pe profesor"), dative "a plăcea", numerals.

# English singular, plural; gender; kind (h human, a animal, t thing, p place); Romanian singular,
# with the article, plural, with the article.
_NOUNS = """
teacher teachers m h profesor profesorul profesori profesorii
doctor doctors m h doctor doctorul doctori doctorii
neighbour neighbours m h vecin vecinul vecini vecinii
child children m h copil copilul copii copiii
girl girls f h fată fata fete fetele
nurse nurses f h asistentă asistenta asistente asistentele
cat cats f a pisică pisica pisici pisicile
dog dogs m a câine câinele câini câinii
horse horses m a cal calul cai caii
bird birds f a pasăre pasărea păsări păsările
book books f t carte cartea cărți cărțile
key keys f t cheie cheia chei cheile
shirt shirts f t cămașă cămașa cămăși cămășile
apple apples n t măr mărul mere merele
knife knives n t cuțit cuțitul cuțite cuțitele
shoe shoes m t pantof pantoful pantofi pantofii
house houses f p casă casa case casele
garden gardens f p grădină grădina grădini grădinile
school schools f p școală școala școli școlile
city cities n p oraș orașul orașe orașele
"""
# English; the kinds it describes; Romanian masculine, feminine, and both plurals (neuter nouns are
# masculine in the singular and feminine in the plural).
_ADJECTIVES = """
big atp mare mare mari mari
small atp mic mică mici mici
beautiful hatp frumos frumoasă frumoși frumoase
good hatp bun bună buni bune
new tp nou nouă noi noi
old a bătrân bătrână bătrâni bătrâne
old tp vechi veche vechi vechi
tired ha obosit obosită obosiți obosite
tall h înalt înaltă înalți înalte
black atp negru neagră negri negre
red tp roșu roșie roșii roșii
"""
# English base, third person, past ("_" is a space); the kinds of its object, "-" for a place; who
# does it; Romanian I, you, he, we, they; past participle; infinitive.
_VERBS = """
see sees saw hatp ha văd vezi vede vedem văd văzut vedea
find finds found hat ha găsesc găsești găsește găsim găsesc găsit găsi
look_for looks_for looked_for hat ha caut cauți caută căutăm caută căutat căuta
hear hears heard ha ha aud auzi aude auzim aud auzit auzi
help helps helped h h ajut ajuți ajută ajutăm ajută ajutat ajuta
call calls called h h chem chemi cheamă chemăm cheamă chemat chema
buy buys bought at h cumpăr cumperi cumpără cumpărăm cumpără cumpărat cumpăra
sell sells sold at h vând vinzi vinde vindem vând vândut vinde
lose loses lost t h pierd pierzi pierde pierdem pierd pierdut pierde
sleep sleeps slept - ha dorm dormi doarme dormim dorm dormit dormi
eat eats ate - ha mănânc mănânci mănâncă mâncăm mănâncă mâncat mânca
sing sings sang - h cânt cânți cântă cântăm cântă cântat cânta
"""
# English subject and object; person; Romanian subject, where it is not dropped; form of adjectives;
# clitic as object, and before "am"; emphatic dative; clitic as dative, and before "am".
_PRONOUNS = """
I me 0 _ 0 mă m- _ îmi mi-
you you 1 _ 0 te te- _ îți ți-
he him 2 el 0 îl l- lui îi i-
she her 2 ea 1 o _ ei îi i-
we us 3 _ 2 ne ne- _ ne ne-
they them 4 ei 2 îi i- lor le le-
"""
# Masculine, feminine, and the plurals of both.
_DETERMINERS = {
    "my": "meu mea mei mele",
    "your": "tău ta tăi tale",
    "his": "lui lui lui lui",
    "our": "nostru noastră noștri noastre",
    "this": "acest această _ _",
    "that": "acel acea _ _",
    "these": "_ _ acești aceste",
    "those": "_ _ acei acele",
    "two": "_ _ doi două",
    "five": "_ _ cinci cinci",
    "many": "_ _ mulți multe",
    "twelve": "_ _ doisprezece douăsprezece",
    "twenty": "_ _ douăzeci_de douăzeci_de",
}
_POSSESSIVE, _DEMONSTRATIVE = ("my", "your", "his", "our"), ("this", "that", "these", "those")
_SHORT = {"îl": "l-", "îi": "i-", "le": "le-", "mă": "m-", "te": "te-", "ne": "ne-"}
_TENSES = {  # "to be" in English and Romanian, by person; the auxiliary of other verbs
    "present": ("am are is are are", "sunt ești este suntem sunt", "_ _ _ _ _"),
    "past": ("was were was were were", "eram erai era eram erau", "am ai a am au"),
    "future": ("will will will will will", "voi vei va vom vor", "voi vei va vom vor"),
}


def _join(*words: str) -> str:
    return " ".join(word for word in words if word not in ("", "_")).replace("_", " ")


class _Grammar:
    """Builds sentence pairs from one random generator."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.nouns, self.adjectives, self.verbs, self.pronouns = (
            [line.split() for line in table.strip().splitlines()]
            for table in (_NOUNS, _ADJECTIVES, _VERBS, _PRONOUNS)
        )

    def pick(self, options: Iterable):
        return self.random.choice(list(options))

    def noun_phrase(self, kinds: str, determiners: tuple[str, ...] = ("the", "a", *_DETERMINERS)):
        """A noun of one of the kinds, with a determiner and perhaps an adjective."""
        word = self.pick(determiners)
        forms = _DETERMINERS.get(word, "_ _ _ _").split()
        either = word == "the" or word in _POSSESSIVE
        plural = word != "a" and (self.random.random() < 0.35 if either else forms[0] == "_")
        *en, gender, kind, _, _, _, _ = noun = self.pick(n for n in self.nouns if n[3] in kinds)
        form = 2 * plural + (gender == "f" or (gender == "n" and plural))
        adjective = self.pick(a for a in self.adjectives if kind in a[1])
        adjective = self.pick(([""] * 6, adjective))
        indefinite, definite = noun[4 + 2 * plural : 6 + 2 * plural]
        en = _join(adjective[0], en[plural])
        ro = _join(forms[form], indefinite, adjective[2 + form])
        if either:
            ro = _join(definite, forms[form], adjective[2 + form])
        elif word == "a":
            word, ro = "an" if en[0] in "aeiou" else "a", f"{'o' if form else 'un'} {ro}"
        return {
            "en": f"{word} {en}",
            "ro": ro,
            # A preposition drops the article of a noun that stands alone: "în grădină".
            "governed": indefinite if word == "the" and not adjective[0] else ro,
            "person": 4 if plural else 2,
            "form": form,
            "kind": kind,
            "clitic": ("îl", "o", "îi", "le")[form],
            "definite": either or word in _DEMONSTRATIVE,
        }

    def place(self) -> tuple[str, str]:
        place = self.noun_phrase("p", ("the", "the", *_POSSESSIVE, "this", "that"))
        en, ro = self.pick((("in", "în"), ("near", "lângă")))
        return f"{en} {place['en']}", f"{ro} {place['governed']}"

    def subject(self, kinds: str) -> dict:
        en, _, person, ro, form, *_ = self.pick(self.pronouns)
        pronoun = {"en": en, "ro": ro, "person": int(person), "form": int(form), "kind": "h"}
        return self.pick((pronoun, self.noun_phrase(kinds)))

    def action(self, tense: str, no: str, question: bool) -> tuple[str, str]:
        """A subject, a verb, and an object or a place."""
        subject, clitic = self.subject("hha"), ""
        verb = self.pick(v for v in self.verbs if subject["kind"] in v[4])
        if verb[3] == "-":
            en_object, ro_object = self.place()
        elif "h" in verb[3] and self.random.random() < 0.3:  # not "I see me", "we see me"
            first, others = subject["en"] in ("I", "we"), ("he", "she", "they")
            fits = (p for p in self.pronouns if p[0] in others or (p[0] in ("I", "we")) != first)
            fits = (p for p in fits if p[0] != "you" or subject["en"] != "you")
            _, en_object, _, _, _, clitic, *_ = self.pick(fits)
            ro_object = ""
        else:
            thing = self.noun_phrase(verb[3])
            en_object, ro_object = thing["en"], thing["ro"]
            if thing["kind"] == "h" and thing["definite"]:
                # A definite person is doubled by a clitic and marked with "pe".
                ro_object, clitic = f"pe {thing['governed']}", thing["clitic"]
        person, (*present, participle, infinitive) = subject["person"], verb[5:]
        auxiliary = _TENSES[tense][2].split()[person]
        if tense == "past":  # "o" alone follows the participle
            last = f"{participle}-o" if clitic == "o" else participle
            ro_verb = _SHORT.get(clitic, "") + f"{auxiliary} {last}"
        else:
            ro_verb = _join(
                clitic, auxiliary, present[person] if tense == "present" else infinitive
            )
        english = _english(subject, verb, tense, no, question, en_object)
        if question and not no and self.random.random() < 0.5:  # the subject goes behind the verb
            return f"why {english}", _join("de ce", ro_verb, subject["ro"], ro_object)
        return english, _join(subject["ro"], "nu" if no else "", ro_verb, ro_object)

    def state(self, tense: str, no: str, question: bool) -> tuple[str, str]:
        """To be something, or somewhere."""
        subject = self.subject("hatp")
        fits = (a for a in self.adjectives if subject["kind"] in a[1])
        adjective = self.pick(a for a in fits if a[0] not in subject["en"].split())
        en_what, ro_what = adjective[0], adjective[2 + subject["form"]]
        if subject["kind"] in "ha" and self.random.random() < 0.5:
            en_what, ro_what = self.place()
        en_be, ro_be = (forms.split()[subject["person"]] for forms in _TENSES[tense][:2])
        en = (en_be, subject["en"]) if question else (subject["en"], en_be)
        be, fi = ("be", "fi") if tense == "future" else ("", "")
        romanian = _join(subject["ro"], "nu" if no else "", ro_be, fi, ro_what)
        return _join(*en, no, be, en_what), romanian

    def liking(self, tense: str, no: str, question: bool) -> tuple[str, str]:
        """What is liked becomes the subject, and who likes it a dative: "Îmi place casa"."""
        en, _, person, *_, emphatic, clitic, short = self.pick(self.pronouns)
        thing = self.noun_phrase("hatp", ("the", "the", *_POSSESSIVE, *_DEMONSTRATIVE))
        plural = thing["person"] == 4
        ro_verb = {
            "present": f"{clitic} {'plac' if plural else 'place'}",
            "past": f"{short}{'au' if plural else 'a'} plăcut",
            "future": f"{clitic} {'vor' if plural else 'va'} plăcea",
        }[tense]
        subject, verb = {"en": en, "person": int(person)}, ("like", "likes", "liked")
        english = _english(subject, verb, tense, no, question, thing["en"])
        return english, _join(emphatic, "nu" if no else "", ro_verb, thing["ro"])

    def sentence(self) -> tuple[str, str]:
        """One pair, with capitals and a final mark."""
        make = self.pick((self.action, self.action, self.action, self.state, self.liking))
        question = self.random.random() < 0.25
        pair = make(self.pick(_TENSES), self.pick(("", "", "", "not")), question)
        en, ro = (text[0].upper() + text[1:] + (".?"[question]) for text in pair)
        return en, ro


def _english(subject: dict, verb, tense: str, no: str, question: bool, rest: str) -> str:
    base, third, past = verb[:3]
    helper = {"past": "did", "future": "will"}.get(
        tense, "does" if subject["person"] == 2 else "do"
    )
    if question:
        return _join(helper, subject["en"], no, base, rest)
    if no or tense == "future":
        return _join(subject["en"], helper, no, base, rest)
    return _join(subject["en"], {"do": base, "does": third, "did": past}[helper], rest)


def phrasebook(count: int = 50_000, seed: int = 0) -> Iterator[tuple[str, str]]:
    """`count` distinct (English, Romanian) pairs; the same for the same seed, English never twice."""
    grammar, seen = _Grammar(seed), set()
    while len(seen) < count:
        en, ro = grammar.sentence()
        if en not in seen:
            seen.add(en)
            yield en, ro
