"""Use a trained model: load it, translate lines, score them, export it.

    load_translator("runs/NAME").translate(["The teacher sees you."])

    python run.py translate --model runs/NAME               lines on stdin -> lines on stdout
    python run.py evaluate --model runs/NAME                BLEU and chrF on what was held out
    python run.py export --model runs/NAME --to hf OUT      for transformers, or CTranslate2

It needs positional.py, seq2seq.py, data.py, safetensors and what these import; sacreBLEU for
scores, CTranslate2 for its folders, tyro for the commands. In reading order: loading, translating,
scoring, CTranslate2 as the engine, export of the weights, files, commands with their settings.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tyro.conf import Positional

import data
from data import InputError, print_field, progress_bar, require
from positional import sinusoidal_positional_encoding
from seq2seq import (
    Hypothesis,
    Seq2SeqConfig,
    TransformerSeq2SeqModel,
    beam_search,
    greedy_decode,
    output_limits,
)

TRANSLATE_WINDOW = 2048  # lines sorted by length together
ENGINE_FILE = "seq2seq.json"  # what CTranslate2's own files do not say
ENGINE_HINT = "CTranslate2 is not installed: pip install ctranslate2"

# ---- loading -------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """auto: CUDA, else Apple's MPS, else the CPU. Raises InputError for a missing device."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    has["mps"] = has["mps"] and "WORLD_SIZE" not in os.environ  # it cannot train in processes
    if name == "auto":
        name = next(kind for kind in has if has[kind])
    found = ", ".join(kind for kind in has if has[kind])
    require(has.get(name, False), f"--device {name} is not available; found {found}")
    device = torch.device(name)
    if name == "cuda":
        device = torch.device(name, int(os.environ.get("LOCAL_RANK", "0")))
        here, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        require(here <= count, f"{here} processes, but {count} GPUs: lower --nproc_per_node")
        torch.cuda.set_device(device)
        try:
            torch.zeros(1, device=device).add_(1)
        except RuntimeError as error:
            raise InputError(
                f"torch {torch.__version__} cannot use {torch.cuda.get_device_name()} "
                f"({data.one_line(error, 80)}); install a newer torch, without Modlee, "
                "or add --device cpu"
            ) from None
    return device


