"""The catalogue of methods as a page, docs/methods.md: every fact from the code, every cost from a committed measurement."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltune.adapters.config import METHODS, Method, named

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "methods.md"
MEASURED = ROOT / "benchmarks" / "results" / "methods_step.json"

INTRO = """\
# Methods

Every adaptation method, as `adapter=NAME`. This page is written by `make docs` from the code; a test holds it to that. How to add one: [add-a-method.md](add-a-method.md). What can be composed: [below](#composing).

Legend: W is a layer's frozen weight, out×in; x its input; ΔW what the method adds. A is r×in, B is out×r, s the scale; ⊙ is entry by entry, ⊗ Kronecker's product, sg( ) has no gradient, ‖·‖row a norm for each row.

- **Trained**: numbers trained on the linear layers of Llama 3 8B (32 blocks; q, k, v, o, gate, up, down), with the method's own defaults.
- **Merges**: whether ΔW can be folded into W, so that the adapted model costs nothing more.
- **PEFT**: the `peft_type` of the file, which PEFT reads and writes alike; – is our own type in the same container.
- **Reads W**: *start*: once, when it is attached, and what it found is saved; *each step*: in every forward pass, so a quantised base is dequantised each time; –: never. Bases that are quantised come with a later version; this says what a method will ask of one.
- **Step**, **Memory**: time of a training step, and bytes held for its backward pass, relative to plain LoRA measured beside it ({setting}).
- **Start**: 0 if the adapted model is the base model to the bit; else the largest relative change of the tests' toy model.
"""

COMPOSING = """\
## Composing

A name above is a preset of choices, each of which can be made by itself:

| axis | key | choices |
|---|---|---|
| parametrisation | `adapter.delta` | {deltas} |
| strength apart from direction | `adapter.magnitude` | `true` puts DoRA around any change that is a matrix |
| start | `adapter.init` | for LoRA: {inits} |
| scale | `adapter.scaling` | `standard` (α/r), `rslora` (α/√r), where a method has alpha |
| learning rates and gradients | `optim.rule` | {rules} |
| over time | `adapter.schedule` | {schedules} |

```sh
deltune train adapter=pissa adapter.delta=dora optim.rule=lora_plus
deltune train adapter=loha adapter.magnitude=true adapter.schedule=relora
```

What does not go together is refused with the reason:

{refused}
"""


def page() -> str:
    """docs/methods.md."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {"methods": {}, "setting": {}}
    setting = measured["setting"]
    told = "not measured yet" if not setting else (
        f"{setting['layers']} layers of width {setting['hidden']}, {setting['rows']}×{setting['length']} tokens, {setting['dtype']}, "
        f"rank {setting['rank']} where there is one, {setting['threads']} CPU thread, torch {setting['torch']}"
    )
    llama = _llama()
    lines = [
        "| method | paper | formula | trained | merges | PEFT | reads W | step | memory | start |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(method, measured["methods"].get(method.name), llama) for method in _sorted()),
    ]
    notes = [f"- **{method.name}**: {method.note}" for method in _sorted() if method.note]
    parts = [INTRO.format(setting=told), "\n".join(lines), "## Notes\n\n" + "\n".join(notes), _composing()]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _sorted() -> list[Method]:
    return [METHODS[name] for name in sorted(METHODS)]


def _llama() -> Any:
    """Llama 3 8B without its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def _row(method: Method, cost: dict[str, float] | None, llama: Any) -> str:
    from deltune.adapters.attach import attach, detach, trainable
    from deltune.adapters.files.peft import OWN, form_for

    config = named(method.name, **method.example)
    delta = config.delta_class()
    attach(llama, config)
    trained = sum(parameter.numel() for parameter in trainable(llama).values())
    reads = "each step" if delta.reads_base or config.magnitude else "start" if _start_reads(llama) else "–"
    detach(llama)
    form = form_for(config).type
    cells = [
        f"`{method.name}`", _link(method.paper), _escaped(method.formula), f"{trained:,}", "yes" if delta.mergeable else "no",
        "–" if form.startswith(OWN) else form, reads, f"{cost['time']:.2f}" if cost else "–",
        f"{cost['held_memory']:.2f}" if cost else "–", f"{method.start:g}",
    ]
    return f"| {' | '.join(cells)} |"


def _start_reads(llama: Any) -> bool:
    from deltune.adapters.delta import Delta
    from deltune.adapters.wrapper import wrappers

    deltas = [part for _, wrapper in wrappers(llama) for part in wrapper.adapters.values() if isinstance(part, Delta)]
    banks = [bank for delta in deltas for bank in delta.banks_held()]
    return any(part.starts_from_base for part in [*deltas, *banks])


def _link(paper: str) -> str:
    if paper.startswith("arXiv:"):
        number = paper.removeprefix("arXiv:").split()[0].rstrip(",")
        return paper.replace(f"arXiv:{number}", f"[{number}](https://arxiv.org/abs/{number})", 1)
    return _escaped(paper)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _composing() -> str:
    from deltune.adapters.config import DELTAS, OverTime
    from deltune.adapters.methods.lora import LoraConfig
    from deltune.optim.config import OptimConfig

    return COMPOSING.format(
        deltas=", ".join(f"`{name}`" for name in sorted(DELTAS)), inits=_choices(LoraConfig, "init"),
        rules=_choices(OptimConfig, "rule"), schedules=_choices(OverTime, "name"), refused="\n".join(_refused()),
    )


def _choices(cls: type, key: str) -> str:
    field = next((field for field in dataclasses.fields(cls) if field.name == key), None)
    return ", ".join(f"`{choice}`" for choice in field.metadata["choices"]) if field else "–"


def _refused() -> Iterator[str]:
    from deltune.adapters.legal import RULES

    for rule in RULES:
        yield f"- {rule.__doc__}"
    yield "- `optim.rule` with a method that has no pair (A, B), or does not train what the rule is about."


if __name__ == "__main__":  # make docs
    if sys.argv[1:] == ["--write-docs"]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())
