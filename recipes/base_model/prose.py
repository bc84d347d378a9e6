"""Plain text: small stories, descriptions, notes and facts, made of sentences whose words are drawn and agree with each other."""

from __future__ import annotations

from recipes.base_model import words
from recipes.base_model.skills import a_word, listed, some_words
from recipes.base_model.words import Draw, article, plural

MOODS = ("happy", "sad", "tired", "hungry", "proud", "angry", "lonely", "curious", "calm", "cheerful")
WEATHER = ("sunny", "rainy", "windy", "cold", "warm", "foggy", "snowy", "stormy", "cloudy", "bright")
TIMES = ("morning", "afternoon", "evening", "night", "weekend", "summer", "winter", "autumn", "spring")


def sentence(draw: Draw) -> str:
    """One statement about somebody or something."""
    name, noun, other = draw.pick(words.NAMES), draw.pick(words.CARRIED), draw.pick(words.COUNTABLE)
    place, color, adjective = draw.pick(words.PLACES + words.ROOMS), draw.pick(words.COLORS), draw.pick(words.ADJECTIVES)
    job, animal, day = draw.pick(words.JOBS), draw.pick(words.ANIMALS), draw.pick(words.ALL_DAYS)
    return draw.pick(
        (
            "{name} found {a_color} {noun} in the {place}.", "{name} put the {noun} near the {other}.",
            "The {adjective} {animal} slept in the {place}.", "On {day}, {name} went to the {place}.",
            "{name} is {a_job} and works in the {place}.", "The {other} in the {place} is {color}.",
            "{name} has {a_adjective} {animal}.", "There is {a_other} in the {place}.",
            "Every {day} {name} cleans the {place}.", "The {job} gave {name} {a_noun}.",
            "{name} was looking for the {noun} in the {place}.", "It was a {weather} {time} in the {place}.",
            "The {noun} belongs to {name}.", "{name} likes the {color} {other}.",
            "The {animal} ran from the {place} to the {other}.", "{name} bought {a_noun} on {day}.",
            "Nobody saw the {animal} behind the {other}.", "{name} felt {mood} because the {noun} was gone.",
        )
    ).format(
        name=name, noun=noun, other=other, place=place, color=color, adjective=adjective, job=job, animal=animal, day=day,
        a_color=article(color), a_job=article(job), a_adjective=article(adjective), a_other=article(other),
        a_noun=article(noun), weather=draw.pick(WEATHER), time=draw.pick(TIMES), mood=draw.pick(MOODS),
    )  # fmt: skip


def story(draw: Draw) -> str:
    """Somebody misses a thing, looks for it in two places, and finds it with a friend's help."""
    name, friend = draw.some(words.NAMES, 2)
    animal, thing, color = draw.pick(words.ANIMALS), draw.pick(words.CARRIED), draw.pick(words.COLORS)
    first, second, home = draw.some(words.PLACES + words.ROOMS, 3)
    opening = draw.pick(
        (
            f"Once upon a time there was {article(animal)} called {name}.", f"{name} lived near the {home}.",
            f"One {draw.pick(WEATHER)} {draw.pick(TIMES)} {name} left the {home}.", f"{name} was {article(draw.pick(words.JOBS))} in the {home}.",
        )
    )  # fmt: skip
    wish = draw.pick(
        (
            f"{name} had {article(color)} {thing} and loved it very much.", f"{name} had lost {article(color)} {thing}.",
            f"{name} wanted to give {article(color)} {thing} to {friend}.",
        )
    )  # fmt: skip
    search = draw.pick(
        (
            f"First {name} looked in the {first}, but the {thing} was not there.",
            f"One day the {thing} was gone. {name} looked in the {first} and found nothing.",
            f'"Where is my {thing}?" asked {name}. It was not in the {first}.',
        )
    )
    turn = draw.pick(
        (
            f"Then {friend} came and said, \"Look in the {second}!\"", f"{friend} had seen the {thing} in the {second}.",
            f'"I can help you," said {friend}. Together they went to the {second}.',
        )
    )  # fmt: skip
    end = draw.pick(
        (
            f"There was the {color} {thing}, and {name} was {draw.pick(('happy', 'proud', 'calm', 'cheerful'))} again.",
            f"They found the {thing} in the {second} and went home.",
            f"The {color} {thing} was in the {second}. {name} thanked {friend}.",
        )
    )
    return " ".join((opening, wish, search, turn, end))