def load_model(folder: str, device: torch.device, exported: bool = False):
    """(model in eval mode, tokenizer, (source language, target language)). Raises InputError.

    The weights are mapped from the file into the model, without being initialised or copied.
    exported: also accept a folder exported for CTranslate2, and return its `Engine`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder).expanduser()
    is_engine = (path / "model.bin").is_file()
    allowed = exported or not is_engine
    require(allowed, f"{folder} is an exported model: give the original folder")
    try:
        file = path / (ENGINE_FILE if is_engine else "config.json")
        content = json.loads(file.read_text(encoding="utf-8"))
        languages, config = (content["source_lang"], content["target_lang"]), content["model"]
        with torch.device("meta"):
            model = TransformerSeq2SeqModel(**config)
        if not is_engine:
            weights = load_file(path / "model.safetensors", device=str(device))
            weights.pop("positions.table", None)  # older folders store it
            if model.config.tie_embeddings:  # stored once
                weights["output.weight"] = weights["embedding.weight"]
            model.load_state_dict(weights, assign=True)
            model.tie_embeddings()
    except FileNotFoundError as error:
        missing = Path(error.filename or path / "model.safetensors").name
        raise InputError(f"{folder} is not a model folder: {missing} is missing") from None
    except KeyError as error:
        hint = "exports to transformers cannot be loaded here"
        raise InputError(
            f"{folder} is not a model folder: {file.name} has no {error}; {hint}"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        reason = data.one_line(error)
        raise InputError(f"{folder} is not a model folder of this program: {reason}") from None
    tokenizer = data.load_tokenizer(str(path))
    model = Engine(path, model.config, tokenizer, device.type) if is_engine else model.eval()
    return model, tokenizer, languages


# ---- translating ---------------------------------------------------------------------------------


@dataclass(eq=False)
class Translator:
    """Translates lines.

    Lines are decoded in windows of `TRANSLATE_WINDOW`, so that memory does not grow with the input.
    In a window they are sorted by length and batched by tokens, so that batches hold few pads.
    Lines longer than the model's max_length are split at sentences, clauses or words, and
    translated in pieces.
    """

    model: "TransformerSeq2SeqModel | Engine"
    tokenizer: object
    languages: tuple[str, str]
    beam: int = 1
    length_penalty: float = 1.0
    batch_tokens: int = 2048
    num_return: int = 1
    scores: bool = False
    silent: bool = False
    # Of the last stream: problem -> (number of lines, the numbers of the first ones, from 1).
    notes: dict[str, tuple[int, list[int]]] = field(default_factory=dict)

    def __post_init__(self):
        least = min(self.beam, self.num_return, self.batch_tokens)
        require(least >= 1, "beam, num_return and batch_tokens must be at least 1")
        require(self.num_return <= self.beam, "num_return must be at most beam")

    def translate(self, lines: list[str]) -> list[str]:
        """The best translation of each line; an empty line stays empty."""
        require(not isinstance(lines, str), "translate takes a list of lines")
        return [best[0] for best, *_ in self.stream(lines, len(lines))]

    def stream(
        self, lines: Iterable[str], total: int | None = None, window: int = TRANSLATE_WINDOW
    ) -> Iterator[list[tuple[str, float | None]]]:
        """For every line, in order, its `num_return` translations (text, score), best first; the
        score is None unless asked for. If `lines` raises, the lines before it are translated first.
        """
        numbered, self.notes = enumerate(lines, 1), {}
        settings = {"desc": "translate", "unit": " lines", "unit_scale": True}
        silent = self.silent or not sys.stderr.isatty()
        with progress_bar(total=total, disable=silent, **settings) as bar:
            failure = None
            while failure is None:
                part = []
                try:
                    part.extend(islice(numbered, window))
                except InputError as error:
                    failure = error
                yield from self._translate(part, bar)
                if not part:
                    break
            if failure:
                raise failure

    def _translate(self, lines: list[tuple[int, str]], bar) -> Iterator[list]:
        limit = self.model.config.max_length
        pieces = []  # (number of the line, token ids)
        for number, line in lines:
            text = data.normalize(line, self.languages[0])
            parts = split_text(text, self.tokenizer, limit) if text else []
            if len(parts) > 1:
                self.note(f"longer than {limit} tokens, translated in pieces", number)
            pieces += [(number, ids) for ids in parts]
        order = sorted(range(len(pieces)), key=lambda i: len(pieces[i][1]))
        lengths = [len(ids) for _, ids in pieces]
        found: list[list[Hypothesis]] = [[] for _ in pieces]
        for rows in batch_by_tokens(order, lengths, self.batch_tokens // self.beam):
            for row, hypotheses in zip(rows, self.decode([pieces[i][1] for i in rows])):
                found[row] = hypotheses
            bar.update(len(rows) * len(lines) / len(pieces))
        by_line: dict[int, list] = {number: [] for number, _ in lines}
        for (number, _), hypotheses in zip(pieces, found):
            by_line[number].append(hypotheses)
        for number, parts in by_line.items():
            ends = (part[0].tokens[-1:] for part in parts)
            if any(end != [self.model.config.eos_id] for end in ends):
                self.note("the translation did not end and was cut off", number)
            yield [self._join([part[i] for part in parts]) for i in range(self.num_return)]

    def decode(self, rows: list[list[int]]) -> list[list[Hypothesis]]:
        """The hypotheses of each row of token ids, best first."""
        if isinstance(self.model, Engine):
            return self.model.decode(
                rows, self.beam, self.length_penalty, self.num_return, self.scores
            )
        device, pad_id = next(self.model.parameters()).device, self.model.config.pad_id
        batch = data.pad_side([torch.tensor(ids) for ids in rows], pad_id).to(device)
        if self.beam > 1 or self.scores:
            return beam_search(
                self.model, batch, self.beam, self.length_penalty, num_return=self.num_return
            )
        output = greedy_decode(self.model, batch).tolist()
        return [[Hypothesis([i for i in row if i != pad_id], [], None)] for row in output]

    def _join(self, parts: list[Hypothesis]) -> tuple[str, float | None]:
        texts = data.decode_ids([part.tokens for part in parts], self.tokenizer, self.languages[1])
        text = " ".join(text for text in texts if text)
        if not self.scores or not parts:
            return text, None
        log_probs = [value for part in parts for value in part.log_probs]
        return text, sum(log_probs) / max(len(log_probs), 1) ** self.length_penalty

    def note(self, what: str, number: int) -> None:
        lines, first = self.notes.get(what, (0, []))
        self.notes[what] = (lines + 1, (first + [number])[:5])

    def report(self, unit: str) -> None:
        """Print the notes on stderr. unit: "line" or "pair"."""
        for what, (lines, first) in self.notes.items():
            numbers = ", ".join(map(str, first)) + (" ..." if lines > len(first) else "")
            which = f"{unit} {numbers}" if lines == 1 else f"{lines:,} {unit}s ({numbers})"
            data.note(f"{which}: {what}")


def split_text(text: str, tokenizer, max_length: int) -> list[list[int]]:
    """Token ids of a text in pieces of at most `max_length` tokens, eos included.

    A text that fits is one piece. Others are cut into sentences. Sentences that are still too long
    are cut between clauses, else between words, else anywhere.
    """
    (ids,) = data.encode_texts([text], tokenizer)
    if len(ids) <= max_length:
        return [ids]
    pieces = re.split(r"(?<=[.!?…])\s+(?=[^a-zăâîșț])", text)  # one sentence, one piece
    for boundary in (r"(?<=[,;:)–—])\s+", r"\s+"):
        if len(pieces) > 1:
            break
        pieces, current, size = [], [], 0  # as much as fits is one piece
        parts = re.split(boundary, text)
        for part, part_ids in zip(parts, data.encode_texts(parts, tokenizer)):
            # The eos of each part makes up for the space after it.
            if current and size + len(part_ids) > max_length:
                pieces.append(" ".join(current))
                current, size = [], 0
            current.append(part)
            size += len(part_ids)
        pieces.append(" ".join(current))
    if len(pieces) > 1:
        return [ids for piece in pieces for ids in split_text(piece, tokenizer, max_length)]
    body, step = ids[:-1], max(max_length - 1, 1)
    return [[*body[i : i + step], ids[-1]] for i in range(0, len(body), step)]


def batch_by_tokens(rows: list[int], lengths: list[int], most: int) -> Iterator[list[int]]:
    """Cut `rows`, sorted by rising length, into batches of at most `most` tokens, pads included."""
    batch: list[int] = []
    for row in rows:
        if batch and (len(batch) + 1) * lengths[row] > most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def load_translator(
    folder: str, device: str = "auto", precision: str = "fp32", **decoding
) -> Translator:
    """The `Translator` of a model folder, or of one exported for CTranslate2.

    load_translator("runs/NAME").translate(["A sentence."]) returns a list of translations.
    decoding: beam, length_penalty, batch_tokens, num_return, scores. Raises InputError.
    """
    require(precision in ("fp32", "bf16"), f"precision {precision}: fp32 or bf16")
    model, tokenizer, languages = load_model(folder, choose_device(device), exported=True)
    if precision == "bf16":
        hint = "its precision was chosen by export --quantization"
        require(not isinstance(model, Engine), f"{folder}: {hint}, leave bf16 out")
        model.to(torch.bfloat16)
    return Translator(model, tokenizer, languages, **decoding)


# ---- scoring -------------------------------------------------------------------------------------


def score(hypotheses: list[str], references: list[str]) -> dict:
    """sacreBLEU's BLEU and chrF (Post 2018) with their signatures, of normalised texts."""
    from sacrebleu.metrics import BLEU, CHRF

    bleu, chrf = BLEU(), CHRF()
    return {
        "bleu": round(bleu.corpus_score(hypotheses, [references]).score, 2),
        "chrf": round(chrf.corpus_score(hypotheses, [references]).score, 2),
        "signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
    }


