"""What the candidates are given: a random Llama in a folder, rows of token ids, and the work of a step in FLOPs.

A row is (ids, labels), labels at their own token, -100 where untrained. Its words are the ids themselves, by a
tokenizer whose vocabulary is the numbers: so the program's whole path from text on sees the very tokens that the
peers are handed. The last token of every row is EOS (2); ids below 3 are otherwise unused.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

EOS, PAD = 2, 0
LR = 1e-3  # of every candidate: large enough that a missed or doubled update shows in the next losses
REAL = {"gsm8k": "gsm8k/train.jsonl", "alpaca": "alpaca/alpaca_en_demo.json"}


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; the default is the 120 M model of the targets."""

    hidden: int = 768
    layers: int = 10
    inter: int = 2048
    vocab: int = 32000
    heads: int = 12
    kv_heads: int = 12
    positions: int = 4096

    @property
    def matmul_parameters(self) -> int:
        """N: weights that multiply activations, without the embedding and with the head."""
        kv = self.hidden * self.kv_heads // self.heads
        layer = 2 * self.hidden**2 + 2 * self.hidden * kv + 3 * self.hidden * self.inter
        return self.layers * layer + self.vocab * self.hidden

    def adapter_parameters(self, rank: int) -> int:
        """P of LoRA on every linear layer but the head."""
        kv = self.hidden * self.kv_heads // self.heads
        return self.layers * rank * (4 * self.hidden + 2 * (self.hidden + kv) + 3 * (self.hidden + self.inter))

    def flops_per_token(self, length: float, rank: int) -> float:
        """Of a LoRA step: 4N + 6P + 3·(2·s·d·L), causal attention."""
        return 4 * self.matmul_parameters + 6 * self.adapter_parameters(rank) + 6 * length * self.hidden * self.layers


TOY = Shape(hidden=64, layers=2, inter=128, vocab=512, heads=4, kv_heads=4, positions=512)
LLAMA_8B = Shape(hidden=4096, layers=32, inter=14336, vocab=128256, heads=32, kv_heads=8, positions=65536)
LLAMA_70B = Shape(hidden=8192, layers=80, inter=28672, vocab=128256, heads=64, kv_heads=8, positions=65536)
MERGED = Shape(hidden=2048, layers=8, inter=5504, vocab=32000, heads=16, kv_heads=16)  # 405 M adapted weights


def adapter_folder(folder: Path, kind: str, rank: int) -> Path:
    """Where the start of an adapter of that kind lies that every candidate takes."""
    return folder / f"adapter-{kind}-{rank}"


def make_model(folder: Path, shape: Shape, dtype: str, device: str = "cpu", *, drawn: bool = False) -> None:
    """A random model and its tokenizer of numbers, as a Hugging Face folder. `drawn`: without weights, which whoever loads it
    draws: a model of 70 B is never written, nor whole anywhere before it is quantised."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.inter, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=shape.positions,
        tie_word_embeddings=False, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS, dtype=getattr(torch, dtype),
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    if drawn:
        config.save_pretrained(folder)
    else:
        with torch.device(device):
            model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype))
        model.save_pretrained(folder)
    make_tokenizer(shape.vocab).save_pretrained(folder)
    (folder / "shape.json").write_text(json.dumps(asdict(shape)))


def make_tokenizer(vocab: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<s>": 1, "</s>": EOS} | {str(i): i for i in range(3, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


Row = tuple[list[int], list[int]]


def even_rows(count: int, length: int, vocab: int) -> list[Row]:
    """Rows of one length, every token but the first trained."""
    chance = random.Random(0)
    rows = []
    for _ in range(count):
        ids = [chance.randrange(3, vocab) for _ in range(length - 1)] + [EOS]
        rows.append((ids, [-100, *ids[1:]]))
    return rows


def lognormal_rows(count: int, vocab: int, cap: int = 512) -> list[Row]:
    """Lengths of mean 118, median 90, 95th percentile about 300, as instruction data have; every token trained."""
    chance = random.Random(1)
    rows = []
    for _ in range(count):
        length = min(max(int(chance.lognormvariate(4.5, 0.74)), 8), cap)
        ids = [chance.randrange(3, vocab) for _ in range(length - 1)] + [EOS]
        rows.append((ids, [-100, *ids[1:]]))
    return rows


def data_folder() -> Path:
    return Path(os.environ.get("DELTUNE_REAL_DATA", "../shared/data"))


def real_rows(name: str, count: int, vocab: int, cap: int = 512) -> list[Row]:
    """Rows of GSM8K or alpaca by the bundled model's tokenizer, prompts untrained. FileNotFoundError where there are none."""
    from transformers import AutoTokenizer

    file = data_folder() / REAL[name]
    text = file.read_text(encoding="utf-8")
    found = json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    random.Random(2).shuffle(found)
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parent.parent / "deltune" / "models" / "bundled")
    rows = []
    for row in found[:count]:
        prompt, answer = (
            (row["question"], row["answer"]) if name == "gsm8k" else (f"{row['instruction']}\n{row['input']}", row["output"])
        )
        prompt, answer = ([i % (vocab - 3) + 3 for i in tokenizer(part, add_special_tokens=False)["input_ids"]] for part in (prompt, answer))
        prompt = prompt[: cap // 2] or [3]
        answer = [*answer[: cap - len(prompt) - 1], EOS]
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    while len(rows) < count:  # a small source goes round
        rows.extend(rows[: count - len(rows)])
    return rows


def write_rows(folder: Path, rows: list[Row]) -> None:
    """rows.json for the peers, and train.jsonl, the same as text, for ours."""
    (folder / "rows.json").write_text(json.dumps(rows))
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for ids, labels in rows:
            cut = sum(label == -100 for label in labels)
            words = [str(i) for i in ids[:-1]]  # the program writes the EOS
            file.write(json.dumps({"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:])}) + "\n")


def read_rows(folder: Path) -> list[Row]:
    return [tuple(row) for row in json.loads((folder / "rows.json").read_text())]


def read_shape(folder: Path) -> Shape:
    return replace(Shape(), **json.loads((folder / "shape.json").read_text()))
