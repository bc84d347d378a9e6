"""Loads a causal language model and its tokenizer from a Hugging Face folder: safetensors only, no code but
transformers', and never a weight that the folder lacks filled in by chance."""

from __future__ import annotations

import contextlib
import difflib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltune import tables
from deltune.errors import DeltuneError, ModelError
from deltune.log import logger
from deltune.models import attention, quantise, recompute, vocabulary
from deltune.models import folder as folders
from deltune.models.config import EightBit, ModelConfig, QuantConfig
from deltune.models.folder import TOKENIZER_FILES
from deltune.weights import sha256_of, sync

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load(
    config: ModelConfig, *, device: torch.device | str = "cpu", seed: int = 0, fast: bool = True, depth: int | None = None,
    quant: QuantConfig | None = None,
) -> PreTrainedModel:  # fmt: skip
    """The model in eval mode, all parameters trainable, on `device`.

    `seed` draws the weights of `start=random`, the same ones whatever was drawn before. Not `fast`: attention=auto is
    transformers' own choice. `depth` cuts it to so many of its lowest blocks with random weights, and opens no weight
    file. `quant` quantises each linear layer as it is read or drawn: such weights stay frozen. Raises ModelError.
    """
    where = f"model.path={config.path}"
    drawn = config.start == "random" or depth is not None
    folder = folders.find(config.path, config.revision, weights=not drawn)
    architecture = read_config(folder, where)
    if depth is not None:
        cut(architecture, depth)
    if drawn:
        model = _draw(architecture, folder, config, where, seed, _asked(quant))
    else:
        model = _read(architecture, folder, config, where, _asked(quant))
    _lengthen(model, config)
    _choose_attention(model, config, where, fast)
    if config.recompute in ("selective", "full"):
        recompute.apply(model, config.recompute)
    return model.eval().to(device)


def cut(architecture: PretrainedConfig, depth: int) -> None:
    """Leave a model's configuration so many of its lowest blocks, and every list with an entry for each block as many entries."""
    text = architecture.get_text_config()
    blocks = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == blocks and blocks > 1:
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth


def _asked(quant: QuantConfig | None) -> EightBit | None:
    return quant if isinstance(quant, EightBit) else None


def empty(config: ModelConfig, *, fast: bool = True, quant: QuantConfig | None = None) -> PreTrainedModel:
    """The model on the meta device: names, shapes and types without memory; no weight file is opened."""
    where = f"model.path={config.path}"
    folder = folders.find(config.path, config.revision, weights=False)
    architecture = read_config(folder, where)
    with torch.device("meta"):
        model = _from_config(architecture, config, where)
    if asked := _asked(quant):
        quantise.on_meta(model, asked)
    _lengthen(model, config)
    _choose_attention(model, config, where, fast)
    return model


def originals(config: ModelConfig) -> Callable[[str], Tensor] | None:
    """What gives a linear layer's weight [out, in] by the layer's name, in the type that `load` would have it in and before
    it would quantise it: read from the files when it is asked for. None for a random start, whose weights are in no file.

    The function raises ModelError for a layer whose weight is not in the files as one tensor.
    """
    if config.start == "random":
        return None
    where = f"model.path={config.path}"
    folder = folders.find(config.path, config.revision)
    files = quantise.whereabouts(folders.weight_files(folder, where))
    model = empty(config, fast=False)
    return lambda name: quantise.from_files(model, name, files, where)


def read_config(folder: Path, where: str) -> PretrainedConfig:
    """The folder's config.json as transformers understands it; ModelError if it is not a causal language model's."""
    if not (folder / "config.json").is_file():
        raise folders.missing_config(folder, where)
    values = folders.read_json(folder / "config.json", where)
    from transformers import CONFIG_MAPPING, AutoConfig, __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{where}: config.json names no model_type; keys found: {', '.join(list(values)[:8])}.")
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CAUSAL), n=3, cutoff=0.5)
        raise ModelError(
            f"{where}: transformers {__version__} does not know model_type {model_type!r}. "
            + (f"Nearest: {', '.join(near)}. " if near else "")
            + "A newer transformers may."
        )
    names = CAUSAL.get(model_type, ())
    names = (names,) if isinstance(names, str) else names
    stated = values.get("architectures") or []
    if not isinstance(stated, list) or not all(isinstance(name, str) for name in stated):
        raise ModelError(f"{where}: config.json: architectures must be a list of names; found {stated!r:.80}.")
    if not names or (
        stated and not any(name in names or name.endswith(("ForCausalLM", "LMHeadModel")) for name in stated)
    ):
        found = ", ".join(stated) or f"model_type {model_type!r}"
        raise ModelError(
            f"{where}: not a causal language model: config.json says {found}. "
            + (f"What fits: {', '.join(names)}." if names else "What fits: a decoder such as llama, qwen3, gpt2.")
        )
    quantised = values.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown method") if isinstance(quantised, dict) else "unknown method"
        raise ModelError(
            f"{where}: the weights are stored quantised ({method}), and such files are not read. "
            "What fits: the unquantised model, which quant=nf4, fp4 or int8 quantises while it is loaded."
        )
    with blamed(f"{where}: config.json does not describe a {model_type} model"):
        return AutoConfig.from_pretrained(folder)