# ---- CTranslate2 as the engine -------------------------------------------------------------------


class Engine:
    """A folder exported for CTranslate2, used instead of a model.

    Attributes: config: of the original model. precision: such as int8_float32. parts: how many
    parts of a batch are translated at the same time.
    """

    def __init__(self, folder: Path, config: Seq2SeqConfig, tokenizer, device: str):
        try:
            import ctranslate2
        except ImportError:
            raise InputError(ENGINE_HINT) from None
        self.config = config
        self.tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        device = device if device == "cuda" else "cpu"  # it knows no other
        # One thread per part of a batch, so that a single sentence uses one core. Threads sharing
        # each product would wait for each other longer than they compute.
        self.parts = torch.get_num_threads() if device == "cpu" else 1
        threads = {"inter_threads": self.parts, "intra_threads": 1}
        try:
            self.translator = ctranslate2.Translator(str(folder), device, **threads)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"CTranslate2 cannot load {folder}: {data.one_line(error)}") from None
        self.precision = self.translator.compute_type

    def decode(
        self,
        rows: list[list[int]],
        beam: int,
        length_penalty: float = 1.0,
        num_return: int = 1,
        scores: bool = False,
        max_new_tokens: int | None = None,
    ) -> list[list[Hypothesis]]:
        """The hypotheses of each row of token ids, best first, cut as `greedy_decode` cuts."""
        limits = output_limits(self.config, [len(row) for row in rows], max_new_tokens)
        results = self.translator.translate_batch(
            [[self.tokens[i] for i in row] for row in rows],
            max_batch_size=math.ceil(len(rows) / self.parts),
            beam_size=beam,
            num_hypotheses=num_return,
            length_penalty=length_penalty,
            # `beam_search` stops later: when no running hypothesis could enter its list.
            patience=2 if beam > 1 else 1,
            max_decoding_length=max(limits),
            max_input_length=0,
            return_scores=scores,
            return_end_token=True,
        )
        hypotheses = []
        for result, limit in zip(results, limits):
            hypotheses.append([])
            for place, tokens in enumerate(result.hypotheses):
                ids, log_probs, score = [self.ids[token] for token in tokens][:limit], [], None
                if scores:  # of the whole hypothesis; CTranslate2 gives none per token
                    score, count = result.scores[place], max(1, len(tokens))
                    log_probs = [score * count**length_penalty / count] * len(ids)
                hypotheses[-1].append(Hypothesis(ids, log_probs, score))
        return hypotheses


