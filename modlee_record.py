"""Modlee 0.0.5 records a run at the start of a fit: code, graph, metafeatures.

The record is kept and Modlee's side effects are undone; each is named where we undo it. The day
Modlee needs no taming, this file can be deleted. It needs data.py, lightning and modlee.

    record = ModleeRecord(import_modlee(), dataset, tokenizer)
    record.fit(adapter, start, use_store)   # adapter: of `modlee_base()`; start(): Trainer.fit
    record.artifacts                        # names of the files in record.run_path
"""

import contextlib
import copy
import io
import logging
import os
import random
import ssl
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

import data
from data import InputError

# ---- importing it --------------------------------------------------------------------------------


def import_modlee():
    """The package, or None if it is not installed. The process is left as it was."""
    if find_spec("modlee") is None:
        return None
    with warnings.catch_warnings():  # it adds 36 filters, and Lightning 2.3 warns of pkg_resources
        warnings.simplefilter("ignore")
        # These configure their own loggers, which must not be undone along with Modlee's changes.
        import lightning.pytorch  # noqa: F401
        import mlflow  # noqa: F401
        import sklearn  # noqa: F401

        # Modlee turns TLS verification off, calls basicConfig, and silences these loggers.
        https_context = ssl._create_default_https_context
        root_handlers, root_level = logging.root.handlers[:], logging.root.level
        names = "pytorch_lightning lightning.pytorch.core mlflow torchvision torch.nn"
        loggers = [logging.getLogger(name) for name in f"{names} sklearn pymfe numpy".split()]
        levels = [(logger, logger.level, logger.propagate) for logger in loggers]
        random_state = torch.get_rng_state()  # it draws a dummy image
        try:
            import modlee
        except ImportError as error:
            raise InputError(
                f"Modlee is installed but cannot be imported ({data.one_line(error)}); reinstall "
                "requirements.txt, or train with --no-modlee"
            ) from None
        finally:
            ssl._create_default_https_context = https_context
            logging.root.handlers[:] = root_handlers
            logging.root.setLevel(root_level)
            for logger, level, propagate in levels:
                logger.setLevel(level)
                logger.propagate = propagate
            torch.set_rng_state(random_state)
    return modlee


def modlee_base() -> type:
    """The text-to-text class, whichever spelling this release has."""
    from modlee import model

    for name in ("TextTexttotextModleeModel", "TextTextToTextModleeModel"):
        if hasattr(model, name):
            return getattr(model, name)
    raise InputError("this Modlee has no text-to-text model; install modlee==0.0.5 or --no-modlee")


# ---- undoing what its callbacks do ---------------------------------------------------------------


def snapshot(module: nn.Module) -> Callable[[], None]:
    """A function that restores what Modlee's callbacks change: random states, which parameters are
    trainable (its graph export makes all of them trainable), modes, and print options."""
    printing = torch._tensor_str.PRINT_OPTS  # there is no public way to read them
    print_options = copy.copy(vars(printing))
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    trainable = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    modes = [(child, child.training) for child in module.modules()]

    def restore() -> None:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        torch.cuda.set_rng_state_all(cuda_states)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        for child, training in modes:
            child.training = training
        vars(printing).update(print_options)

    return restore


