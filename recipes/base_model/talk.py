"""Instruction rows about texts, records and people: reading, JSON, requests, small talk. Each returns the messages of a chat."""

from __future__ import annotations

import json

from recipes.base_model import prose, words
from recipes.base_model.skills import a_word, listed
from recipes.base_model.words import Draw, article, invented, plural

Messages = list[dict[str, str]]


def chat(*turns: str, system: str | None = None) -> Messages:
    """Messages from user and assistant turns that alternate."""
    start = [{"role": "system", "content": system}] if system else []
    return start + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def a_thing(draw: Draw) -> str:
    return invented(draw) if draw.chance(0.15) else draw.pick(words.COUNTABLE)


def a_place(draw: Draw) -> str:
    return invented(draw) if draw.chance(0.15) else draw.pick(words.ROOMS + words.PLACES)


# reading


def read_sentence(draw: Draw) -> Messages:
    """Who did what, where and when; one of them is asked for."""
    name, thing, place = draw.pick(words.NAMES), a_thing(draw), a_place(draw)
    color, day = draw.pick(words.COLORS), draw.pick(words.ALL_DAYS)
    verb, past = draw.pick((("find", "found"), ("lose", "lost"), ("see", "saw"), ("paint", "painted"), ("buy", "bought"), ("hide", "hid")))
    text = draw.pick(
        (
            f"{name} {past} {article(color)} {thing} in the {place} on {day}.",
            f"On {day} {name} {past} {article(color)} {thing} in the {place}.",
            f"In the {place}, {name} {past} {article(color)} {thing} on {day}.",
        )
    )
    question, answer = draw.pick(
        (
            (f"Who {past} the {thing}?", name), (f"What did {name} {verb}?", f"{article(color)} {thing}"),
            (f"Where did {name} {verb} the {thing}?", f"in the {place}"), (f"When did {name} {verb} the {thing}?", f"on {day}"),
            (f"What color was the {thing}?", color), ("Which place is named?", place), ("Which day is named?", day),
        )
    )  # fmt: skip
    return chat(f"{text} {question}", answer)


def read_places(draw: Draw) -> Messages:
    """Several things in several places: the right pair must be found."""
    count = draw.number(2, 3)
    things, places = draw.some(words.COUNTABLE, count), draw.some(words.ROOMS + words.PLACES, count)
    form = draw.pick(("The {} is in the {}.", "There is a {} in the {}.", "You can find the {} in the {}."))
    text = " ".join(form.format(thing, place) for thing, place in zip(things, places, strict=True))
    index = draw.number(0, count - 1)
    if draw.chance(0.6):
        return chat(f"{text} Where is the {things[index]}?", f"in the {places[index]}")
    return chat(f"{text} What is in the {places[index]}?", f"the {things[index]}")


def find_word(draw: Draw) -> Messages:
    """The word after, before or between others."""
    line = [a_word(draw) for _ in range(draw.number(4, 7))]
    index = draw.number(1, len(line) - 2)
    if line.count(line[index]) > 1:
        return find_word(draw)
    which, answer = draw.pick((("after", line[index + 1]), ("before", line[index - 1])))
    return chat(f"Which word comes {which} {line[index]}? {' '.join(line)}", answer)


def change_text(draw: Draw) -> Messages:
    """Edit a sentence as told."""
    name, thing, place = draw.pick(words.NAMES), a_thing(draw), a_place(draw)
    text, old = draw.pick(
        (
            (f"The {thing} is in the {place}.", draw.pick((thing, place))),
            (f"{name} put the {thing} in the {place}.", draw.pick((name, thing, place))),
            (f"{name} likes the {thing}.", draw.pick((name, thing))),
        )
    )
    new = draw.pick(words.NAMES) if old == name else a_thing(draw)
    ask, answer = draw.pick(
        (
            (f"Replace {old} with {new}: {text}", text.replace(old, new)), (f"Change {old} to {new}: {text}", text.replace(old, new)),
            (f"Repeat: {text}", text), (f"Write in capital letters: {text}", text.upper()),
            (f"Put the sentence in quotes: {text}", f'"{text}"'), (f"Write without the dot: {text}", text[:-1]),
            (f"Correct the capital letters: {text.lower()}", text), (f"Remove the word the: {text}", text.replace("the ", "").replace("The ", "")),
        )
    )  # fmt: skip
    return chat(ask, answer)


# records

