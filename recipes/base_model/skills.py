"""Instruction rows about numbers, letters, words and lists. A skill draws one row; its answer is computed, never looked up."""

from __future__ import annotations

from recipes.base_model import words
from recipes.base_model.words import Draw, article, invented, plural

Row = tuple[str, str]  # what the user asks, what the assistant answers
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def listed(items: list[str]) -> str:
    """`lamp, door and key`."""
    return ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else items[0]


def a_word(draw: Draw) -> str:
    """Mostly a real word, sometimes an invented one, so that copying does not lean on meaning."""
    return invented(draw) if draw.chance(0.25) else draw.pick(words.WORDS)


def some_words(draw: Draw, low: int = 3, high: int = 5) -> list[str]:
    pool = words.WORDS if draw.chance(0.6) else words.NAMES if draw.chance(0.4) else words.COUNTABLE
    return draw.some(pool, draw.number(low, high))


# numbers


def add(draw: Draw) -> Row:
    high = draw.pick((10, 20, 50, 100))
    a, b = draw.number(0, high), draw.number(0, high)
    ask = draw.pick(("What is {} + {}?", "{} + {} =", "Add {} and {}.", "How much is {} plus {}?", "Calculate {} + {}."))
    return ask.format(a, b), str(a + b)


def subtract(draw: Draw) -> Row:
    high = draw.pick((10, 20, 50, 100))
    a, b = sorted((draw.number(0, high), draw.number(0, high)), reverse=True)
    ask = draw.pick(("What is {} - {}?", "{} - {} =", "How much is {} minus {}?", "Calculate {} - {}."))
    return ask.format(a, b), str(a - b)


def multiply(draw: Draw) -> Row:
    a, b = draw.number(0, 12), draw.number(0, 12)
    ask = draw.pick(("What is {} * {}?", "{} * {} =", "How much is {} times {}?", "Multiply {} by {}."))
    return ask.format(a, b), str(a * b)


def divide(draw: Draw) -> Row:
    a, b = draw.number(1, 12), draw.number(1, 12)
    ask = draw.pick(("What is {} / {}?", "{} / {} =", "How much is {} divided by {}?", "Divide {} by {}."))
    return ask.format(a * b, b), str(a)


def compare(draw: Draw) -> Row:
    a, b = draw.some(range(100), 2)
    if draw.chance(0.5):
        return draw.pick(("Which number is larger, {} or {}?", "Which is more, {} or {}?")).format(a, b), str(max(a, b))
    return draw.pick(("Which number is smaller, {} or {}?", "Which is less, {} or {}?")).format(a, b), str(min(a, b))


def parity(draw: Draw) -> Row:
    number = draw.number(0, 99)
    kind = draw.pick(("even", "odd"))
    return f"Is {number} {kind}?", "Yes." if (number % 2 == 0) == (kind == "even") else "No."


def neighbor(draw: Draw) -> Row:
    number = draw.number(1, 99)
    if draw.chance(0.5):
        return draw.pick((f"What number comes after {number}?", f"What is one more than {number}?")), str(number + 1)
    return draw.pick((f"What number comes before {number}?", f"What is one less than {number}?")), str(number - 1)


def count_up(draw: Draw) -> Row:
    start, length, step = draw.number(0, 40), draw.number(3, 8), draw.pick((1, 1, 2, 5, 10))
    numbers = [str(start + step * i) for i in range(length)]
    if step == 1 and draw.chance(0.5):
        return f"Count from {numbers[0]} to {numbers[-1]}.", ", ".join(numbers)
    shown = numbers[:3] if length > 3 else numbers[:2]
    return f"Which number comes next: {', '.join(shown)}?", numbers[len(shown)]


def number_word(draw: Draw) -> Row:
    number = draw.number(0, 20)
    if draw.chance(0.5):
        return f"Write {number} as a word.", words.NUMBERS[number]
    return f"Write {words.NUMBERS[number]} as a number.", str(number)


def word_problem(draw: Draw) -> Row:
    name, other = draw.some(words.NAMES, 2)
    things = plural(draw.pick(words.CARRIED))
    a, b = draw.number(2, 30), draw.number(2, 20)
    if draw.chance(0.5):
        event, total = draw.pick(("finds {} more", "buys {} more", "gets {} more from {}")), a + b
    else:
        a, b = max(a, b), min(a, b)
        event, total = draw.pick(("loses {}", "sells {}", "gives {} to {}")), a - b
    story = f"{name} has {a} {things} and {event.format(b, other)}."
    return f"{story} How many {things} does {name} have now?", str(total)


# letters


def spell(draw: Draw) -> Row:
    word = a_word(draw)
    ask = draw.pick(("Spell the word {}.", "How do you spell {}?", "Write {} letter by letter."))
    return ask.format(word), "-".join(word)