# ---- export --------------------------------------------------------------------------------------


def exported_positions(config: Seq2SeqConfig) -> int:
    """Rows of the position table in an export: enough for all that can be decoded."""
    return max(1024, *output_limits(config, [config.max_length]))


def transformers_settings(config: Seq2SeqConfig, vocab_size: int) -> dict:
    """Our configuration as arguments of PegasusConfig and MarianConfig."""
    settings = {"vocab_size": vocab_size, "d_model": config.d_model, "dropout": config.dropout}
    settings |= {"max_position_embeddings": exported_positions(config), "scale_embedding": True}
    settings |= {"tie_word_embeddings": config.tie_embeddings}
    settings |= {"activation_function": config.activation}
    settings |= {"attention_dropout": 0.0, "activation_dropout": 0.0}
    settings |= {"pad_token_id": config.pad_id, "decoder_start_token_id": config.pad_id}
    settings |= {"eos_token_id": config.eos_id, "forced_eos_token_id": None}
    for side in ("encoder", "decoder"):
        settings[f"{side}_layers"] = getattr(config, f"num_{side}_layers")
        settings[f"{side}_attention_heads"] = config.nhead
        settings[f"{side}_ffn_dim"] = config.dim_feedforward
    return settings


# Our names -> those of transformers; longer ones first.
TRANSFORMERS_NAMES = {
    "self_attention_norm": "self_attn_layer_norm",
    "self_attention": "self_attn",
    "cross_attention_norm": "encoder_attn_layer_norm",
    "cross_attention": "encoder_attn",
    "feed_forward_norm": "final_layer_norm",
    "linear1": "fc1",
    "linear2": "fc2",
    "encoder_layers": "encoder.layers",
    "decoder_layers": "decoder.layers",
    "encoder_norm": "encoder.layer_norm",
    "decoder_norm": "decoder.layer_norm",
}


