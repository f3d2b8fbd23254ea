"""Pairs of sentences: where they come from, cleaning, tokenizer, split, batches.

Data flows down the page. Text is read in batches of rows and kept in Arrow tables, token ids in
flat arrays: no corpus in Python lists, no padded matrix of one (but for the tutorial's call, whose
result is that).

    read_pairs     a hub data set, .tsv .csv .jsonl .json .parquet files, two line-aligned text
                   files, or the built-in phrasebook    -> batches (sources, targets)
    clean          drops what teaches nothing, and counts it
    encode         text -> token ids, each sentence ending in eos
    grouped_split  training and validation rows that share no source sentence
    PairDataset, BucketBatchSampler, pad_batch -> DataLoader

`load_dataset_and_tokenize` and `create_dataloaders` are the tutorial's two calls.
"""

import csv
import hashlib
import json
import math
import os
import random
import re
import ssl
import threading
import unicodedata
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

BATCH_ROWS = 1000  # rows read, cleaned and tokenized at a time
PHRASEBOOK = "phrasebook"  # the data set name of the built-in corpus

TextBatch = tuple[list[str], list[str]]  # sources, targets


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line and says what to do next."""


def in_one_line(error: BaseException, limit: int | None = 200) -> str:
    """The message of an error, of `limit` characters at most."""
    return " ".join(str(error).split())[:limit]


# ---- text -------------------------------------------------------------------------------------

# Romanian is written with comma below; older text has the cedilla of Turkish, which looks alike
# and is another character. One policy, applied here and nowhere else: comma below.
_COMMA_BELOW = str.maketrans("şţŞŢ", "șțȘȚ")


def normalize(text: str, language: str) -> str:
    """Unicode NFC, white space collapsed to single spaces, and for "ro" comma below ș ț."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return text.translate(_COMMA_BELOW) if language == "ro" else text


# ---- reading ----------------------------------------------------------------------------------