def unspell(draw: Draw) -> Row:
    word = a_word(draw)
    return draw.pick(("Which word is spelled {}?", "Put the letters together: {}")).format("-".join(word)), word


def one_letter(draw: Draw) -> Row:
    word = a_word(draw)
    which, letter = draw.pick((("first", word[0]), ("last", word[-1])))
    return draw.pick(("What is the {} letter of {}?", "Name the {} letter of the word {}.")).format(which, word), letter


def count_letters(draw: Draw) -> Row:
    word = draw.pick(words.WORDS)
    return draw.pick(("How many letters are in {}?", "Count the letters of the word {}.")).format(word), str(len(word))


def starts_with(draw: Draw) -> Row:
    word = a_word(draw)
    letter = word[0] if draw.chance(0.5) else draw.pick(LETTERS)
    return f"Does the word {word} begin with {letter}?", "Yes." if word[0] == letter else "No."


def capitals(draw: Draw) -> Row:
    word = a_word(draw)
    if draw.chance(0.5):
        return draw.pick(("Write {} in capital letters.", "Put {} in upper case.")).format(word), word.upper()
    return draw.pick(("Write {} in small letters.", "Put {} in lower case.")).format(word.upper()), word


def backwards(draw: Draw) -> Row:
    word = draw.pick([word for word in words.WORDS if len(word) <= 5])
    return draw.pick(("Write {} backwards.", "Reverse the letters of {}.")).format(word), word[::-1]


def alphabet(draw: Draw) -> Row:
    start = draw.number(0, 20)
    if draw.chance(0.5):
        return f"Which letter comes after {LETTERS[start]}?", LETTERS[start + 1]
    end = start + draw.number(2, 5)
    return f"Say the letters from {LETTERS[start]} to {LETTERS[end]}.", " ".join(LETTERS[start : end + 1])


# words


def copy(draw: Draw) -> Row:
    if draw.chance(0.4):
        text = " ".join(a_word(draw) for _ in range(draw.number(2, 6)))
    else:
        text = a_word(draw)
    return draw.pick(("Repeat: {}", "Say {}", "Copy this: {}", "Write {} again.")).format(text), text


def quote(draw: Draw) -> Row:
    word = a_word(draw)
    ask, form = draw.pick(
        (
            ("Put {} in quotes.", '"{}"'), ("Write {} between quotation marks.", '"{}"'),
            ("Put {} in brackets.", "({})"), ("Write {} between square brackets.", "[{}]"),
            ("Put a star before {}.", "*{}"), ("Write {} twice.", "{0} {0}"), ("Write {} three times.", "{0} {0} {0}"),
            ("Write {} with an exclamation mark.", "{}!"), ("Put {} between stars.", "*{}*"),
        )
    )  # fmt: skip
    return ask.format(word), form.format(word)


def unquote(draw: Draw) -> Row:
    chosen, *others = [a_word(draw) for _ in range(draw.number(2, 5))]
    line = [*others]
    line.insert(draw.number(0, len(others)), f'"{chosen}"')
    return f"Which word is in quotes? {' '.join(line)}", chosen


def join_two(draw: Draw) -> Row:
    first, second = a_word(draw), a_word(draw)
    ask, form = draw.pick(
        (
            ("Join {} and {} with a dash.", "{}-{}"), ("Join {} and {} with an underscore.", "{}_{}"),
            ("Join {} and {} with a slash.", "{}/{}"), ("Join {} and {} with a plus sign.", "{}+{}"),
            ("Swap {} and {}.", "{1} {0}"), ("Write {} and {} on two lines.", "{}\n{}"),
        )
    )  # fmt: skip
    return ask.format(first, second), form.format(first, second)


def opposite(draw: Draw) -> Row:
    left, right = draw.pick(tuple(words.OPPOSITES.items()))
    left, right = (left, right) if draw.chance(0.5) else (right, left)
    return draw.pick(("What is the opposite of {}?", "Name the opposite of {}.")).format(left), right


def make_plural(draw: Draw) -> Row:
    noun = draw.pick(words.COUNTABLE)
    if draw.chance(0.3):
        return f"What is one of the {plural(noun)} called?", article(noun)
    return draw.pick(("What is the plural of {}?", "One {}, two ...", "Write the plural of {}.")).format(noun), plural(noun)


def past_tense(draw: Draw) -> Row:
    verb, past = draw.pick(tuple(words.PAST.items()))
    return draw.pick(("What is the past tense of {}?", "Put the verb {} in the past.")).format(verb), past


def add_article(draw: Draw) -> Row:
    noun = draw.pick(words.COUNTABLE)
    return draw.pick(("Put a or an before {}.", "Is it a {0} or an {0}?")).format(noun), article(noun)


def is_a(draw: Draw) -> Row:
    kind = draw.pick(tuple(words.CATEGORIES))
    word = draw.pick(words.CATEGORIES[kind if draw.chance(0.5) else draw.pick(tuple(words.CATEGORIES))])
    yes = word in words.CATEGORIES[kind]
    return f"Is {word} {article(kind)}?", "Yes." if yes else "No."