def to_transformers(model: TransformerSeq2SeqModel):
    """The same model as transformers' Pegasus (pre-LN) or Marian (post-LN), weights copied.

    Their sinusoidal table has all sines first, then all cosines; ours interleaves them, as the
    paper does. So the channels of the residual stream are permuted wherever a weight reads or
    writes them. Raises InputError for positions that neither of them has.
    """
    import transformers

    config = model.config
    if config.positional != "sinusoidal":
        raise InputError(
            f"transformers has no model of this shape with {config.positional} positions; "
            "train with --positional sinusoidal to export"
        )
    settings = transformers_settings(config, config.vocab_size)
    if config.norm_first:
        made = transformers.PegasusConfig(**settings)
        exported = transformers.PegasusForConditionalGeneration(made)
    else:
        made = transformers.MarianConfig(**settings, decoder_vocab_size=settings["vocab_size"])
        exported = transformers.MarianMTModel(made)
    channels = torch.cat([torch.arange(first, config.d_model, 2) for first in (0, 1)])
    state = {}
    for name, weight in model.state_dict().items():
        part = name.split(".")[-2]
        if part in ("embedding", "output"):
            weight = weight[: config.vocab_size, channels]
            names = ["lm_head.weight"]
            if part == "embedding":
                names = ["shared", "encoder.embed_tokens", "decoder.embed_tokens"]
                names = [f"model.{place}.weight" for place in names]
            state |= dict.fromkeys(names, weight)
            continue
        if part in ("in_proj", "linear1") and weight.dim() == 2:  # reads the residual stream
            weight = weight[:, channels]
        elif part not in ("in_proj", "linear1"):  # writes to it
            weight = weight[channels]
        for ours, theirs in TRANSFORMERS_NAMES.items():
            name = name.replace(ours, theirs)
        if part != "in_proj":
            state[f"model.{name}"] = weight
            continue
        for projection, rows in zip(("q_proj", "k_proj", "v_proj"), weight.chunk(3)):
            state[f"model.{name.replace('in_proj', projection)}"] = rows
    state["final_logits_bias"] = torch.zeros(1, config.vocab_size)
    missing, unexpected = exported.load_state_dict(state, strict=False)
    # The position tables are made by the class and not always stored.
    missing = [name for name in missing if "embed_positions" not in name]
    assert not missing and not unexpected, (missing, unexpected)
    generation = exported.generation_config
    generation.max_length = exported_positions(config) // 2  # else 20 tokens
    generation.num_beams = 1
    generation.suppress_tokens = [config.pad_id]  # never write the start token
    return exported.eval()


def complete_tokenizer(tokenizer, config: Seq2SeqConfig) -> None:
    """Build into the tokenizer what data.py does around it: normalise the text, append eos, keep
    spaces when decoding."""
    from tokenizers import Regex, normalizers, processors

    eos, tokenizer.model_max_length = tokenizer.eos_token, exported_positions(config)
    tokenizer.clean_up_tokenization_spaces = False
    # No token_type_ids, which these models reject; set twice, for transformers 4 and 5.
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    backend = tokenizer.backend_tokenizer
    if tokenizer("a")["input_ids"][-1] != tokenizer.eos_token_id:
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {eos}", special_tokens=[(eos, tokenizer.eos_token_id)]
        )
    if backend.normalizer is None:
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        steps = [normalizers.NFC(), spaces, normalizers.Strip()]
        backend.normalizer = normalizers.Sequence(steps)


