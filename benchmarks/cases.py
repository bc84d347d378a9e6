"""The cases: who runs, on what, and what is to be reached. Numbers and targets are data here; how a case runs is in suite.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from benchmarks.measure import Candidate, Target
from benchmarks.work import LLAMA_8B, LLAMA_70B, TOY, Shape

OURS, PEFT = "ours", "peft"


@dataclass(frozen=True)
class Case:
    title: str
    candidates: Mapping[str, Candidate]
    targets: tuple[Target, ...] = ()
    shape: Shape = field(default_factory=Shape)
    dtype: str = "bfloat16"
    micro_batch: int = 2
    length: int = 512
    rows: str = "even"  # even, lognormal, gsm8k, alpaca
    rank: int = 16
    rounds: int = 5
    steps: int = 1  # in one turn of one candidate
    equality_steps: int = 3  # from identical adapters and data; the first is also the warm-up
    drawn: bool = False  # no files of weights: each candidate draws the model, quantised as it is drawn if its base is
    memory: bool = False  # each candidate alone, peaks instead of times
    pairwise: bool = False  # ours with one peer at a time: a card holds no more
    device: str = "cpu"

    def toy(self) -> Case:
        """The same at a size for a test: seconds on a CPU."""
        specs = {name: replace(c, spec={k: v for k, v in c.spec.items() if k != "liger"}) for name, c in self.candidates.items()}
        return replace(
            self, candidates=specs, shape=TOY, micro_batch=min(self.micro_batch, 4), length=min(self.length, 64), rank=4, rounds=min(self.rounds, 2), device="cpu",
        )  # fmt: skip


def speed(peer: str, bound: float, ours: str = OURS) -> Target:
    return Target("speed", ours, peer, bound)


def loop(**spec: object) -> Candidate:
    return Candidate("peft", spec)


MINE, THEIRS = Candidate("ours"), loop()
DORA = {"adapter": "dora"}
FULL = {"config": {"model": {"gradient_checkpointing": "full"}}}
WITHOUT = {"config": {"model": {"gradient_checkpointing": "none"}}}
NF4 = {"config": {"quant": {"name": "nf4"}}}  # its scales are quantised too by default


def memory(length: int) -> Case:
    return Case(
        f"transient memory, B1 S{length}", {OURS: MINE, PEFT: THEIRS, "ours + checkpointing": Candidate("ours", FULL)},
        micro_batch=1, length=length, rounds=1, memory=True,
    )  # fmt: skip


def packing(rows: str) -> Case:
    return Case(
        f"packing, 8 sequences a step, {rows} lengths",
        {
            OURS: MINE, PEFT: THEIRS, "peft, packed": loop(packed=True),
            "trl, packing": Candidate("trl", {"packing": True, "length_override": 1024, "micro_batch_override": 1}, equal_to=None),
        },
        (speed(PEFT, 3.0), speed("peft, packed", 1.8), speed("trl, packing", 3.0)),
        micro_batch=8, rows=rows, rounds=5 if rows == "lognormal" else 3,
    )  # fmt: skip


CPU: dict[str, Case] = {
    "C1": Case(
        "LoRA r16 on all linear layers, B2 S512, bf16",
        {
            OURS: MINE, PEFT: THEIRS, "peft, bf16 adapters": loop(autocast_adapters=False),
            "peft + Trainer": Candidate("trainer"),
            "peft, compiled": loop(compile=True), "trl": Candidate("trl", {"default": True}),
            "trl, no checkpointing": Candidate("trl"), "litgpt": Candidate("litgpt"),
        },
        (speed(PEFT, 1.30), speed("peft + Trainer", 1.33), speed("litgpt", 1.33), speed("trl", 2.6),
         speed("trl, no checkpointing", 2.0), speed("peft, compiled", 1.0)),
    ),
    "C2": Case(
        "the same in float32", {OURS: MINE, PEFT: THEIRS, "peft + Trainer": Candidate("trainer"), "trl, no checkpointing": Candidate("trl")},
        (speed(PEFT, 1.03), speed("peft + Trainer", 1.06), speed("trl, no checkpointing", 1.5)), dtype="float32",
    ),
    "C3": Case("B8 S128, bf16", {OURS: MINE, PEFT: THEIRS}, (speed(PEFT, 1.45),), micro_batch=8, length=128),
    "C4": Case("B1 S2048, bf16", {OURS: MINE, PEFT: THEIRS}, (speed(PEFT, 1.20),), micro_batch=1, length=2048),
    "C5": packing("lognormal"),
    "C5-gsm8k": packing("gsm8k"),
    "C5-alpaca": packing("alpaca"),
    "C6": Case(
        "transient memory of C1, without and with checkpointing",
        {
            OURS: MINE, PEFT: THEIRS, "ours + checkpointing": Candidate("ours", FULL), "peft + checkpointing": loop(checkpointing=True),
            "trl": Candidate("trl", {"default": True}), "litgpt": Candidate("litgpt"),
        },
        (Target("transient", OURS, PEFT, 0.25), Target("transient", "ours + checkpointing", PEFT, 0.12)),
        rounds=1, memory=True,
    ),
    "C6-1024": memory(1024),
    "C6-2048": memory(2048),
    "C7": Case(
        "QLoRA: NF4 with quantised scales, r16 on all linear layers, B2 S512",
        {
            OURS: Candidate("ours", NF4, equal_to="peft, NF4"), "peft, bf16 base": Candidate("peft", equal_to=None), "peft, NF4": Candidate("peft", {"quant": "nf4"}, equal_to=None),
            "peft, NF4, prepared": Candidate("peft", {"quant": "nf4", "prepared": True}, equal_to="peft, NF4"),
        },
        (Target("time", OURS, "peft, bf16 base", 0.80), Target("time", OURS, "peft, NF4", 0.75)),
    ),
    "C8": Case(
        "DoRA r16, B2 S512, bf16",
        {OURS: Candidate("ours", DORA), PEFT: loop(**DORA), "ours, LoRA": Candidate("ours", equal_to=None)},
        (Target("time", OURS, PEFT, 0.65), Target("time", OURS, "ours, LoRA", 1.08)),
    ),
    "C15": Case(
        "adapters in the upper half of the layers, against PEFT's in all",
        {OURS: Candidate("ours", {"adapter": "half"}, equal_to="peft, upper half"), PEFT: Candidate("peft", {}, equal_to=None),
         "peft, upper half": Candidate("peft", {"adapter": "half"}, equal_to=None)},
        (speed(PEFT, 1.6),), rounds=5,
    ),
    "rank-64": Case("rank 64", {OURS: MINE, PEFT: THEIRS}, rank=64, rounds=2),
    "rank-256": Case("rank 256", {OURS: MINE, PEFT: THEIRS}, rank=256, rounds=2),
}  # fmt: skip

# run by parts.py: no training step against a peer
PARTS = {
    "C9": "every method of the catalogue beside our LoRA", "C10": "PiSSA's start on 4096 x 4096",
    "C11": "merging 405 M adapted weights in bf16", "C12": "values of a 4096 x 4096 weight in NF4", "C14": "import, first step",
}  # fmt: skip
NOT_THERE = {"C13": "LoRA-GA: the program does not start adapters from gradients yet"}


def card(title: str, candidates: Mapping[str, Candidate], targets: tuple[Target, ...], **changes: object) -> Case:
    settings: dict = dict(shape=LLAMA_8B, micro_batch=1, length=4096, pairwise=True, device="cuda", memory=False)
    return Case(title, candidates, targets, **(settings | changes))


def qlora(recompute: Mapping[str, Mapping[str, Mapping[str, str]]]) -> Candidate:
    return Candidate("ours", {"config": recompute["config"] | NF4["config"]}, equal_to=None)


def beside_bf16(tokens: int, bound: float) -> Case:
    return card(
        f"QLoRA of an 8B shape beside LoRA on bf16, {tokens} tokens, no checkpointing", {OURS: qlora(WITHOUT), "ours, bf16 base": Candidate("ours", WITHOUT, equal_to=None)},
        (speed("ours, bf16 base", bound),), micro_batch=tokens // 4096, drawn=True,
    )  # fmt: skip


LONG = 307_200  # tokens: 300 x 1024
GPU: dict[str, Case] = {
    "G1": card("LoRA r16 of an 8B shape, 16k tokens, no checkpointing", {OURS: Candidate("ours", WITHOUT, equal_to=None)},
               (Target("mfu", OURS, "989 TFLOP/s", 0.55),), micro_batch=4),
    "G2": card("the same with full checkpointing", {OURS: Candidate("ours", FULL, equal_to=None)}, (Target("mfu", OURS, "989 TFLOP/s", 0.38),), micro_batch=4),
    "G3": beside_bf16(4096, 0.93),
    "G3-16k": beside_bf16(16384, 0.97),
    "G3-memory": card("memory of QLoRA of an 8B shape, 4096 tokens, checkpointed", {OURS: qlora(FULL)}, (Target("peak", OURS, "12 GB", 12.0),), memory=True, rounds=1, drawn=True),
    "G4": card("against PEFT + Trainer", {OURS: MINE, "peft + Trainer": Candidate("trainer", equal_to=None)}, (speed("peft + Trainer", 1.6),)),
    "G4-memory": card("memory against PEFT + Trainer", {OURS: MINE, "peft + Trainer": Candidate("trainer", equal_to=None)},
                      (Target("transient", OURS, "peft + Trainer", 0.45),), memory=True, rounds=3),
    "G5": card("against TRL's defaults", {OURS: MINE, "trl": Candidate("trl", {"default": True}, equal_to=None)}, (speed("trl", 2.0),)),
    "G6": card("against Unsloth", {OURS: MINE, "unsloth": Candidate("unsloth", equal_to=None)}, (speed("unsloth", 1.10),)),
    "G7": card("against PEFT with Liger's kernels", {OURS: MINE, "peft, Liger": Candidate("peft", {"liger": True}, equal_to=None)}, (speed("peft, Liger", 1.25),)),
    "G8": card("QLoRA of a 70B shape, 4096 tokens, checkpointed", {OURS: qlora(FULL)}, (Target("mfu", OURS, "989 TFLOP/s", 0.38),), shape=LLAMA_70B, rounds=3, drawn=True),
    "G8-memory": card("memory of the same", {OURS: qlora(FULL)}, (Target("peak", OURS, "50 GB", 50.0),), shape=LLAMA_70B, memory=True, rounds=1, drawn=True),
    "G9": card("one row of 300 x 1024 tokens, QLoRA of an 8B shape, checkpointed", {OURS: qlora(FULL)}, (Target("tokens", OURS, "one card", float(LONG)),),
               shape=replace(LLAMA_8B, positions=2 * LONG), length=LONG, memory=True, rounds=1, drawn=True),
    "G10": card("DoRA against our LoRA", {OURS: Candidate("ours", DORA, equal_to=None), "ours, LoRA": Candidate("ours", equal_to=None)},
                (Target("time", OURS, "ours, LoRA", 1.10),)),
    "G11": card("packing, lognormal lengths, 256 sequences", {OURS: MINE, PEFT: Candidate("peft", {"micro_batch_override": 8}, equal_to=None), "peft, packed": loop(packed=True)},
                (speed(PEFT, 3.5), speed("peft, packed", 1.6)), micro_batch=256, length=512, rows="lognormal"),
}  # fmt: skip
# every candidate of a card's case that does the same work is held to the first peer
GPU = {
    name: replace(case, candidates={n: replace(c, equal_to=next((p for p in case.candidates if p in ("peft + Trainer", "trl", "peft, Liger", "peft, packed")), None))
                                    if n == OURS and c.equal_to else c for n, c in case.candidates.items()})
    for name, case in GPU.items()
}  # fmt: skip