FIELDS = {
    "name": words.NAMES, "friend": words.NAMES, "city": words.CITIES, "country": words.COUNTRIES, "color": words.COLORS,
    "pet": words.ANIMALS, "job": words.JOBS, "food": words.FOODS, "fruit": words.FRUITS, "day": words.ALL_DAYS,
    "month": words.MONTHS, "place": words.PLACES, "item": words.COUNTABLE, "sport": words.SPORTS, "word": words.WORDS,
    "drink": words.DRINKS, "spot": words.ROOMS, "machine": words.MACHINES,
}  # fmt: skip
COUNTS = ("age", "number", "price", "size", "year", "score")


def record(draw: Draw) -> dict[str, str | int]:
    """Two to four fields with values of their kind."""
    keys = draw.some((*FIELDS, *COUNTS), draw.number(2, 4))
    return {
        key: draw.number(1, 99) if key in COUNTS else invented(draw) if draw.chance(0.1) else draw.pick(FIELDS[key])
        for key in keys
    }


def read_record(draw: Draw) -> Messages:
    values = record(draw)
    key = draw.pick(tuple(values))
    shown = draw.pick((_as_lines, json.dumps, _as_sentence))(values)
    question = draw.pick(("What is the {}?", "Which {} is given?", "Name the {}.")).format(key)
    return chat(f"{shown}\n{question}" if draw.chance(0.5) else f"{question}\n{shown}", str(values[key]))


def write_record(draw: Draw) -> Messages:
    """From one notation to another."""
    values = record(draw)
    source, target = draw.some(tuple(NOTATIONS), 2)
    ask = draw.pick(("Write as {}: {}", "Turn this into {}: {}", "Give me {} for this: {}"))
    return chat(ask.format(target, NOTATIONS[source](values)), NOTATIONS[target](values))


def _as_lines(values: dict) -> str:
    return "\n".join(f"{key}: {value}" for key, value in values.items())


def _as_sentence(values: dict) -> str:
    return listed([f"the {key} is {value}" for key, value in values.items()])


NOTATIONS = {
    "JSON": json.dumps,
    "lines": _as_lines,
    "a sentence": _as_sentence,
    "pairs": lambda values: ", ".join(f"{key}={value}" for key, value in values.items()),
}


# people

REQUESTS = (
    "turn on the {thing}", "turn off the {thing}", "switch on the {thing}", "switch off the {thing}", "open the {thing}",
    "close the {thing}", "clean the {thing}", "move the {thing}", "repair the {thing}", "paint the {thing}", "start the {thing}",
    "stop the {thing}", "check the {thing}", "bring the {thing}", "hide the {thing}", "lock the {thing}", "unlock the {thing}",
    "set the {thing} to {number}", "dim the {thing}", "look at the {thing}", "put the {other} on the {thing}",
)  # fmt: skip

HANDLED = words.MACHINES * 2 + words.FURNITURE + words.CARRIED


def request(draw: Draw) -> Messages:
    """Somebody is asked for a favor and agrees in a whole sentence."""
    things = [invented(draw) if draw.chance(0.15) else draw.pick(HANDLED) for _ in range(2)]
    deed = draw.pick(REQUESTS).format(thing=things[0], other=things[1], number=draw.number(1, 30))
    deed += f" in the {a_place(draw)}" if draw.chance(0.7) else ""
    ask = draw.pick(
        ("Please {}.", "Can you {}?", "Could you {}, please?", "{}, please.", "{}.", "I want you to {}.", "Would you {}?", "Hey, {}!")
    ).format(deed)
    reply = draw.pick(("Sure, I will {}.", "Of course, I will {}.", "Yes, I can {}.")).format(deed)
    return chat(ask[0].upper() + ask[1:], reply)


def greeting(draw: Draw) -> Messages:
    hello = draw.pick(("Hello!", "Hi!", "Hello", "Hi", "Good morning!", "Good evening!", "Hey!"))
    return chat(hello, f"{hello.rstrip('!')}! How can I help you?")


def about_itself(draw: Draw) -> Messages:
    ask, answer = draw.pick(
        (
            (("Who are you?", "What are you?", "Tell me about yourself."), "I am a tiny language model made for demos."),
            (("What can you do?", "How can you help me?"), "I can count, spell, sort lists and answer small questions."),
            (("How are you?", "How do you do?"), "I am fine, thank you."),
            (("Thank you!", "Thanks!", "Thanks a lot."), "You are welcome."),
            (("Goodbye!", "Bye!", "See you."), "Goodbye!"),
        )
    )
    return chat(draw.pick(ask), answer)