def small_converter(modlee) -> object:
    """Modlee's model-to-code converter without its slow parts and leftover files."""
    import networkx

    class SmallConverter(modlee.converter.Converter):
        def torch_model2onnx_graph(self, torch_model, input_dummy=None, **kwargs):
            # Modlee's version leaves .tmp_model.onnx in the working directory.
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "model.onnx")
                return super().torch_model2onnx_graph(torch_model, input_dummy, path, **kwargs)

        torch2onnx = torch_model2onnx_graph

        def onnx_graph2onnx_nx(self, onnx_graph, prune=True):
            # Modlee's version draws an unused graph with pydot, a sixth of the time.
            return networkx.DiGraph()

        def convert_float(self, onnx_text):
            # Modlee's regular expression takes 17 s for the numbers of a position table.
            lines = (line.rpartition("_") for line in onnx_text.split("\n"))
            return "\n".join(
                before + ("." if "float" in before else mark) + after
                for before, mark, after in lines
            )

        def tensor2init_code(self, input_tensor, tensor_type=None):
            # Modlee's version builds set(tensor.tolist()) of every weight: a minute for 60 M.
            if not isinstance(input_tensor, Tensor):
                return input_tensor
            shape, flat = tuple(input_tensor.shape), input_tensor.flatten()
            if flat.numel() and bool((flat == flat[0]).all()):
                return f"torch.ones({shape})*{flat[0].item()}"
            if tensor_type is None and flat.numel() <= 1000:
                return f"torch.tensor({input_tensor.tolist()})"
            return f"torch.{tensor_type or 'randn'}({shape})"

        def dict2code(self, kwarg_dict):
            # Modlee's version calls exec() on every string, and appends to ~/kwargs.txt.
            code = {k: v if str(v).startswith("torch.") else repr(v) for k, v in kwarg_dict.items()}
            return "{" + ",".join(f"{key!r}:{value}" for key, value in code.items()) + "}"

    return SmallConverter()


# ---- recording a run -----------------------------------------------------------------------------