def what_kind(draw: Draw) -> Row:
    kind = draw.pick([kind for kind in words.CATEGORIES if kind != "color"])
    word = draw.pick(words.CATEGORIES[kind])
    if draw.chance(0.6):
        return draw.pick((f"What is {article(word)}?", f"What kind of thing is {article(word)}?")), f"{article(word)} is {article(kind)}.".capitalize()
    others = [draw.pick(words.CATEGORIES[k]) for k in draw.some([k for k in words.CATEGORIES if k != kind], 2)]
    line = [*others]
    line.insert(draw.number(0, 2), word)
    return f"Which of these is {article(kind)}: {', '.join(line)}?", word


# lists


def pick_item(draw: Draw) -> Row:
    items = some_words(draw)
    places = [*words.ORDINALS[: len(items)], "last"]
    place = draw.pick(places)
    item = items[-1] if place == "last" else items[words.ORDINALS.index(place)]
    ask = draw.pick(("What is the {} word: {}?", "Name the {} item of this list: {}", "Which word is {}? {}"))
    return ask.format(place, ", ".join(items)), item


def reverse_list(draw: Draw) -> Row:
    items = some_words(draw)
    ask = draw.pick(("Reverse the list: {}", "Write these words in reverse order: {}"))
    return ask.format(", ".join(items)), ", ".join(items[::-1])


def sort_list(draw: Draw) -> Row:
    if draw.chance(0.5):
        numbers = draw.some(range(100), draw.number(3, 5))
        return f"Sort the numbers: {', '.join(map(str, numbers))}", ", ".join(map(str, sorted(numbers)))
    items = some_words(draw, 3, 4)
    return f"Sort by alphabet: {', '.join(items)}", ", ".join(sorted(items))


def count_items(draw: Draw) -> Row:
    items = some_words(draw, 2, 7)
    return draw.pick(("How many words are in this list: {}?", "Count the items: {}")).format(", ".join(items)), str(len(items))


def change_list(draw: Draw) -> Row:
    items = some_words(draw, 3, 5)
    shown, one = ", ".join(items), draw.pick(items)
    if draw.chance(0.4):
        rest = ", ".join(item for item in items if item != one)
        return draw.pick((f"Remove {one} from the list: {shown}", f"Take {one} away: {shown}")), rest
    new = a_word(draw)
    if draw.chance(0.5):
        return draw.pick((f"Add {new} to the list: {shown}", f"Put {new} at the end: {shown}")), f"{shown}, {new}"
    changed = ", ".join(new if item == one else item for item in items)
    return draw.pick((f"Replace {one} with {new}: {shown}", f"Change {one} to {new}: {shown}")), changed


def format_list(draw: Draw) -> Row:
    items = some_words(draw)
    given = draw.pick((", ".join(items), " ".join(items), listed(items)))
    ask, answer = draw.pick(
        (
            ("Write one word per line: {}", "\n".join(items)), ("Make a list with dashes: {}", "\n".join(f"- {i}" for i in items)),
            ("Number these words: {}", "\n".join(f"{n}. {i}" for n, i in enumerate(items, 1))),
            ("Write with slashes: {}", "/".join(items)), ("Write with commas: {}", ", ".join(items)),
            ("Put the words in square brackets: {}", "[" + ", ".join(f'"{i}"' for i in items) + "]"),
            ("Put each word in quotes: {}", " ".join(f'"{i}"' for i in items)),
            ("Make a sentence part with and: {}", listed(items)),
        )
    )  # fmt: skip
    return ask.format(given), answer


def in_list(draw: Draw) -> Row:
    items = some_words(draw, 3, 6)
    one = draw.pick(items) if draw.chance(0.5) else draw.pick(words.WORDS)
    return f"Is {one} in this list: {', '.join(items)}?", "Yes." if one in items else "No."


# skill -> how often it is drawn
SKILLS = {
    add: 3.0, subtract: 2.5, multiply: 1.5, divide: 1.0, compare: 1.0, parity: 0.5, neighbor: 0.7, count_up: 1.0,
    number_word: 0.4, word_problem: 1.5, spell: 2.0, unspell: 1.0, one_letter: 1.2, count_letters: 0.8,
    starts_with: 0.6, capitals: 1.5, backwards: 0.8, alphabet: 0.5, copy: 3.0, quote: 2.5, unquote: 1.2, join_two: 2.0,
    opposite: 0.8, make_plural: 1.2, past_tense: 0.8, add_article: 0.5, is_a: 0.8, what_kind: 1.2, pick_item: 2.0,
    reverse_list: 1.5, sort_list: 1.2, count_items: 0.8, change_list: 2.0, format_list: 2.5, in_list: 0.8,
}  # fmt: skip
