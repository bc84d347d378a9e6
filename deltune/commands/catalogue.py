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
MEASURED = {dtype: ROOT / "benchmarks" / "results" / f"methods_step_{dtype}.json" for dtype in ("bfloat16", "float32")}

INTRO = """\
# Methods

Every adaptation method, as `adapter=NAME`. This page is written by `make docs` from the code; a test holds it to that. How to add one: [add-a-method.md](add-a-method.md). What can be composed: [below](#composing).

Legend: W is a layer's frozen weight, out×in; x its input; ΔW what the method adds. A is r×in, B is out×r, s the scale; ⊙ is entry by entry, ⊗ Kronecker's product, sg( ) has no gradient, ‖·‖row a norm for each row.

- **Trained**: numbers trained on the linear layers of Llama 3 8B (32 blocks; q, k, v, o, gate, up, down), with the method's own defaults.
- **Merges**: whether ΔW can be folded into W, so that the adapted model costs nothing more.
- **PEFT**: the `peft_type` of the file, which PEFT reads and writes alike; – is our own type in the same container.
- **Reads W**: *start*: once, when it is attached, and what it found is saved; *start, out*: its start is a part of W and is taken out of it, which a quantised layer is rounded without ([quantised bases](adapters.md#quantised-bases)); *each step*: in every forward pass, so that a quantised weight's values are formed once more (for the norms of magnitude a block of rows at a time); –: never. Every method runs on a quantised base.
- **Step**: time of a training step relative to plain LoRA measured beside it, on a base in bfloat16 and in float32; in brackets PEFT's own form of the method, relative to our LoRA too. **Memory**: bytes held for the backward pass in bfloat16, relative to LoRA. Measured by `python -m benchmarks.methods_step` ({setting}).
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
    measured = {dtype: json.loads(path.read_text(encoding="utf-8")) for dtype, path in MEASURED.items() if path.exists()}
    setting = next(iter(measured.values()))["setting"] if measured else None
    told = "not measured yet" if setting is None else (
        f"{setting['layers']} layers of width {setting['hidden']}, {setting['rows']}×{setting['length']} tokens, "
        f"rank {setting['rank']} where there is one, {setting['threads']} CPU thread, torch {setting['torch']}"
    )
    llama = _llama()
    lines = [
        "| method | paper | formula | trained | merges | PEFT | reads W | step bf16 | step f32 | memory | start |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(_row(method, {dtype: found["methods"].get(method.name) for dtype, found in measured.items()}, llama) for method in _sorted()),
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


def _step(cost: dict[str, float] | None) -> str:
    if cost is None:
        return "–"
    return f"{cost['time']:.2f}" + (f" ({cost['peft_to_lora']:.2f})" if "peft_to_lora" in cost else "")


def _row(method: Method, costs: dict[str, dict[str, float] | None], llama: Any) -> str:
    from deltune.adapters.attach import attach, detach, trainable
    from deltune.adapters.files.peft import OWN, form_for

    config = named(method.name, **method.example)
    delta = config.delta_class()
    attach(llama, config)
    trained = sum(parameter.numel() for parameter in trainable(llama).values())
    reads = [_start_reads(llama)] if _start_reads(llama) else []
    reads += ["each step"] if delta.reads_base or config.magnitude else []
    detach(llama)
    form, short = form_for(config).type, costs.get("bfloat16")
    cells = [
        f"`{method.name}`", _link(method.paper), _escaped(method.formula), f"{trained:,}", "yes" if delta.mergeable else "no",
        "–" if form.startswith(OWN) else form, "; ".join(reads) or "–",
        *(_step(costs.get(dtype)) for dtype in MEASURED), f"{short['held_memory']:.2f}" if short else "–", f"{method.start:g}",
    ]
    return f"| {' | '.join(cells)} |"


def _start_reads(llama: Any) -> str:
    """What the start of the adapter on this model does with W, in the page's words; empty if it does not look at it."""
    from deltune.adapters.delta import Delta
    from deltune.adapters.magnitude import Magnitude
    from deltune.adapters.wrapper import wrappers

    parts = [part for _, wrapper in wrappers(llama) for part in wrapper.adapters.values() if isinstance(part, Delta)]
    deltas = [part.inner if isinstance(part, Magnitude) else part for part in parts]  # magnitude itself reads W in each step
    if any(delta.starts_from_original and delta.taken_out() is not None for delta in deltas):
        return "start, out"
    return "start" if any(part.starts_from_base for part in [*deltas, *(bank for delta in deltas for bank in delta.banks_held())]) else ""


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