@dataclass(eq=False)
class ModleeRecord:
    """One training run recorded by Modlee."""

    modlee: object  # the package
    dataset: data.PairDataset  # of the training pairs
    tokenizer: object
    names: tuple[str, ...] = ("",)  # which of its callbacks, by parts of their names
    seconds: float = 0.0  # what Modlee took
    run_path: str = ""  # folder of the run
    artifacts: tuple[str, ...] = ()  # names of the files in it

    def fit(self, adapter, fit: Callable[[], None], use_store: Callable[[], None]) -> None:
        """Call `fit` inside an MLflow run of the store that `use_store` sets, with Modlee's
        callbacks on the adapter."""
        import mlflow

        # Silences advice on signatures and schemas.
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        root_handlers = logging.root.handlers[:]  # Modlee's logging.info() adds one that prints all
        autolog = mlflow.pytorch.autolog  # the constructor has switched it on, with models
        trained = False
        try:
            with contextlib.ExitStack() as undo:
                undo.callback(setattr, logging.root, "handlers", root_handlers)
                undo.callback(autolog, disable=True)  # it has patched Trainer.fit
                callbacks = self.callbacks(adapter, undo)
                try:
                    use_store()
                    autolog(log_datasets=False, log_models=False, checkpoint=False)
                    undo.enter_context(self.modlee.start_run())
                except Exception as error:  # noqa: BLE001 - a store may raise anything
                    data.note(f"Modlee records nothing: {data.one_line(error)}")
                    autolog(disable=True)
                    callbacks = []
                adapter.configure_callbacks = lambda: callbacks
                fit()
                trained = True
                if not callbacks:
                    return
                self.run_path = self.modlee.last_run_path()
        except Exception as error:  # what comes after the fit must not lose it
            if not trained:
                raise
            data.note(f"Modlee's record is not complete: {data.one_line(error)}")
            return
        root = Path(self.run_path) / "artifacts"
        files = (path for path in root.rglob("*") if path.is_file())
        self.artifacts = tuple(sorted(str(path.relative_to(root)) for path in files))

    def callbacks(self, adapter, undo: contextlib.ExitStack) -> list:
        """Modlee's callbacks, after one that saves the state that they change."""
        from lightning.pytorch.callbacks import Callback
        from modlee.model import callbacks as stock

        record = self

        class Begin(Callback):
            def on_train_start(self, trainer, module):
                print("\nModlee describes the run ...", file=sys.stderr)
                started = time.perf_counter()
                quiet = contextlib.ExitStack()
                quiet.callback(snapshot(module))
                # pymfe and the tracer emit dozens of warnings.
                quiet.enter_context(warnings.catch_warnings())
                quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
                warnings.simplefilter("ignore")
                undo.push(quiet)  # also where a callback fails

                def finish() -> None:
                    quiet.close()
                    record.seconds += time.perf_counter() - started
                    del module.on_train_start
                    module.on_train_start()

                module.on_train_start = finish  # which is called after every callback

        def source(model, **more) -> str:
            # Modlee's version names the modules of base classes without importing them.
            text = self.modlee.get_code_text_for_model(model, **more)
            return "import positional, seq2seq\n" + text

        converter, features = small_converter(self.modlee), self.modlee.model_metafeatures
        undo.enter_context(patch.object(features, "converter", converter))
        undo.enter_context(patch.object(stock, "modlee_converter", converter))
        undo.enter_context(patch.object(stock, "get_code_text_for_model", source))
        adapter.data_metafeatures_callback.DataMetafeatures = self.metafeatures_class()
        dropped = (
            stock.LogOutputCallback,  # overwrites the module's own val_loss
            stock.LogParamsCallback,  # asks the loader for a fixed batch size
            stock.PushServerCallback,  # uploads unasked, and crashes without a key
        )
        kept = [c for c in type(adapter).configure_callbacks(adapter) if not isinstance(c, dropped)]
        kept = [c for c in kept if any(name in type(c).__name__ for name in self.names)]
        # Each would run a whole training batch; two short rows are enough.
        ids = torch.ones(2, 8, dtype=torch.long)
        for callback in kept:
            callback.get_input = lambda trainer, module, *_: [ids.to(module.device)] * 2
            callback.on_train_start = may_fail(callback.on_train_start)
        return [Begin(), *kept]

    def metafeatures_class(self) -> type:
        """Modlee's data metafeatures of a bounded, fixed-length view of the pairs.

        The stock class reads the data 2 N + 200 times, and fetches GPT-2's tokenizer with retries
        that last minutes where there is no network.
        """
        from modlee import data_metafeatures as stock
        from torch.utils.data import DataLoader, TensorDataset

        train, own = self.dataset, self.tokenizer
        rows = [train[row] for row in range(min(len(train), 200))]
        matrices = data.pad_batch(rows, own.pad_token_id)
        view = DataLoader(TensorDataset(*matrices), batch_size=2)
        tokenizer = modlee_tokenizer(own)

        class BoundedMetafeatures(stock.DataMetafeatures):
            def __init__(self, dataloader):
                dataset = stock.ModleeStandardizedTextDataset(view, own, tokenizer)
                super().__init__(DataLoader(dataset, batch_size=2))
                self.properties["dataset_size"] = len(dataloader.dataset)

        return BoundedMetafeatures

    def push(self) -> str:
        """Upload the run. Returns what went wrong, or "". A server that does not answer costs
        seconds, not the run."""
        key, here = os.environ["MODLEE_API_KEY"], os.getcwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # it writes logs.json into the working directory
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    sent = self.modlee.save_run_as_json(self.run_path)
                return "" if sent else "no reason given"
            except Exception as error:  # noqa: BLE001 - its client may raise anything
                return data.one_line(error).replace(key, "***")
            finally:
                os.chdir(here)


def may_fail(hook: Callable) -> Callable:
    """A hook of Modlee's that ends in a note, not in the end of training, if it fails."""

    def wrapper(*arguments) -> None:
        try:
            hook(*arguments)
        except Exception as error:  # noqa: BLE001 - it describes whatever it finds
            data.note(f"Modlee's record is not complete: {data.one_line(error)}")

    return wrapper


def modlee_tokenizer(own):
    """The tokenizer for data metafeatures: GPT-2's, as in Modlee, if it is cached or reachable;
    else the run's own, whose metafeatures do not compare with Modlee's."""
    from transformers import GPT2Tokenizer

    for only_cached in (True, False):
        if only_cached or data.hub_reachable():
            with contextlib.suppress(OSError):
                tokenizer = GPT2Tokenizer.from_pretrained("gpt2", local_files_only=only_cached)
                tokenizer.pad_token = tokenizer.eos_token
                return tokenizer
    data.note("GPT-2's tokenizer cannot be loaded: data metafeatures are of the run's own")
    return own