def _require_file(path: Path) -> None:
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}")


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file without their ends. InputError names the file and the line."""
    _require_file(path)
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}:{number}: not valid UTF-8 (byte {error.start + 1} of the line); "
                    "convert (or unpack) the file first"
                ) from None
            yield line.removesuffix("\n").removesuffix("\r")


def _pair_columns(
    names: Iterable[str], languages: tuple[str, str], where: str
) -> tuple[str, str]:
    """Which of the columns hold source and target."""
    names = list(names)
    for wanted in (languages, ("source", "target")):
        if set(wanted) <= set(names):
            return wanted
    source, target = languages
    found = ", ".join(map(str, names[:10])) + (", ..." if len(names) > 10 else "")
    raise InputError(
        f"{where}: needs columns {source} and {target} (or source and target, or "
        f"translation), found {found or 'none'}; see --source-lang and --target-lang"
    )


def _record_pair(
    record: object, languages: tuple[str, str], where: str
) -> tuple[str, str]:
    """The pair in {"translation": {"en": .., "ro": ..}} or {"en": .., "ro": ..}."""
    if isinstance(record, dict) and isinstance(record.get("translation"), dict):
        record = record["translation"]
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: expected an object with two texts, found {record!r:.40}"
        )
    texts = [record[name] for name in _pair_columns(record, languages, where)]
    for text in texts:
        if not isinstance(text, (str, type(None))):
            raise InputError(f"{where}: expected text, found {text!r:.40}")
        if text and not is_unicode(text):
            raise InputError(f"{where}: half a surrogate pair, which is no text")
    return texts[0] or "", texts[1] or ""


def is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can spell and no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tsv_rows(path: Path, languages: tuple[str, str]) -> Iterator[tuple[str, str]]:
    source, target = 0, 1
    for number, line in enumerate(read_lines(path), 1):
        fields = line.split("\t")
        if number == 1 and sorted(fields) in (sorted(languages), ["source", "target"]):
            source, target = map(
                fields.index, _pair_columns(fields, languages, str(path))
            )
            continue
        if len(fields) == 1 and not line.strip():
            fields = ["", ""]
        if len(fields) != 2:
            problem = "no tab" if len(fields) == 1 else "more than one tab"
            raise InputError(f"{path}:{number}: {problem}; a line is source<TAB>target")
        yield fields[source], fields[target]


def _csv_rows(path: Path, languages: tuple[str, str]) -> Iterator[tuple[str, str]]:
    reader = csv.reader((line + "\n" for line in read_lines(path)), strict=True)
    try:
        header = next(reader, [])
        source, target = map(header.index, _pair_columns(header, languages, str(path)))
        for fields in reader:
            if fields and len(fields) != len(header):
                raise InputError(
                    f"{path}:{reader.line_num}: {len(fields)} fields under a header of {len(header)}"
                )
            yield (fields[source], fields[target]) if fields else ("", "")
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: {error}") from None


def _json_rows(path: Path, languages: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """JSON lines, or one array of objects."""
    lines = enumerate(read_lines(path), 1)
    for number, line in lines:
        if not line.strip():
            continue
        try:
            if line.lstrip().startswith("["):
                records = json.loads("\n".join([line, *(line for _, line in lines)]))
            else:
                records = [json.loads(line)]
        except json.JSONDecodeError as error:
            line = number + error.lineno - 1
            raise InputError(f"{path}:{line}: no JSON ({error.msg})") from None
        except (ValueError, RecursionError):
            # Numbers of 5,000 digits, brackets as many.
            raise InputError(f"{path}:{number}: JSON beyond reason") from None
        for index, record in enumerate(records, 1):
            entry = f", entry {index}" if len(records) > 1 else ""
            yield _record_pair(record, languages, f"{path}:{number}{entry}")


def _parquet_rows(path: Path, languages: tuple[str, str]) -> Iterator[tuple[str, str]]:
    import pyarrow
    import pyarrow.parquet

    _require_file(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(BATCH_ROWS):
                for record in batch.to_pylist():
                    yield _record_pair(record, languages, str(path))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = in_one_line(error, 80)
        raise InputError(f"{path}: no readable parquet file ({reason})") from None


def _aligned_rows(source: Path, target: Path) -> Iterator[tuple[str, str]]:
    pairs = zip_longest(read_lines(source), read_lines(target))
    for number, pair in enumerate(pairs, 1):
        if None in pair:
            short, long = (source, target) if pair[0] is None else (target, source)
            raise InputError(
                f"{short} ends before line {number} of {long}: not line-aligned"
            )
        yield pair


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

    # In a thread, since a time-out does not cover looking up the host's name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answers:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return bool(answers)


@lru_cache(maxsize=8)  # it is asked for its splits, its name and its rows
def _hub_table(name: str, subset: str | None, split: str | None):
    """A split of a data set on the hub, as a `datasets.Dataset`; None: all of them by name."""
    online = hub_reachable()
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # noqa: BLE001 - of many kinds, others in every version
        if online:
            reason = f"{type(error).__name__}: {in_one_line(error)}"
        else:
            reason = "it is not cached here and the hub cannot be reached"
        label = "/".join(filter(None, (name, subset, split)))
        raise InputError(
            f"cannot load data set {label}: {reason}; "
            "check the name, connect once, or give a file: --dataset pairs.tsv"
        ) from None


def has_split(name: str, subset: str | None, split: str) -> bool:
    """Whether a hub data set has this split, such as validation[:50%]. Raises InputError."""
    return split.partition("[")[0] in _hub_table(name, subset, None)


def _hub_rows(
    name: str, subset: str | None, split: str, languages: tuple[str, str]
) -> Iterator[tuple[str, str]]:
    for batch in _hub_table(name, subset, split).iter(BATCH_ROWS):
        for values in zip(*batch.values()):
            yield _record_pair(dict(zip(batch, values)), languages, name)


def is_on_hub(names: list[str]) -> bool:
    """Whether `read_pairs` takes it for the name of a hub data set."""
    (name, *others) = names
    path = Path(name).expanduser()
    is_file = bool(others) or path.suffix in READERS or path.exists()
    return not is_file and name != PHRASEBOOK


READERS = {".tsv": _tsv_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
READERS |= {".jsonl": _json_rows, ".json": _json_rows}


def read_pairs(
    dataset: str | list[str],
    subset: str | None = None,
    split: str = "train",
    languages: tuple[str, str] = ("en", "ro"),
) -> Iterator[TextBatch]:
    """Normalised sentence pairs, in batches of `BATCH_ROWS`.

    Args:
        dataset: "phrasebook", a name on the Hugging Face hub, or one or more files: .tsv
            (source<TAB>target, no quoting), .csv (with a header), .jsonl or .json (objects),
            .parquet; or exactly two files of any other name, line-aligned, source first.
        subset, split: of a hub data set.
        languages: codes of source and target; they name the columns.

    Raises InputError, for text files with file and line.
    """
    names = [dataset] if isinstance(dataset, str) else list(dataset)
    paths = [Path(name).expanduser() for name in names]
    unknown = [path for path in paths if path.suffix not in READERS]
    if names == [PHRASEBOOK]:
        rows = phrasebook()
    elif is_on_hub(names):
        rows = _hub_rows(names[0], subset, split, languages)
    elif not unknown:
        rows = (row for path in paths for row in READERS[path.suffix](path, languages))
    elif len(unknown) == len(paths) == 2:
        rows = _aligned_rows(*paths)
    elif len(paths) > 1:
        raise InputError(
            f"cannot tell what {unknown[0]} is: give files ending in {' '.join(READERS)}, "
            "or exactly two line-aligned text files"
        )
    else:
        raise InputError(
            f"cannot tell what {paths[0]} is: files end in {' '.join(READERS)}, "
            "and line-aligned text files come in twos"
        )
    source_language, target_language = languages
    for batch in _batched(rows):
        yield (
            [normalize(source, source_language) for source, _ in batch],
            [normalize(target, target_language) for _, target in batch],
        )


def _batched(rows: Iterable) -> Iterator[list]:
    rows = iter(rows)
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch


# ---- cleaning ---------------------------------------------------------------------------------


def text_key(text: str) -> bytes:
    """Eight bytes that stand for a text where millions are compared."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def clean(
    batches: Iterable[TextBatch], dropped: Counter, held_out: set[bytes] = frozenset()
) -> Iterator[TextBatch]:
    """Pairs that can teach something; the others are counted in `dropped` by reason.

    Dropped: a side is empty; the very same pair came before; its source stands in `held_out`
    (`text_key`s of validation and test); one side is over three times as long as the other (in
    characters, with 20 to spare for short sentences).
    """
    seen = set()
    for sources, targets in batches:
        kept = []
        for source, target in zip(sources, targets):
            short, long = sorted((len(source), len(target)))
            key = text_key(f"{source}\t{target}")
            if not short:
                dropped["empty"] += 1
            elif key in seen:
                dropped["duplicate"] += 1
            elif held_out and text_key(source) in held_out:
                dropped["held out"] += 1
            elif long > 3 * short + 20:
                dropped["length ratio"] += 1
            else:
                kept.append((source, target))
            seen.add(key)
        yield [source for source, _ in kept], [target for _, target in kept]


# ---- tokenizer --------------------------------------------------------------------------------


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
            reason = in_one_line(error, 120)
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
        backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), spaces, normalizers.Strip()]
        )


