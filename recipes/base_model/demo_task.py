"""The bundled demo task: a request in plain English becomes a terse command. No word of an evaluation device or room is in a training row.

    Could you turn off the desk lamp in the studio?  ->  action: turn_off, device: desk lamp, room: studio

The base model has met every word in other texts and agrees to such requests in a whole sentence; it has never seen a
request answered this way. Words keep the space before them, so that they are the same tokens in question and answer.
Every token of the task occurs in the corpus: an adapter moves no embeddings, and tokens that pretraining never met all
have nearly the same one, so that the model could hardly tell them apart.
"""

from __future__ import annotations

import json
from pathlib import Path

from recipes.base_model import words
from recipes.base_model.words import Draw

SEED = 7
NUM_TRAIN = 1600
NUM_EVAL = 150

OPENED = words.split("gate window door skylight shutter curtain blind awning garage_door")
LIGHTS = words.split("""
    lamp lantern chandelier spotlight ceiling_light floor_lamp reading_lamp night_light desk_lamp
""")
WARM = words.split("heater radiator oven boiler thermostat water_heater air_conditioner fireplace heat_pump")
SWITCHED = tuple(machine for machine in words.MACHINES if machine not in (*OPENED, "doorbell", "aquarium"))
INDOORS = tuple(room for room in words.ROOMS if room not in ("terrace", "balcony", "porch", "veranda", "staircase"))

EVAL_DEVICES = words.split("""
    shutter awning lantern chandelier spotlight radiator boiler fan freezer toaster blender projector printer vacuum
    humidifier sprinkler treadmill rice_cooker juicer
""")
EVAL_ROOMS = words.split("""
    attic bathroom library pantry studio lobby nursery stable cabin greenhouse gallery archive ballroom kiosk
""")

# what is said -> action; {} stands for the device
TURNED = {"turn on the {}": "turn_on", "turn off the {}": "turn_off", "switch on the {}": "turn_on", "switch off the {}": "turn_off",
          "turn the {} on": "turn_on", "turn the {} off": "turn_off"}  # fmt: skip
MOVED = {"open the {}": "open", "close the {}": "close", "shut the {}": "close", "lock the {}": "lock", "unlock the {}": "unlock"}
SET = {"set the {} to {value} degrees": "set"}
DIMMED = {"dim the {} to {value}": "dim"}
FRAMES = (
    "Please {}.", "{}.", "{}, please.", "Could you {}?", "Can you {}, please?", "Would you {}?", "I want you to {}.",
    "I would like you to {}.", "Hey, {}!", "{}, thank you.", "We need you to {}.",
)  # fmt: skip

ROOM_FIRST = ("In the {}, please {}.", "In the {}, {}.", "In the {}, could you {}?")


def command(draw: Draw, devices: tuple[str, ...], rooms: tuple[str, ...]) -> dict[str, str]:
    """One row: `prompt` and `completion`."""
    device, room = draw.pick(devices), draw.pick(rooms)
    deeds = MOVED if device in OPENED else TURNED
    if device in LIGHTS and draw.chance(0.4):
        deeds = DIMMED
    if device in WARM and draw.chance(0.4):
        deeds = SET
    said = draw.pick(tuple(deeds))
    value = draw.number(10, 99)
    answer = {"action": deeds[said], "device": device, "room": room}
    if "{value}" in said:
        answer["number"] = str(value)
    deed = said.format(device, value=value)
    if draw.chance(0.2):
        prompt = draw.pick(ROOM_FIRST).format(room, deed)
    else:
        prompt = draw.pick(FRAMES).format(f"{deed} in the {room}")
    return {"prompt": prompt[0].upper() + prompt[1:], "completion": ", ".join(f"{key}: {text}" for key, text in answer.items())}


def rows_of(name: str, count: int, devices: tuple[str, ...], rooms: tuple[str, ...]) -> list[dict[str, str]]:
    """`count` rows with different prompts."""
    found: dict[str, dict[str, str]] = {}
    draw = Draw(f"{SEED}/{name}")
    while len(found) < count:
        row = command(draw, devices, rooms)
        found.setdefault(row["prompt"], row)
    return list(found.values())


def build() -> dict[str, list[dict[str, str]]]:
    """The rows of train.jsonl and eval.jsonl."""
    held_out = {word for name in EVAL_DEVICES + EVAL_ROOMS for word in name.split()}
    devices, rooms = (
        tuple(name for name in names if not held_out & set(name.split())) for names in (SWITCHED + OPENED, INDOORS)
    )
    return {
        "train": rows_of("train", NUM_TRAIN, devices, rooms),
        "eval": rows_of("eval", NUM_EVAL, EVAL_DEVICES, EVAL_ROOMS),
    }


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in build().items():
        text = "".join(json.dumps(row) + "\n" for row in split)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).parents[2] / "deltune" / "data" / "bundled")
