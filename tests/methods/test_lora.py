"""LoRA and what is made of it, held to PEFT and to the papers' formulas."""

from __future__ import annotations

import peft
import pytest

from tests.peft_twin import held_to_peft

LLAMA = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_lora_is_pefts(fields, tmp_path):
    held_to_peft(peft.LoraConfig(r=4, lora_alpha=8, target_modules=LLAMA, **fields), tmp_path)