def train_tokenizer(texts: Iterable[list[str]], vocab_size: int):
    """A byte-level BPE (Radford et al. 2019): every text round-trips, nothing is `<unk>`.

    Args: texts: batches of sentences, source and target alike. vocab_size: at least 300.
    Returns: a `PreTrainedTokenizerFast` with <pad> 0, </s> 1, <unk> 2.
    """
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    if not 300 <= vocab_size <= 1_000_000:
        raise InputError(
            f"a vocabulary has 300 to 1,000,000 tokens, not {vocab_size:,}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    return _plain_text(fast)


def numbered_tokenizer(vocab_size: int):
    """Token i is the word "i", but for <pad> 0, </s> 1, <unk> 2: for models that were not trained."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), *map(str, range(3, vocab_size))]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


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


def split_text(text: str, tokenizer, max_length: int) -> list[list[int]]:
    """Token ids of a text in pieces of at most `max_length` tokens, eos included.

    Cut where it hurts least: into sentences, and what is still too long between clauses, else
    between words, else anywhere. A text that fits is one piece.
    """
    (ids,) = encode_texts([text], tokenizer)
    if len(ids) <= max_length:
        return [ids]
    pieces = re.split(r"(?<=[.!?…])\s+(?=[^a-zăâîșț])", text)  # one sentence, one piece
    if len(pieces) > 1:
        return [
            ids for piece in pieces for ids in split_text(piece, tokenizer, max_length)
        ]
    for boundary in (r"(?<=[,;:)–—])\s+", r"\s+"):
        pieces, current, size = [], [], 0  # as much as fits is one piece
        parts = re.split(boundary, text)
        for part, part_ids in zip(parts, encode_texts(parts, tokenizer)):
            # Its eos makes up for the space that it lost.
            if current and size + len(part_ids) > max_length:
                pieces.append(" ".join(current))
                current, size = [], 0
            current.append(part)
            size += len(part_ids)
        pieces.append(" ".join(current))
        if len(pieces) > 1:
            return [
                ids
                for piece in pieces
                for ids in split_text(piece, tokenizer, max_length)
            ]
    body, step = ids[:-1], max(max_length - 1, 1)
    return [[*body[i : i + step], ids[-1]] for i in range(0, len(body), step)]


def decode_ids(ids: list[list[int]], tokenizer, language: str) -> list[str]:
    """One line of normalised text per row of ids."""
    # Clean-up would move spaces around punctuation, which training never saw.
    texts = tokenizer.batch_decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [normalize(text, language) for text in texts]


def encode(
    batches: Iterable[TextBatch], tokenizer, max_length: int, dropped: Counter
) -> Iterator[dict[str, list]]:
    """Columns source, target, source_ids, target_ids of the pairs within `max_length` tokens.

    Longer ones are dropped and counted, not cut: half a sentence is no translation of a whole one.
    """
    for sources, targets in batches:
        columns = (
            sources,
            targets,
            encode_texts(sources, tokenizer),
            encode_texts(targets, tokenizer),
        )
        kept = [
            row for row in zip(*columns) if max(len(row[2]), len(row[3])) <= max_length
        ]
        dropped["over-long"] += len(sources) - len(kept)
        names = ("source", "target", "source_ids", "target_ids")
        yield (
            dict(zip(names, map(list, zip(*kept))))
            if kept
            else {name: [] for name in names}
        )


def to_table(batches: Iterable[dict[str, list]], limit: int | None = None):
    """Batches of columns as one `pyarrow.Table`, of `limit` rows at most; None without any."""
    import pyarrow

    types = {"source": pyarrow.string(), "target": pyarrow.string()}
    types |= {
        "source_ids": pyarrow.list_(pyarrow.int32()),
        "target_ids": pyarrow.list_(pyarrow.int32()),
    }
    tables, rows = [], 0
    for batch in batches:
        arrays = {
            name: pyarrow.array(column, types[name]) for name, column in batch.items()
        }
        table = pyarrow.table(arrays)[: None if limit is None else limit - rows]
        tables.append(table)
        rows += len(table)
        if limit is not None and rows >= limit:
            break
    return pyarrow.concat_tables(tables) if rows else None


def select(table, rows: np.ndarray):
    """Rows of a table, in their order there. rows: [M] int64."""
    kept = np.zeros(len(table), bool)
    kept[rows] = True
    return table.filter(kept)


# ---- split ------------------------------------------------------------------------------------


def grouped_split(
    groups, test_size: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers for training and for validation; no group has rows in both.

    A random split would leak: a source sentence with two translations would stand on both sides.

    Args: groups: [N], equal for rows of one group. test_size: share of the groups (below 1) or
    their number. Raises InputError where that leaves either side empty.
    """
    from sklearn.model_selection import GroupShuffleSplit

    test_size = float(test_size) if test_size < 1 else int(test_size)
    splitter = GroupShuffleSplit(n_splits=1, test_size=test_size, random_state=seed)
    try:
        train_rows, test_rows = next(splitter.split(groups, groups=groups))
    except ValueError:
        raise InputError(
            f"cannot hold out {test_size} of {len(set(groups.tolist()))} source sentences; "
            "give more pairs or another --validation-size"
        ) from None
    return train_rows, test_rows


def hold_out(groups: np.ndarray, sizes: list[int], seed: int = 0) -> list[np.ndarray]:
    """Row numbers of parts with exactly so many rows, and last of the rest; no group has rows in
    two parts.

    Args: groups: [N] int64 from 0 on, equal for rows of one group. Raises InputError where the
    groups do not add up to `sizes`.
    """
    counts = np.bincount(groups)
    part_of, left = np.full(len(counts), len(sizes)), list(sizes)
    for group in np.random.default_rng(seed).permutation(len(counts)):
        for part, room in enumerate(left):
            if counts[group] <= room:
                part_of[group], left[part] = part, room - counts[group]
                break
    rest = (part_of == len(sizes)).any()
    if any(left) or not rest:
        wanted = " and ".join(map(str, sizes))
        raise InputError(
            f"cannot hold out {wanted} of {len(groups)} pairs and have some left; "
            "ask for fewer, or give more pairs"
        )
    return [np.flatnonzero(part_of[groups] == part) for part in range(len(sizes) + 1)]


# ---- batches ----------------------------------------------------------------------------------


class PairDataset(Dataset):
    """Token ids of sentence pairs, flat: row i of a side is ids[offsets[i]:offsets[i + 1]].

    `dataset[i]` is (source ids [S] int64, target ids [T] int64), both ending in eos.
    """

    def __init__(self, sides: list[tuple[np.ndarray, np.ndarray]]):
        """sides: (flat ids int32, offsets int64 [N + 1]) of source and of target."""
        self.sides = sides

    @classmethod
    def from_table(cls, table) -> "PairDataset":
        """table: what `to_table` makes."""
        sides = []
        for name in ("source_ids", "target_ids"):
            chunks = table[name].chunks
            lengths = np.concatenate([np.diff(chunk.offsets) for chunk in chunks])
            offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            sides.append((np.concatenate([c.flatten() for c in chunks]), offsets))
        return cls(sides)

    def save(self, path: Path) -> None:
        from safetensors.numpy import save_file

        arrays = {}
        for name, (ids, offsets) in zip(("source", "target"), self.sides):
            arrays |= {f"{name}_ids": ids, f"{name}_offsets": offsets}
        save_file(arrays, path)

    @classmethod
    def load(cls, path: Path) -> "PairDataset":
        from safetensors.numpy import load_file

        arrays = load_file(path)
        names = ("source", "target")
        return cls([(arrays[f"{n}_ids"], arrays[f"{n}_offsets"]) for n in names])

    def __len__(self) -> int:
        return len(self.sides[0][1]) - 1

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

    def rows_with(self, token_id: int | None) -> tuple[float, float]:
        """Share of the rows whose source, and whose target, holds a token (`<unk>`, say)."""
        shares = []
        for ids, offsets in self.sides:
            positions = np.flatnonzero(ids == (-1 if token_id is None else token_id))
            rows = np.searchsorted(offsets, positions, side="right")
            shares.append(len(np.unique(rows)) / max(len(self), 1))
        return shares[0], shares[1]


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of rows of similar length, in an order that follows from (seed, epoch) alone.

    With `batch_tokens`, every batch is as many rows as fit: rows x the longest source and rows x the
    longest target are at most that, each rounded up to a `multiple` (a longer row makes a batch by
    itself). Rows are shuffled, sorted by target length into strata and by source length in each, so
    that neither side holds many pads; cut into batches, as many in every epoch; and the batches
    shuffled. With `batch_size`, every batch has so many rows, sorted inside pools of `POOL` batches.
    `shuffle=False` sorts everything: the least padding, always the same order.

    Of `world` processes, each takes every world-th batch, from its `rank` on. All take equally many:
    where the batches run out, an empty one. With `batch_tokens` those taken together are alike, so
    that none waits for another.
    """

    POOL = 100

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
        if self.batch_tokens is None:
            batches = self._cut_by_size(rows)
            together = 1
        else:
            batches = self._cut_by_tokens(rows)
            together = self.world
        if self.shuffle:
            groups = math.ceil(len(batches) / together)
            order = random_state.permutation(groups)
            if len(batches) % together:  # the incomplete group stays the last
                order = np.append(order[order != groups - 1], groups - 1)
            batches = [
                batch
                for group in order
                for batch in batches[group * together : (group + 1) * together]
            ]
        self.batches = batches
        self._tokens = [int(self.target_lengths[rows].sum()) for rows in batches]

    def _cut_by_size(self, rows: np.ndarray) -> list[np.ndarray]:
        size = self.batch_size
        pool = self.POOL * size if self.shuffle else max(len(rows), 1)
        batches = []
        for start in range(0, len(rows), pool):
            part = rows[start : start + pool]
            order = np.lexsort((self.source_lengths[part], self.target_lengths[part]))
            part = part[order]
            batches += [part[i : i + size] for i in range(0, len(part), size)]
        return batches

    def _cut_by_tokens(self, rows: np.ndarray) -> list[np.ndarray]:
        source, target = self.source_lengths[rows], self.target_lengths[rows]
        longest = round_up(np.maximum(source, target), self.multiple)
        # As many strata as a stratum has batches: pads of the two sides weigh the same.
        strata = max(1, round(math.sqrt(longest.sum() / self.batch_tokens)))
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
            if i > start and (i + 1 - start) * widest > self.batch_tokens:
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
                len(rows) * round_up(lengths[rows].max(), self.multiple)
                for rows in self.batches
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


# ---- the whole way ----------------------------------------------------------------------------


@dataclass
class Data:
    """What a training run needs to know of its data."""

    tokenizer: object
    train: PairDataset
    validation: PairDataset
    # "source" and "target", in row order; of a given set also what is over-long
    validation_text: dict[str, list[str]]
    dropped: dict[str, int]  # pairs lost in cleaning, by reason
    test_text: dict[str, list[str]] | None = None  # where a test set was given

    def save(self, folder: Path) -> None:
        """Fill a folder with all of it."""
        self.train.save(folder / "train.safetensors")
        self.validation.save(folder / "validation.safetensors")
        save_tokenizer(self.tokenizer, folder)
        names = ("validation_text", "dropped", "test_text")
        rest = {name: getattr(self, name) for name in names}
        text = json.dumps(rest, ensure_ascii=False)
        (folder / "validation.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Data":
        """What `save` wrote. Raises of all kinds where that is damaged."""
        rest = json.loads((folder / "validation.json").read_text(encoding="utf-8"))
        return cls(
            load_tokenizer(str(folder)),
            PairDataset.load(folder / "train.safetensors"),
            PairDataset.load(folder / "validation.safetensors"),
            **rest,
        )


def prepared_key(sources: list[tuple], *settings) -> str | None:
    """A name for what `prepare` makes of these sources, each the first three arguments of
    `read_pairs`, with these settings: another one whenever anything that it depends on is
    different. None for the built-in corpus.

    A hub data set goes by the files that `datasets` keeps of it, whose names hold its revision;
    data files, and a tokenizer's folder among the settings, by their content.
    """
    content = hashlib.sha256()

    def add(path: Path) -> None:
        with path.open("rb") as file:
            while block := file.read(2**20):
                content.update(block)

    for dataset, subset, split in sources:
        names = [dataset] if isinstance(dataset, str) else list(dataset)
        if names == [PHRASEBOOK]:
            return None
        if is_on_hub(names):
            rows = _hub_table(names[0], subset, split)
            content.update(f"{rows.cache_files} {subset} {split} {len(rows)}".encode())
            continue
        for path in (Path(name).expanduser() for name in names):
            _require_file(path)
            content.update(f"{path.suffix} {path.stat().st_size} ".encode())
            add(path)
    for setting in settings:
        content.update(f"{setting!r} ".encode())
        folder = Path(setting).expanduser() if isinstance(setting, str) else None
        if folder is not None and folder.is_dir():
            for path in sorted(path for path in folder.iterdir() if path.is_file()):
                add(path)
    for library in ("tokenizers", "transformers", "scikit-learn"):
        content.update(f"{library} {version(library)} ".encode())
    add(Path(__file__))
    return content.hexdigest()[:24]


def prepare(
    batches: Iterable[TextBatch],
    tokenizer: str,
    max_length: int,
    validation_size: float,
    num_samples: int | None = None,
    seed: int = 0,
    validation: Iterable[TextBatch] | None = None,
    test: Iterable[TextBatch] | None = None,
) -> Data:
    """From sentence pairs to training and validation ids.

    Args:
        tokenizer: a hub name, a folder, or "train:N", a vocabulary of N learnt from the training
            rows alone.
        max_length: tokens per sentence, eos included; longer pairs are dropped.
        validation_size: share of the source sentences held out, or their number.
        num_samples: stop after this many pairs that survived cleaning.
        validation, test: pairs of their own, instead of some held out; whatever has a source in
            common with them is left out of training.

    Raises InputError where nothing is left.
    """
    dropped = Counter()
    kind, _, size = tokenizer.partition(":")
    to_train = kind == "train"
    if to_train and not size.isdecimal():
        raise InputError(
            f"--tokenizer {tokenizer}: write train:N, for example train:8000"
        )
    given = [part and _whole_text(part) for part in (validation, test)]
    held_out = {text_key(s) for part in given if part for s in part["source"]}
    pairs = clean(batches, dropped, held_out)
    if to_train:
        table = to_table(({"source": s, "target": t} for s, t in pairs), num_samples)
    else:
        tokenizer = load_tokenizer(tokenizer)
        table = to_table(encode(pairs, tokenizer, max_length, dropped), num_samples)
    if table is None:
        raise InputError(f"no pairs left after cleaning{describe_dropped(dropped)}")
    tables = [table]
    if given[0] is None:
        sources = (source for batch in _text_columns(table) for source in batch[0])
        parts = grouped_split(number_texts(sources), validation_size, seed)
        tables = [select(table, part) for part in parts]
    if to_train:
        sides = (side for batch in _text_columns(tables[0]) for side in batch)
        tokenizer = train_tokenizer(sides, int(size))
        tables = [
            to_table(encode(_text_columns(part), tokenizer, max_length, dropped))
            for part in tables
        ]
    if given[0]:
        pairs = [(given[0]["source"], given[0]["target"])]
        beyond = Counter()
        tables.append(to_table(encode(pairs, tokenizer, max_length, beyond)))
        dropped["over-long validation"] = beyond["over-long"]
    if None in tables:
        raise InputError(f"training or validation is empty{describe_dropped(dropped)}")
    text = given[0] or tables[1].select(["source", "target"]).to_pydict()
    train, validation = map(PairDataset.from_table, tables)
    return Data(tokenizer, train, validation, text, dict(dropped), given[1])


def whole_pairs(batches: Iterable[TextBatch]) -> Iterator[tuple[str, str]]:
    """The pairs that have two sides, which are all that is scored."""
    return (pair for batch in batches for pair in zip(*batch) if all(pair))


def _whole_text(batches: Iterable[TextBatch]) -> dict[str, list[str]]:
    """All of `whole_pairs`; InputError without any."""
    pairs = list(whole_pairs(batches))
    if not pairs:
        raise InputError("the validation or test set holds no pairs")
    sources, targets = map(list, zip(*pairs))
    return {"source": sources, "target": targets}


def number_texts(texts: Iterable[str]) -> np.ndarray:
    """Equal texts, equal numbers, from 0 on as they first come: [N] int64."""
    numbers: dict[bytes, int] = {}
    keys = map(text_key, texts)
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], int)


def _text_columns(table) -> Iterator[TextBatch]:
    for batch in table.to_batches(BATCH_ROWS):
        yield batch["source"].to_pylist(), batch["target"].to_pylist()


def describe_dropped(dropped: dict[str, int]) -> str:
    """ " (dropped: 3 duplicate, 1 empty)", or nothing where nothing was."""
    reasons = [f"{count:,} {reason}" for reason, count in dropped.items() if count]
    return f" (dropped: {', '.join(reasons)})" if reasons else ""


# ---- the tutorial's two calls -----------------------------------------------------------------


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
    table = to_table(encode(pairs, tokenizer, max_length, dropped), num_samples)
    if table is None:
        raise InputError(f"no pairs left after cleaning{describe_dropped(dropped)}")
    sides = []
    for name in ("source_ids", "target_ids"):
        matrix = torch.full((len(table), max_length), tokenizer.pad_token_id)
        for row, ids in zip(matrix, table[name].to_pylist()):
            row[: len(ids)] = torch.tensor(ids)
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


# ---- the built-in corpus ----------------------------------------------------------------------
#
# An invented phrasebook, written for this repository: a phrase grammar that builds an English
# sentence and its Romanian translation side by side. It is no benchmark. It has what makes
# translating more than replacing words: adjectives after the noun, agreement in gender and number,
# the suffixed article and the prepositions that drop it, verb persons, clitics (also doubling a
# human object: "Îl văd pe profesor"), dative "a plăcea", numerals that agree, questions that invert.

# English singular and plural; gender; kind (h human, a animal, t thing, p place); the prepositions
# that suit it as a place; Romanian singular, with the article, plural, with the article.
_NOUNS = """
teacher teachers m h - profesor profesorul profesori profesorii
doctor doctors m h - doctor doctorul doctori doctorii
student students m h - student studentul studenți studenții
neighbour neighbours m h - vecin vecinul vecini vecinii
child children m h - copil copilul copii copiii
boy boys m h - băiat băiatul băieți băieții
girl girls f h - fată fata fete fetele
woman women f h - femeie femeia femei femeile
cat cats f a - pisică pisica pisici pisicile
dog dogs m a - câine câinele câini câinii
horse horses m a - cal calul cai caii
wolf wolves m a - lup lupul lupi lupii
bird birds f a - pasăre pasărea păsări păsările
book books f t - carte cartea cărți cărțile
letter letters f t - scrisoare scrisoarea scrisori scrisorile
key keys f t - cheie cheia chei cheile
flower flowers f t - floare floarea flori florile
shirt shirts f t - cămașă cămașa cămăși cămășile
bag bags f t - geantă geanta genți gențile
bicycle bicycles f t - bicicletă bicicleta biciclete bicicletele
apple apples n t - măr mărul mere merele
knife knives n t - cuțit cuțitul cuțite cuțitele
shoe shoes m t - pantof pantoful pantofi pantofii
coat coats n t - palton paltonul paltoane paltoanele
phone phones n t - telefon telefonul telefoane telefoanele
newspaper newspapers n t - ziar ziarul ziare ziarele
table tables f t on,under,near masă masa mese mesele
chair chairs n t on,under,near scaun scaunul scaune scaunele
car cars f t in,under,near mașină mașina mașini mașinile
boat boats f t in,near barcă barca bărci bărcile
house houses f p in,near casă casa case casele
garden gardens f p in,near grădină grădina grădini grădinile
school schools f p at,near școală școala școli școlile
hospital hospitals n p at,near spital spitalul spitale spitalele
city cities n p in,near oraș orașul orașe orașele
train trains n p in,near tren trenul trenuri trenurile
bridge bridges n p on,under,near pod podul poduri podurile
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
happy ha fericit fericită fericiți fericite
hungry ha flămând flămândă flămânzi flămânde
strong ha puternic puternică puternici puternice
tall h înalt înaltă înalți înalte
white atp alb albă albi albe
black atp negru neagră negri negre
red tp roșu roșie roșii roșii
yellow tp galben galbenă galbeni galbene
expensive t scump scumpă scumpi scumpe
"""

# English base, third person and past ("_" is a space); the kinds of its object, "-" for none;
# Romanian I, you, he, we, they; past participle; infinitive.
_VERBS = """
see sees saw hatp văd vezi vede vedem văd văzut vedea
find finds found hat găsesc găsești găsește găsim găsesc găsit găsi
look_for looks_for looked_for hat caut cauți caută căutăm caută căutat căuta
forget forgets forgot ht uit uiți uită uităm uită uitat uita
hear hears heard ha aud auzi aude auzim aud auzit auzi
love loves loved ha iubesc iubești iubește iubim iubesc iubit iubi
help helps helped h ajut ajuți ajută ajutăm ajută ajutat ajuta
wait_for waits_for waited_for h aștept aștepți așteaptă așteptăm așteaptă așteptat aștepta
call calls called h chem chemi cheamă chemăm cheamă chemat chema
meet meets met h întâlnesc întâlnești întâlnește întâlnim întâlnesc întâlnit întâlni
visit visits visited hp vizitez vizitezi vizitează vizităm vizitează vizitat vizita
buy buys bought at cumpăr cumperi cumpără cumpărăm cumpără cumpărat cumpăra
sell sells sold at vând vinzi vinde vindem vând vândut vinde
want wants wanted at vreau vrei vrea vrem vor vrut vrea
lose loses lost t pierd pierzi pierde pierdem pierd pierdut pierde
wash washes washed at spăl speli spală spălăm spală spălat spăla
sleep sleeps slept - dorm dormi doarme dormim dorm dormit dormi
eat eats ate - mănânc mănânci mănâncă mâncăm mănâncă mâncat mânca
stay stays stayed - stau stai stă stăm stau stat sta
run runs ran - alerg alergi aleargă alergăm aleargă alergat alerga
sing sings sang - cânt cânți cântă cântăm cântă cântat cânta
dance dances danced - dansez dansezi dansează dansăm dansează dansat dansa
"""
_ANIMALS_DO = ("sleep", "eat", "stay", "run", "see", "hear", "look_for", "find")


_PERSONS = {"I": 0, "you": 1, "he": 2, "she": 2, "we": 3, "they": 4}
_SUBJECTS = {"he": "el", "she": "ea", "they": "ei"}  # Romanian drops the others
_OBJECTS = {"me": "mă", "you": "te", "him": "îl", "her": "o", "us": "ne", "them": "îi"}
_REFLEXIVE = {"I": ("me", "us"), "we": ("me", "us"), "you": ("you",)}
_SHORT = {"mă": "m-", "te": "te-", "îl": "l-", "ne": "ne-", "îi": "i-", "le": "le-"}
_DATIVES = {  # subject of "to like": emphatic pronoun, long and short clitic
    "I": ("", "îmi", "mi-"),
    "you": ("", "îți", "ți-"),
    "he": ("lui", "îi", "i-"),
    "she": ("ei", "îi", "i-"),
    "we": ("", "ne", "ne-"),
    "they": ("lor", "le", "le-"),
}
_HAVE = ("am", "ai", "a", "am", "au")  # auxiliary of the past
_WILL = ("voi", "vei", "va", "vom", "vor")
_POSSESSIVES = {
    "my": "meu mea mei mele",
    "your": "tău ta tăi tale",
    "his": "lui lui lui lui",
    "her": "ei ei ei ei",
    "our": "nostru noastră noștri noastre",
    "their": "lor lor lor lor",
}
_DEMONSTRATIVES = {"this": "acest această", "that": "acel acea"}
_DEMONSTRATIVES |= {"these": "_ _ acești aceste", "those": "_ _ acei acele"}
_QUANTITIES = {
    "two": "doi două",
    "three": "trei trei",
    "five": "cinci cinci",
    "ten": "zece zece",
    "twelve": "doisprezece douăsprezece",
    "twenty": "douăzeci_de douăzeci_de",
    "twenty-two": "douăzeci_și_doi_de douăzeci_și_două_de",
    "a hundred": "o_sută_de o_sută_de",
    "many": "mulți multe",
}
_PREPOSITIONS = {"in": "în", "on": "pe", "under": "sub", "near": "lângă", "at": "la"}
_TIMES = {
    "present": (("now", "acum"), ("today", "azi"), ("every day", "în fiecare zi")),
    "past": (("yesterday", "ieri"), ("last week", "săptămâna trecută")),
    "future": (("tomorrow", "mâine"), ("next week", "săptămâna viitoare")),
}
_QUESTIONS = (("when", "când"), ("why", "de ce"), ("", ""), ("", ""))
_WHO = {"en": "who", "ro": "cine", "person": 2, "kind": "h"}
_LINKS = ((", but ", ", dar "), (" and ", " și "), (" because ", " pentru că "))
_TO_BE = {
    "present": ("am are is are are", "sunt ești este suntem sunt"),
    "past": ("was were was were were", "eram erai era eram erau"),
    "future": ("will will will will will", "voi vei va vom vor"),
}


class _Grammar:
    """Builds sentence pairs from one random generator."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.nouns = [line.split() for line in _NOUNS.strip().splitlines()]
        self.adjectives = [line.split() for line in _ADJECTIVES.strip().splitlines()]
        self.verbs = [line.split() for line in _VERBS.strip().splitlines()]

    def pick(self, options):
        return self.random.choice(list(options))

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def denial(self, subject: dict) -> bool:
        """Whether the sentence is negated: seldom, and never "every X does not"."""
        return self.chance(0.25) and not subject["en"].startswith("every")

    def noun_phrase(
        self, kinds: str, determiners: str, noun: list[str] | None = None
    ) -> dict:
        """`determiners`: the, a(n), possessive, demonstrative, quantity, every, by initial."""
        noun = noun or self.pick(n for n in self.nouns if n[3] in kinds)
        if noun[0] == "woman":  # "my woman" means something else
            determiners = determiners.replace("p", "")
        kind = self.pick(determiners)
        plural = kind == "q" or (kind in "tpd" and self.chance(0.35))
        feminine = noun[2] == "f" or (noun[2] == "n" and plural)

        def agree(forms: list[str]) -> str:
            """Of masculine, feminine, and the plurals of both."""
            return forms[2 * plural + feminine]

        indefinite, definite = noun[5 + 2 * plural], noun[6 + 2 * plural]
        adjective = None
        if self.chance(0.45):
            adjective = self.pick(a for a in self.adjectives if noun[3] in a[1])
        en = [adjective[0]] if adjective else []
        en.append(noun[plural])
        tail = [agree(adjective[2:])] if adjective else []
        if kind == "t":
            en.insert(0, "the")
            ro = [definite, *tail]
        elif kind == "a":
            en.insert(0, "an" if en[0][0] in "aeiou" else "a")
            ro = ["o" if feminine else "un", indefinite, *tail]
        elif kind == "e":
            en.insert(0, "every")
            ro = ["fiecare", indefinite, *tail]
        elif kind == "p":
            owner = self.pick(_POSSESSIVES)
            en.insert(0, owner)
            ro = [definite, agree(_POSSESSIVES[owner].split()), *tail]
        elif kind == "d":
            pointer = self.pick(("these", "those") if plural else ("this", "that"))
            en.insert(0, pointer)
            ro = [agree(_DEMONSTRATIVES[pointer].split()), indefinite, *tail]
        else:
            quantity = self.pick(_QUANTITIES)
            en.insert(0, quantity)
            number = _QUANTITIES[quantity].split()[feminine].replace("_", " ")
            ro = [number, indefinite, *tail]
        return {
            "en": " ".join(en),
            "ro": " ".join(ro),
            # A preposition drops the article of a noun that stands alone: "în grădină".
            "governed": indefinite if kind == "t" and not adjective else " ".join(ro),
            "person": 4 if plural else 2,
            "agree": agree,
            "kind": noun[3],
            "clitic": ("îl", "o", "îi", "le")[2 * plural + feminine],
            "definite": kind in "tpd",
        }

    def place(self) -> tuple[str, str]:
        noun = self.pick(n for n in self.nouns if n[4] != "-")
        preposition = self.pick(noun[4].split(","))
        phrase = self.noun_phrase("", "ttpd", noun)
        ro = f"{_PREPOSITIONS[preposition]} {phrase['governed']}"
        return f"{preposition} {phrase['en']}", ro

    def subject(self, kinds: str, pronouns=tuple(_PERSONS)) -> dict:
        if self.chance(0.5):
            en = self.pick(pronouns)
            # Masculine, feminine, masculine plural.
            form = {"she": 1, "they": 2}.get(en, 0)
            return {
                "en": en,
                "ro": _SUBJECTS.get(en, ""),
                "person": _PERSONS[en],
                "kind": "h",
                "agree": lambda forms: forms[form],
            }
        return self.noun_phrase(kinds, "ttppdqea")

    def action(self, question: bool) -> tuple[str, str]:
        """A subject, a verb in one of three tenses, an object or a place, perhaps a time."""
        asks_who = question and self.chance(0.2)
        subject = _WHO if asks_who else self.subject("hha")
        question = question and not asks_who  # "who" asks in the order of a statement
        verb = self.pick(
            v for v in self.verbs if subject["kind"] == "h" or v[0] in _ANIMALS_DO
        )
        tense, negative = self.pick(_TIMES), self.denial(subject)
        en_object, ro_object, clitic = "", "", ""
        if verb[3] == "-":
            en_object, ro_object = self.place()
        elif "h" in verb[3] and self.chance(0.3):
            own = _REFLEXIVE.get(subject["en"], ())
            en_object = self.pick(o for o in _OBJECTS if o not in own)
            clitic = _OBJECTS[en_object]
        else:
            thing = self.noun_phrase(verb[3], "ttapdq")
            en_object, ro_object = thing["en"], thing["ro"]
            if thing["kind"] == "h" and thing["definite"]:
                # A definite person is doubled by a clitic and marked with "pe".
                ro_object, clitic = f"pe {thing['governed']}", thing["clitic"]
        en_time, ro_time = self.pick(_TIMES[tense]) if self.chance(0.25) else ("", "")
        en_rest, ro_rest = [en_object, en_time], [ro_object, ro_time]
        ro_verb = _romanian(verb[4:], subject["person"], tense, negative, clitic)
        # No "when ... not".
        words = _QUESTIONS[1:] if negative or en_time else _QUESTIONS
        en_word, ro_word = self.pick(words) if question else ("", "")
        # A question word moves the subject behind the verb.
        order = [ro_verb, subject["ro"]] if ro_word else [subject["ro"], ro_verb]
        english = _english(subject, verb, tense, negative, question, en_rest)
        return _join([en_word, english]), _join([ro_word, *order, *ro_rest])

    def state(self, question: bool) -> tuple[str, str]:
        """To be something, or somewhere."""
        if self.chance(0.5):
            subject = self.subject("hatp", ("he", "she", "they"))
            said = subject["en"].split()
            adjectives = (a for a in self.adjectives if subject["kind"] in a[1])
            adjective = self.pick(a for a in adjectives if a[0] not in said)
            en_what, ro_what = adjective[0], subject["agree"](adjective[2:])
        else:
            subject = self.subject("hat")
            en_what, ro_what = self.place()
        tense, negative = self.pick(_TIMES), self.denial(subject)
        en_forms, ro_forms = (forms.split() for forms in _TO_BE[tense])
        en_verb, ro_verb = en_forms[subject["person"]], ro_forms[subject["person"]]
        future = tense == "future"
        en = [en_verb, subject["en"]] if question else [subject["en"], en_verb]
        en += ["not" if negative else "", "be" if future else "", en_what]
        ro = [
            subject["ro"],
            "nu" if negative else "",
            ro_verb,
            "fi" if future else "",
            ro_what,
        ]
        return _join(en), _join(ro)

    def liking(self, question: bool) -> tuple[str, str]:
        """What is liked becomes the subject, and who likes it a dative: "Îmi place casa"."""
        who, thing = self.pick(_DATIVES), self.noun_phrase("hatp", "tpd")
        tense, negative = self.pick(_TIMES), self.chance(0.3)
        emphatic, clitic, short = _DATIVES[who]
        plural = thing["person"] == 4
        ro_verb = {
            "present": f"{clitic} {'plac' if plural else 'place'}",
            "past": f"{short}{'au' if plural else 'a'} plăcut",
            "future": f"{clitic} {'vor' if plural else 'va'} plăcea",
        }[tense]
        subject, verb = {"en": who, "person": _PERSONS[who]}, ("like", "likes", "liked")
        ro = [emphatic, "nu" if negative else "", ro_verb, thing["ro"]]
        return _english(subject, verb, tense, negative, question, [thing["en"]]), _join(
            ro
        )

    def sentence(self) -> tuple[str, str]:
        """One pair, with capitals and a final mark."""
        makers = (self.action, self.action, self.action, self.state, self.liking)
        question = self.chance(0.25)
        en, ro = self.pick(makers)(question)
        if not question and self.chance(0.15):
            (en_link, ro_link), (en_more, ro_more) = (
                self.pick(_LINKS),
                self.pick(makers)(False),
            )
            en, ro = en + en_link + en_more, ro + ro_link + ro_more
        mark = "?" if question else "."
        return en[0].upper() + en[1:] + mark, ro[0].upper() + ro[1:] + mark


def _join(words) -> str:
    return " ".join(word for word in words if word)


def _english(
    subject, verb, tense: str, negative: bool, question: bool, rest: list[str]
) -> str:
    base, third, past = (form.replace("_", " ") for form in verb[:3])
    singular = subject["person"] == 2
    helper = {"present": "does" if singular else "do", "past": "did", "future": "will"}[
        tense
    ]
    finite = {"present": third if singular else base, "past": past}.get(tense)
    if question:
        words = [helper, subject["en"], "not" if negative else "", base]
    elif negative or not finite:
        words = [subject["en"], helper, "not" if negative else "", base]
    else:
        words = [subject["en"], finite]
    return _join(words + rest)


def _romanian(
    forms: list[str], person: int, tense: str, negative: bool, clitic: str
) -> str:
    """The verb with its negation, auxiliary and object clitic, in their order."""
    no, *present, participle, infinitive = ["nu" if negative else "", *forms]
    if tense == "present":
        return _join([no, clitic, present[person]])
    if tense == "future":
        return _join([no, clitic, _WILL[person], infinitive])
    if clitic == "o":  # the only clitic that follows the participle
        return _join([no, _HAVE[person], f"{participle}-o"])
    return _join([no, _SHORT.get(clitic, "") + _HAVE[person], participle])


def phrasebook(count: int = 50_000, seed: int = 0) -> Iterator[tuple[str, str]]:
    """`count` distinct (English, Romanian) pairs; the same for the same seed, English never twice."""
    grammar, seen = _Grammar(seed), set()
    while len(seen) < count:
        en, ro = grammar.sentence()
        if en not in seen:
            seen.add(en)
            yield en, ro
