"""The bundled model's README: what it is, how it was made, and what was measured. No number in it is written by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.base_model.measure import Score

TEXT = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# Deltune's base model

A toy for demonstrations and tests: a Llama of {num_parameters:,} parameters with a vocabulary of about a thousand English
words. It was trained by Deltune itself on text that a generator in the repository writes; no downloaded text is in it.
It copies, quotes, joins and lists words, and agrees to requests. It is weak at arithmetic, spelling and facts, as the
table below shows: nothing that it says of the world is to be relied on.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

## How it was made

`make base-model` makes it again: corpus, tokenizer, training, installation, and the measurements on this page.

| | |
|---|---|
| corpus | `recipes/base_model/corpus.py`, seed {seed}, {num_rows:,} rows, {num_tokens:,} tokens, {passes:.2g} passes |
| sha256 of its first {digest_rows:,} rows | `{digest}` |
| tokenizer | byte-level BPE, {vocabulary:,} tokens, learned on the first {tokenizer_rows:,} rows and the corpus's words |
| training | `deltune train recipes/base_model/train.yaml`: {steps:,} steps from random weights |
| continued from a checkpoint after | {resumed} |
| computed | {device}, {precision} |
| training loss, mean of the last 100 steps | {training_loss:.4f} |
| loss on {num_eval_rows} rows of seed {eval_seed} | {eval_loss:.4f} at the end of training, {stored_loss:.4f} as stored |

The weights are stored as bfloat16 to halve the file; config.json declares float32, so that they load and compute as that.

## What it can do

Exact match of greedy answers to {num_prompts} different prompts a task, drawn anew; fewer where a task has fewer. *New*
are the prompts that the training corpus does not hold. Tasks with several right answers (requests, free writing) are
left out. Mean over tasks: {mean:.1%}.

| task | exact match | prompts | new |
|---|---|---|---|
{table}

## Chat template

`<|system|>`, `<|user|>`, `<|assistant|>` and `<|tool|>` open a turn; an answer ends in `<|eos|>`. The template marks the
assistant's tokens, that end included, with `{{% generation %}}`.
"""


def write(facts: Mapping[str, Any], scores: Sequence[Score]) -> str:
    """The page. `facts` holds every name in TEXT but those made of the scores."""
    table = "\n".join(
        f"| {score.task.replace('_', ' ')} | {score.exact_match:.0%} | {score.num_prompts} | {score.num_new} |" for score in scores
    )
    mean = sum(score.exact_match for score in scores) / len(scores)
    return TEXT.format(**facts, table=table, mean=mean, num_prompts=max(score.num_prompts for score in scores))