def to_ctranslate2(
    model: TransformerSeq2SeqModel, tokenizer, folder: Path, quantization: str | None = None
) -> None:
    """Write the model into `folder` in CTranslate2's own format, by its `specs`. Raises InputError
    without the package."""
    try:
        from ctranslate2 import specs
    except ImportError:
        raise InputError(ENGINE_HINT) from None
    config, width = model.config, model.config.d_model
    # Post-LN stacks end normalised, and so they have no final norm in either format.
    more = {"pre_norm": config.norm_first, "no_final_norm": not config.norm_first}
    if config.positional == "rotary":
        more |= {"rotary_dim": 0, "rotary_interleave": False}  # of whole heads, in halves
    # It has no squared ReLU, but ReLU(x) * y, which is the same where y = x.
    more["ffn_glu"] = config.activation == "relu2"
    encoder = specs.TransformerEncoderSpec(config.num_encoder_layers, config.nhead, **more)
    decoder = specs.TransformerDecoderSpec(config.num_decoder_layers, config.nhead, **more)
    spec = specs.TransformerSpec(encoder, decoder)
    arrays: dict[tuple[int, int], np.ndarray] = {}

    def array(weight: Tensor) -> np.ndarray:
        # One array for tied weights, which are stored once then.
        key = weight.data_ptr(), len(weight)
        if key not in arrays:
            arrays[key] = weight.detach().float().cpu().numpy().copy()
        return arrays[key]

    def put(target, source: nn.Module, rows: slice = slice(None)) -> None:
        """A layer norm, or some rows of a linear layer."""
        is_norm = isinstance(source, nn.LayerNorm)
        setattr(target, "gamma" if is_norm else "weight", array(source.weight[rows]))
        setattr(target, "beta" if is_norm else "bias", array(source.bias[rows]))

    for side, part in (("encoder", encoder), ("decoder", decoder)):
        embeddings = part.embeddings[0] if side == "encoder" else part.embeddings
        embeddings.weight = array(model.embedding.weight[: config.vocab_size])
        if config.positional == "learned":
            part.position_encodings.encodings = array(model.positions.embedding.weight)
        elif config.positional != "rotary":
            table = sinusoidal_positional_encoding(exported_positions(config), width)
            table = table if config.positional == "sinusoidal" else torch.zeros_like(table)
            part.position_encodings.encodings = table.numpy()
        if config.norm_first:
            put(part.layer_norm, getattr(model, f"{side}_norm"))
        for target, layer in zip(part.layer, getattr(model, f"{side}_layers")):
            put(target.self_attention.layer_norm, layer.self_attention_norm)
            put(target.self_attention.linear[0], layer.self_attention.in_proj)
            put(target.self_attention.linear[1], layer.self_attention.out_proj)
            if side == "decoder":
                attention = layer.cross_attention
                put(target.attention.layer_norm, layer.cross_attention_norm)
                put(target.attention.linear[0], attention.in_proj, slice(width))
                put(target.attention.linear[1], attention.in_proj, slice(width, None))
                put(target.attention.linear[2], attention.out_proj)
            put(target.ffn.layer_norm, layer.feed_forward_norm)
            put(target.ffn.linear_0, layer.linear1)
            if config.activation == "relu2":
                put(target.ffn.linear_0_noact, layer.linear1)
            put(target.ffn.linear_1, layer.linear2)
    decoder.projection.weight = array(model.output.weight[: config.vocab_size])
    bias = np.zeros(config.vocab_size, np.float32)
    bias[config.pad_id] = -1e9  # never write the start token
    decoder.projection.bias = bias
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    spec.config.decoder_start_token = spec.config.bos_token = tokens[config.pad_id]
    spec.config.eos_token = tokens[config.eos_id]
    spec.config.unk_token = tokenizer.unk_token or tokens[config.pad_id]
    spec.validate()
    spec.optimize(quantization=quantization)
    spec.save(str(folder))


# ---- files ---------------------------------------------------------------------------------------
# They appear whole or not at all.


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
    """Create or replace a file: `write` fills another, which is synced and renamed."""
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