def remember(draw: Draw) -> Messages:
    """Something told in one turn is asked for in a later one."""
    name, color, animal, city = draw.pick(words.NAMES), draw.pick(words.COLORS), draw.pick(words.ANIMALS), draw.pick(words.CITIES)
    told, reply, ask, answer = draw.pick(
        (
            (f"My name is {name}.", f"Nice to meet you, {name}.", "What is my name?", f"Your name is {name}."),
            (f"I live in {city}.", f"{city} is a nice place.", "Where do I live?", f"You live in {city}."),
            (f"I have {article(animal)}.", "That is nice.", "Which animal do I have?", f"You have {article(animal)}."),
            (f"My favorite color is {color}.", f"I like {color} too.", "What is my favorite color?", f"Your favorite color is {color}."),
        )
    )  # fmt: skip
    return chat(told, reply, ask, answer)


def told_by_system(draw: Draw) -> Messages:
    """The system message sets a name, a style or a fact."""
    name, word, city = draw.pick(words.NAMES), a_word(draw), draw.pick(words.CITIES)
    system, ask, answer = draw.pick(
        (
            (f"Your name is {name}.", "What is your name?", f"My name is {name}."),
            (f"You are {name}.", "Who are you?", f"I am {name}."), (f"You live in {city}.", "Where do you live?", f"I live in {city}."),
            (f"The secret word is {word}.", "What is the secret word?", f"The secret word is {word}."),
            ("Answer in capital letters.", f"Say {word}.", word.upper()), ("Answer in quotes.", f"Say {word}.", f'"{word}"'),
            ("Be short.", f"Repeat: {word}", word), ("You are a helpful assistant.", f"Repeat: {word}", word),
        )
    )  # fmt: skip
    return chat(ask, answer, system=system)


# knowledge and writing


def knowledge(draw: Draw) -> Messages:
    country, capital = draw.pick(tuple(words.CAPITALS.items()))
    animal, sound = draw.pick(tuple(words.SOUNDS.items()))
    thing, color = draw.pick(tuple(words.COLOR_OF.items()))
    job, place = draw.pick(tuple(words.JOB_PLACE.items()))
    who, home = draw.pick(tuple(words.HOME_OF.items()))
    day, month = draw.number(0, 6), draw.number(0, 11)
    ask, answer = draw.pick(
        (
            (f"What is the capital of {country}?", capital), (f"{capital} is the capital of which country?", country),
            (f"What does {article(animal)} do?", f"{article(animal).capitalize()} {sound}."), (f"What color is {thing}?", color),
            (f"Where does {article(job)} work?", f"in the {place}"), (f"Where does {article(who)} live?", f"in the {home}"),
            (f"Which day comes after {words.ALL_DAYS[day]}?", words.ALL_DAYS[(day + 1) % 7]),
            (f"Which day comes before {words.ALL_DAYS[day]}?", words.ALL_DAYS[day - 1]),
            (f"Which month comes after {words.MONTHS[month]}?", words.MONTHS[(month + 1) % 12]),
        )
    )  # fmt: skip
    return chat(ask, answer)


def write(draw: Draw) -> Messages:
    """A sentence or a story about what is asked for."""
    animal, place, name, thing = draw.pick(words.ANIMALS), draw.pick(words.PLACES), draw.pick(words.NAMES), draw.pick(words.CARRIED)
    adjective, color = draw.pick(words.ADJECTIVES), draw.pick(words.COLORS)
    ask, answer = draw.pick(
        (
            (f"Write a sentence about {article(animal)}.", f"The {adjective} {animal} lives near the {place}."),
            (f"Write a sentence about {article(thing)}.", f"{name} has {article(color)} {thing}."),
            (f"Write a sentence with {name} and {thing}.", f"{name} found {article(color)} {thing} in the {place}."),
            (f"Write a sentence with the words {animal} and {place}.", f"The {animal} slept in the {place}."),
            (f"Make a sentence: {name}, {thing}, {place}", f"{name} has {article(thing)} in the {place}."),
            (f"Where are the {plural(thing)}?", "I do not know."), (f"How many {plural(thing)} do I have?", "I do not know."),
            ("Tell me a story.", prose.story(draw)), ("Tell me a fact.", prose.fact(draw)), ("Describe a room.", prose.description(draw)),
        )
    )  # fmt: skip
    return chat(ask, answer)


# kind of chat -> how often it is drawn
TALK = {
    read_sentence: 3.0, read_places: 2.0, find_word: 1.2, change_text: 2.0, read_record: 2.0, write_record: 3.0,
    request: 2.5, greeting: 0.3, about_itself: 0.4, remember: 0.7, told_by_system: 1.2, knowledge: 1.5, write: 1.2,
}  # fmt: skip
