"""Methods that are LoRA with something over time. Each is a setting of the schedule, and goes with any change that merges."""

METHODS = {
    "relora": {
        "choices": {"delta": "lora", "schedule.name": "relora"},
        "paper": "arXiv:2307.05695",
        "formula": "every K steps: W ← W + s·BA, A ~ KU, B = 0, moments zeroed, rate re-warmed",
        "small": {"rank": 2},
        "note": "The optimizer's step count goes on, as in the authors' code. Their embeddings, norms and head are trained too: name them in modules_to_save. Merge and reset of moments have one period here, theirs can have two. Their other resets empty 99.9 % or a share of the moments; ours empties the same entries of mean and square.",
    },
    "plora": {
        "choices": {"delta": "lora", "schedule.name": "plora", "schedule.moments": "forget", "schedule.restart": True},
        "paper": "arXiv:2402.16141",
        "formula": "at the end of a stage: W ← W + (1 − m)·s·BA; A ~ KU, B = 0 for m = 0, else B ← m·B; optimizer and rate begin anew",
        "small": {"rank": 2},
        "note": "The authors' formula for the momentum could not be found; m is ours, keeps the function exact, and is 0 unless set.",
    },
    "delta_lora": {
        "choices": {"delta": "lora", "schedule.name": "delta_lora"},
        "paper": "arXiv:2309.02411",
        "formula": "after K steps: W ← W + λ·s·(B'A' − BA) with each step from (A, B) to (A', B')",
        "small": {"rank": 2},
        "note": "No dropout, as in the paper. A base in a short type carries what rounding leaves of each step.",
    },
}