def write_model_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Put the files of a model into a folder: `fill` writes them into a temporary one inside it.
    config.json, without which no folder is a model, goes first and comes last."""
    with naming_failures(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".model-*"):  # by a killed process
            shutil.rmtree(left)
        temporary = Path(tempfile.mkdtemp(prefix=".model-", dir=folder))
        try:
            fill(temporary)
            (folder / "config.json").unlink(missing_ok=True)
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
                path.chmod(0o644)  # safetensors makes them private
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):  # something is in it
                folder.rmdir()


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


# ---- commands ------------------------------------------------------------------------------------
# A frozen dataclass per command: its fields are the flags, their comments the help.


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


def flag_of(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def check_range(config, names: str, low: float, high: float = math.inf) -> None:
    """Raise InputError if one of these settings is out of range, or NaN."""
    for name in names.split():
        value = getattr(config, name)
        limits = f"at least {low}" + (f" and at most {high}" if high < math.inf else "")
        holds = value is None or (low <= value <= high and value < math.inf)
        require(holds, f"{flag_of(name)} must be {limits}, not {value}")


def check_decoding(config: DecodeConfig) -> None:
    check_range(config, "batch_tokens", 1)
    check_range(config, "beam", 1, 1000)
    check_range(config, "length_penalty", -10, 10)


def decoding_of(config: DecodeConfig) -> dict:
    """The arguments of `load_translator` for a command."""
    names = ("device", "precision", "beam", "length_penalty", "batch_tokens")
    return {"folder": config.model} | {name: getattr(config, name) for name in names}


def versions() -> dict[str, str | None]:
    names = "torch lightning modlee transformers tokenizers datasets sacrebleu ctranslate2"
    found = {"python": sys.version.split()[0]}
    for name in f"{names} x-transformers".split():
        found[name] = metadata.version(name) if find_spec(name.replace("-", "_")) else None
    return found


def translate(config: TranslateConfig) -> int:
    check_decoding(config)
    check_range(config, "num_return", 1)
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


def whole_pairs(pairs: Iterable[data.Pair], name: str) -> list[data.Pair]:
    """The pairs with two non-empty sides; only these are scored. InputError if there are none."""
    found = [pair for pair in pairs if pair.source and pair.target]
    require(bool(found), f"{name} has no complete pair")
    return found


def score_pairs(translator: Translator, pairs: list[data.Pair]) -> tuple[list[str], dict]:
    """The translations of the sources, and their scores."""
    hypotheses = translator.translate([pair.source for pair in pairs])
    translator.report("pair")
    return hypotheses, score(hypotheses, [pair.target for pair in pairs])


def print_score(result: dict) -> None:
    print_field("BLEU", f"{result['bleu']:.2f}  {result['signature']}")
    print_field("chrF", f"{result['chrf']:.2f}  {result['chrf_signature']}")


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
        require(alike, f"{path} exists already{what}; choose another name")


def evaluate(config: EvaluateConfig) -> int:
    check_decoding(config)
    check_range(config, "num_samples", 1)
    check_output_file(config.json)
    check_output_file(config.hypotheses, key=None)
    files = [Path(name).expanduser().resolve() for name in (config.json, config.hypotheses) if name]
    require(len(set(files)) == len(files), "--json and --hypotheses are the same file")
    dataset = config.dataset
    require(dataset != (), "--dataset needs a value")
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


def check_free(folder: Path) -> None:
    """Raise InputError if a folder to be created is there already, and not empty."""
    free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    free = free and folder.resolve() != Path.cwd()
    require(free, f"{folder} exists already; choose another folder")


def export(config: ExportConfig) -> int:
    output = Path(config.output).expanduser()
    to_engine = config.to == "ctranslate2"
    require(to_engine or not config.quantization, "--quantization belongs to --to ctranslate2")
    check_free(output)
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

    write_model_folder(output, fill)
    print_field("exported", f"{what}: {output}")
    return 0


COMMANDS = {
    "translate": (TranslateConfig, translate),
    "evaluate": (EvaluateConfig, evaluate),
    "export": (ExportConfig, export),
}


def main(arguments: list[str]) -> int:
    """Run one of `COMMANDS`, which is the first argument. Returns the exit code."""
    config, command = COMMANDS[arguments[0]]
    return command(tyro.cli(config, args=arguments[1:], prog=f"python run.py {arguments[0]}"))
