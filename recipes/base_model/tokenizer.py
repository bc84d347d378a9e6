"""The base model's tokenizer: byte-level BPE learned on the corpus. Any text round-trips; digits are never merged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from recipes.base_model import words

SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
VOCABULARY = 4096
WORD_COUNT = 400  # how often each word of the corpus is shown, with a space before it and without
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def texts(rows: Iterable[dict]) -> Iterator[str]:
    """What is said in the rows, without the marks of the chat template, and the corpus's own words.

    A word that is one token wherever it stands can be copied in one step, which is half of what so small a model does.
    """
    own = words.WORDS + words.NAMES + words.CITIES + words.COUNTRIES + words.ALL_DAYS + words.MONTHS + words.MACHINES + words.ROOMS
    for word in dict.fromkeys(own):
        yield from [f'"{word}" {word}'] * WORD_COUNT
    for row in rows:
        if "text" in row:
            yield row["text"]
        else:
            yield from (message["content"] for message in row["messages"])


def build(rows: Iterable[dict]):
    """Learn the merges and return a `PreTrainedTokenizerFast` with pad, bos, eos and the chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(rows), trainer)
    bos = SPECIAL.index("<|bos|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", bos)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=list(SPECIAL[3:]),
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    fast.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    return fast