def description(draw: Draw) -> str:
    """What is in a room, then what one sees."""
    room, name = draw.pick(words.ROOMS), draw.pick(words.NAMES)
    things, colors = draw.some(words.COUNTABLE, 3), draw.some(words.COLORS, 2)
    return (
        f"In the {room} there is {listed([article(thing) for thing in things])}. The {things[0]} is {colors[0]} and the "
        f"{things[1]} is {colors[1]}. {name} put the {things[2]} next to the {things[draw.number(0, 1)]}."
    )


def note(draw: Draw) -> str:
    """A short letter."""
    name, friend = draw.some(words.NAMES, 2)
    place, day, thing = draw.pick(words.PLACES), draw.pick(words.ALL_DAYS), draw.pick(words.CARRIED)
    return (
        f"Dear {friend},\n{draw.pick(('I hope you are well.', 'Thank you for your letter.', 'How are you?'))} "
        f"On {day} I will go to the {place}. Please bring {article(thing)}. "
        f"{draw.pick(('See you soon!', 'I am looking forward to it.', 'Do not be late.'))}\nYours, {name}"
    )


def dialogue(draw: Draw) -> str:
    """Two people talk about where a thing is."""
    name, friend = draw.some(words.NAMES, 2)
    thing, place, other = draw.pick(words.CARRIED), draw.pick(words.ROOMS), draw.pick(words.COUNTABLE)
    color = draw.pick(words.COLORS)
    return (
        f'"Have you seen my {thing}?" asked {name}. "What color is it?" asked {friend}. "It is {color}." '
        f'"The {color} {thing} is in the {place}, near the {other}," said {friend}. "Thank you!" said {name}.'
    )


def fact(draw: Draw) -> str:
    """One thing that is so."""
    country, capital = draw.pick(tuple(words.CAPITALS.items()))
    animal, sound = draw.pick(tuple(words.SOUNDS.items()))
    thing, color = draw.pick(tuple(words.COLOR_OF.items()))
    job, place = draw.pick(tuple(words.JOB_PLACE.items()))
    left, right = draw.pick(tuple(words.OPPOSITES.items()))
    who, home = draw.pick(tuple(words.HOME_OF.items()))
    kind = draw.pick(tuple(words.CATEGORIES))
    member = draw.pick(words.CATEGORIES[kind])
    day, month = draw.number(0, 6), draw.number(0, 11)
    verb, past = draw.pick(tuple(words.PAST.items()))
    noun = draw.pick(words.COUNTABLE)
    a, b = draw.number(0, 50), draw.number(0, 50)
    return draw.pick(
        (
            f"{capital} is the capital of {country}.", f"The capital of {country} is {capital}.",
            f"{article(animal).capitalize()} {sound}.", f"The color of {thing} is {color}.",
            f"{article(job).capitalize()} works in the {place}.", f"The opposite of {left} is {right}.",
            f"{article(who).capitalize()} lives in the {home}.", f"{article(member).capitalize()} is {article(kind)}.",
            f"After {words.ALL_DAYS[day]} comes {words.ALL_DAYS[(day + 1) % 7]}.",
            f"After {words.MONTHS[month]} comes {words.MONTHS[(month + 1) % 12]}.",
            f"Today I {verb}, yesterday I {past}.", f"One {noun}, two {plural(noun)}.", f"{a} + {b} = {a + b}.",
            f"{max(a, b)} - {min(a, b)} = {abs(a - b)}.",
        )
    )  # fmt: skip


def facts(draw: Draw) -> str:
    return " ".join(fact(draw) for _ in range(draw.number(3, 8)))


def sentences(draw: Draw) -> str:
    return " ".join(sentence(draw) for _ in range(draw.number(3, 6)))


def lines(draw: Draw) -> str:
    """A list as people keep them: for shopping, for packing, of numbers."""
    title = draw.pick(("Shopping list", "To buy", "In my bag", "My words", "Things to remember"))
    return f"{title}:\n" + "\n".join(f"- {item}" for item in some_words(draw, 3, 7))


def drill(draw: Draw) -> str:
    """The same words again and again in several notations. Copying from earlier text is learned here first."""
    items = some_words(draw, 3, 8) if draw.chance(0.5) else [a_word(draw) for _ in range(draw.number(3, 8))]
    notations = (
        ", ".join(items), " ".join(items), "\n".join(items), "\n".join(f"- {item}" for item in items), "/".join(items),
        ", ".join(f'"{item}"' for item in items), listed(items), " ".join(f"({item})" for item in items),
    )  # fmt: skip
    return "\n".join(draw.pick(notations) for _ in range(draw.number(2, 5)))


# kind of text -> how often it is drawn
PROSE = {
    drill: 8.0, story: 3.0, description: 1.5, note: 1.0, dialogue: 1.5, facts: 1.5, sentences: 2.5, lines: 0.7,
}  # fmt: skip