def _read(architecture: PretrainedConfig, folder: Path, config: ModelConfig, where: str, quant: EightBit | None = None) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    folders.weight_files(folder, where)
    with (
        blamed(f"{where}: the model does not load"),
        quiet_transformers(),
    ):  # its report of the loaded names is read below
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=architecture,
            dtype=_dtype(config.dtype),
            attn_implementation=_transformers_attention(config),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **({} if quant is None else {"quantization_config": quantise.while_read(quant)}),
        )
    if quant is not None:
        try:
            info["mismatched_keys"].update(quantise.forget_reader(model))
        except DeltuneError as error:
            raise ModelError(f"{where}: {error}") from None
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"], key=lambda item: item[0])[0]
        raise ModelError(
            f"{where}: {len(info['mismatched_keys'])} tensors have another shape than config.json says, first "
            f"{name}: file {list(found)}, config {list(expected)}."
        )
    if info["missing_keys"]:
        raise ModelError(
            f"{where}: {_some(info['missing_keys'])} not in the weight files, though config.json "
            f"({type(model).__name__}) needs them."
        )
    if info["unexpected_keys"]:
        logger.warning(
            "%s: left out %s, which %s has no place for", where, _some(info["unexpected_keys"]), type(model).__name__
        )
    return model


def _draw(architecture: PretrainedConfig, folder: Path, config: ModelConfig, where: str, seed: int, quant: EightBit | None = None) -> PreTrainedModel:
    from transformers import GenerationConfig
    from transformers.initialization import no_init_weights

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if quant is None:
            model = _from_config(architecture, config, where)
        else:
            with no_init_weights():
                model = _from_config(architecture, config, where)
            quantise.while_drawn(model, quant)
    if (folder / "generation_config.json").is_file():
        with blamed(f"{where}: generation_config.json does not load"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _from_config(architecture: PretrainedConfig, config: ModelConfig, where: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    dtype = _dtype(config.dtype)
    if dtype == "auto":  # what _read would find, or for a random start the type that loses nothing
        dtype = torch.float32 if config.start == "random" else architecture.dtype or torch.float32
    with blamed(f"{where}: no model can be made of config.json"), quiet_transformers():
        return AutoModelForCausalLM.from_config(architecture, dtype=dtype, attn_implementation=_transformers_attention(config))


def _transformers_attention(config: ModelConfig) -> str | None:
    """What the model is built with; None leaves the choice to transformers, for it may be changed in the next step."""
    return None if config.attention in ("auto", attention.NAME) else config.attention


def _choose_attention(model: PreTrainedModel, config: ModelConfig, where: str, fast: bool) -> None:
    if config.attention not in ("auto", attention.NAME) or (config.attention == "auto" and not fast):
        return
    reason = attention.unsupported(type(model))
    if not reason:
        attention.register()
        model.set_attn_implementation(attention.NAME)
    elif config.attention == "auto":
        logger.info("%s: attention %s, for %s", where, model.config._attn_implementation, reason)
    else:
        raise ModelError(f"{where}: model.attention={attention.NAME} does not fit: {reason}. What fits: model.attention=auto")


def _dtype(name: str) -> torch.dtype | str:
    return {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the right, with EOS and a pad token, the tokens that the config adds, and the chat template
    that it names."""
    from transformers import AutoTokenizer

    key, path = ("model.tokenizer", config.tokenizer) if config.tokenizer else ("model.path", config.path)
    folder = folders.find(path, None if config.tokenizer else config.revision, key=key, weights=False)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if config.tokenizer is None and not (folder / "config.json").is_file():
            raise folders.missing_config(folder, f"{key}={path}")
        shown = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10])
        raise ModelError(
            f"{key}={path}: no tokenizer in the folder (expected one of {', '.join(TOKENIZER_FILES)}; found "
            f"{shown}). What fits: model.tokenizer=<a folder with one>"
        )
    with blamed(f"{key}={path}: the tokenizer does not load"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary.repair(tokenizer, f"{key}={path}")
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{key}={path}: the tokenizer has no EOS token, so no answer could end. "
            "What fits: eos_token in its tokenizer_config.json."
        )
    vocabulary.add(tokenizer, config)
    vocabulary.settle_pad(tokenizer, config)
    tokenizer.padding_side = "right"
    if config.chat_template is not None:
        tokenizer.chat_template = _template(Path(config.chat_template).expanduser(), tokenizer)
    return tokenizer


def new_vocabulary(config: ModelConfig) -> vocabulary.Growth | None:
    """What the config adds to the vocabulary of the model in the folder; None if nothing. No weight file is opened."""
    if not config.has_new_rows:
        return None
    plain = replace(config, add_tokens=[], add_special_tokens=[], pad_token="auto")
    old = load_tokenizer(replace(plain, tokenizer=None) if config.grow else plain)
    architecture = read_config(folders.find(config.path, config.revision, weights=False), f"model.path={config.path}")
    check_pair(architecture, old)
    return vocabulary.growth(config, old, load_tokenizer(config), architecture.get_text_config().vocab_size)


def _lengthen(model: PreTrainedModel, config: ModelConfig) -> None:
    """Rows for new tokens, which are zeros until they are started."""
    new = new_vocabulary(config)
    if new is not None:
        tables.lengthen(model, new.size)


def _template(file: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a chat template file, compiled once to see its faults now."""
    import jinja2

    where = f"model.chat_template={file}"
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{where}: cannot be read: {_cause(error)}") from None
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=text, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"{where} line {error.lineno}: {error.message}") from None
    except jinja2.TemplateError:
        pass  # it parses, but refuses a conversation of this one message, as templates may
    return text


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write a Hugging Face folder; it appears under its name only when it is whole, in place of an older one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    use_cache, model.config.use_cache = model.config.use_cache, True  # off only while activations are recomputed
    try:
        with quiet_transformers():
            model.save_pretrained(new, max_shard_size="5GB")
    finally:
        model.config.use_cache = use_cache
    if tokenizer is not None:
        tokenizer.save_pretrained(new)
    for file in new.iterdir():
        sync(file)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def check_pair(model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """ModelError if the tokenizer can write an id for which the model has no embedding."""
    size = model_config.get_text_config().vocab_size
    outside = {token: i for token, i in tokenizer.get_vocab().items() if i >= size}
    if outside:
        shown = ", ".join(f"{token!r} ({i})" for token, i in sorted(outside.items(), key=lambda item: item[1])[:5])
        raise ModelError(
            f"the tokenizer and the model do not belong together: the model embeds ids 0 to {size - 1}, and the "
            "tokenizer has "
            f"{len(outside)} beyond, first {shown}. "
            "What fits: the tokenizer that came with the model (model.tokenizer=null)."
        )


def model_identity(config: ModelConfig) -> dict[str, Any]:
    """What a run record says of its model: path, commit (hub), sha256 of each light file, bytes of each weight file."""
    folder = folders.find(config.path, config.revision, weights=False)
    light = [folder / name for name in folders.SETTINGS_FILES] + [
        folder / name for name in (*TOKENIZER_FILES, "chat_template.jinja")
    ]
    return {
        "path": config.path,
        "commit": folder.name if folder.parent.name == "snapshots" else None,
        "sha256": {file.name: sha256_of(file) for file in light if file.is_file()},
        "weight_bytes": {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))},
        **({} if config.tokenizer is None else {"tokenizer_sha256": _tokenizer_hashes(config.tokenizer)}),
    }


def _tokenizer_hashes(path: str) -> dict[str, str]:
    folder = folders.find(path, None, key="model.tokenizer", weights=False)
    return {name: sha256_of(folder / name) for name in (*TOKENIZER_FILES, "tokenizer_config.json") if (folder / name).is_file()}


# what transformers raises where a folder's JSON is not what it expects
FOLDER_FAULTS = (
    OSError,
    ImportError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)


@contextlib.contextmanager
def blamed(where: str):
    """A folder that transformers cannot make sense of is a ModelError; lack of memory and other faults stay."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (*FOLDER_FAULTS, StrictDataclassError) as error:
        raise ModelError(f"{where}: {_cause(error)}") from error
    except Exception as error:
        # the Rust libraries raise parse errors as plain Exception; any other class is not the folder's fault
        if type(error) is not Exception:
            raise
        raise ModelError(f"{where}: {_cause(error)}") from error


@contextlib.contextmanager
def quiet_transformers():
    """No progress bars and no advice from transformers inside; its faults still arrive as exceptions."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _some(names: Any) -> str:
    names = sorted(names)
    return f"{len(names)} tensors ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def _cause(error: Exception) -> str:
    """The message in one line; transformers and the hub spread some over many."""
    text = " ".join(str(error).split())
    if isinstance(error, (TypeError, LookupError, AttributeError)):
        text = f"{type(error).__name__}: {text}"  # their messages say little alone
    return text[:300] + (" …" if len(text) > 300 else "") if text else type(error).__name__
