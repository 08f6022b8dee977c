"""The synthetic text the bundled tiny model is trained on.

Everything is drawn from short word lists and rules in this file with a seeded generator: arithmetic, copying,
reversing, sorting, counting, look-ups and small questions, as plain lines and as chat turns. The same seed gives
the same text. Nothing is downloaded and no file is read. This module knows neither the tokenizer nor the model.

One well-known word game is kept out on purpose, as it serves as the fine-tuning demonstration: its name never
occurs, and no word here gets the ending that the game adds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
THINK_START = "<think>"
THINK_END = "</think>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, THINK_START, THINK_END)

DEFAULT_DOCUMENTS = 110_000


class Segment(NamedTuple):
    """A stretch of text; `graded` marks what follows from the text before it and so deserves most of the loss."""

    text: str
    graded: bool


Document = tuple[Segment, ...]


class Example(NamedTuple):
    """One exercise, in a form that both the plain and the chat layouts can show."""

    label: str
    given: str
    question: str
    answer: str
    reasoning: str = ""


Task = Callable[[random.Random], Example]


def _split(words: str) -> list[str]:
    return words.split()


ANIMALS = _split("dog cat cow pig hen fox bear lion wolf frog goat mouse horse sheep bird fish owl bee ant snake")
COLORS = _split("red blue green black white brown pink gray gold orange purple yellow")
FOODS = _split("apple bread cake rice soup milk egg cheese pear plum corn bean honey lemon grape")
THINGS = _split(
    "box cup hat ball book door bed chair table lamp ring key map pen coat boat car train road tree leaf rock "
    "hill lake river house room wall bell drum kite rope sand star moon sun rain snow wind fire stone bag shoe"
)
PLACES = _split("garden forest kitchen school market beach farm park city village")
NAMES = _split("Ann Ben Cara Dan Eve Finn Gus Hana Ivo Jill Kai Lena Max Nora Omar Pia Rosa Sam Tom Uma")
ADJECTIVES = _split("big small old new fast slow hot cold soft hard happy sad dark light long short tall kind wet dry")
VERBS = _split("run walk jump eat sleep sing read write play swim look find make take give help call open close wait")
PLAIN_WORDS = _split(
    "time day year way hand part place work week point home water money story fact month lot right study night word "
    "life head side power line end game law name idea body back face level office health person art war party "
    "music paper space group team air force girl boy man woman child world family friend mother father hour door"
)
WORDS = tuple(dict.fromkeys(ANIMALS + COLORS + FOODS + THINGS + PLACES + ADJECTIVES + VERBS + PLAIN_WORDS))

OPPOSITES = (
    "big small|hot cold|fast slow|old new|hard soft|happy sad|dark light|long short|wet dry|up down|left right|"
    "day night|open close|good bad|high low|full empty|in out|yes no|first last|give take"
)
SOUNDS = "dog woof|cat meow|cow moo|pig oink|sheep baa|bee buzz|lion roar|snake hiss|owl hoot|wolf howl|hen cluck"
FACT_COLORS = "sky blue|grass green|snow white|blood red|coal black|lemon yellow|sun gold|leaf green|night black"
RHYMES = (
    "cat hat mat bat rat|dog log fog hog|box fox ox|bell well tell sell|cake lake make take bake|ring sing king wing|"
    "rain train pain gain|moon soon noon spoon|tree bee see free|night light right fight|book look cook hook|"
    "red bed fed led|hot pot dot not|sun run fun bun|car star far bar|goat boat coat|rock sock lock clock|"
    "hill fill pill"
)
DAYS = _split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _split("January February March April May June July August September October November December")
NUMBER_WORDS = _split("zero one two three four five six seven eight nine ten")
KINDS = {"animal": ANIMALS, "color": COLORS, "food": FOODS, "place": PLACES}

ONSETS = _split("b d f g h k l m n p r s t v z br dr fl gr kl pr sk st tr")
VOWELS = _split("a e i o u ai oo")
CODAS = ["", "", "", "n", "r", "l", "m", "k", "p", "t", "s"]
# A drawn word that could complete the name of the word game kept out of the text.
UNWANTED = frozenset({"latin"})


def invented_word(rng: random.Random, most: int = 3) -> str:
    """A pronounceable word that English does not have (almost always)."""
    while True:
        count = rng.randint(1, most)
        word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(count))
        if len(word) > 2 and word not in UNWANTED:
            return word


def any_word(rng: random.Random) -> str:
    """An English word from the lists, or an invented one in about a third of the draws."""
    return invented_word(rng) if rng.random() < 0.35 else rng.choice(WORDS)


def distinct_words(rng: random.Random, count: int) -> list[str]:
    """`count` different words."""
    words: list[str] = []
    while len(words) < count:
        word = any_word(rng)
        if word not in words:
            words.append(word)
    return words


def _pairs(packed: str) -> list[list[str]]:
    return [group.split() for group in packed.split("|")]


def add_digits(rng: random.Random) -> Example:
    """The sum of two one-digit numbers."""
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return Example("Add", f"{a} + {b}", f"What is {a} + {b}?", str(a + b), f"{a} plus {b} is {a + b}.")


def add_numbers(rng: random.Random) -> Example:
    """The sum of two numbers of up to two digits."""
    a, b = rng.randint(1, 99), rng.randint(1, 99)
    return Example("Add", f"{a} + {b}", f"What is {a} + {b}?", str(a + b), f"{a} plus {b} is {a + b}.")


def subtract(rng: random.Random) -> Example:
    """A difference that is not negative."""
    top = rng.choice((9, 9, 20))
    a = rng.randint(0, top)
    b = rng.randint(0, a)
    return Example("Subtract", f"{a} - {b}", f"What is {a} - {b}?", str(a - b), f"{a} minus {b} is {a - b}.")


def multiply(rng: random.Random) -> Example:
    """A product of two one-digit numbers."""
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return Example("Multiply", f"{a} * {b}", f"What is {a} * {b}?", str(a * b), f"{a} times {b} is {a * b}.")


def larger(rng: random.Random) -> Example:
    """The larger of two different numbers."""
    a, b = rng.sample(range(100 if rng.random() < 0.5 else 10), 2)
    return Example("Larger", f"{a} or {b}", f"Which is larger, {a} or {b}?", str(max(a, b)))


def copy_words(rng: random.Random) -> Example:
    """The same words again."""
    text = " ".join(any_word(rng) for _ in range(rng.randint(1, 5)))
    return Example("Copy", text, f"Repeat: {text}", text)


def reverse_words(rng: random.Random) -> Example:
    """The same words, last one first."""
    words = distinct_words(rng, rng.choice((2, 2, 3, 3, 4, 5)))
    text = " ".join(words)
    return Example("Reverse the words", text, f"Reverse the words: {text}", " ".join(reversed(words)))


def last_word(rng: random.Random) -> Example:
    """The last word of several."""
    words = distinct_words(rng, rng.randint(2, 5))
    text = " ".join(words)
    return Example("Last word", text, f"What is the last word of: {text}", words[-1])


def first_word(rng: random.Random) -> Example:
    """The first word of several."""
    words = distinct_words(rng, rng.randint(2, 5))
    text = " ".join(words)
    return Example("First word", text, f"What is the first word of: {text}", words[0])


def rotate_words(rng: random.Random) -> Example:
    """The first word moved behind the others."""
    words = distinct_words(rng, rng.randint(2, 4))
    text = " ".join(words)
    return Example("Rotate", text, f"Move the first word to the end: {text}", " ".join(words[1:] + words[:1]))


def spell(rng: random.Random) -> Example:
    """The letters of a word, spaced."""
    word = invented_word(rng, 2) if rng.random() < 0.4 else rng.choice(WORDS)
    return Example("Spell", word, f"Spell the word {word}.", " ".join(word))


def join_letters(rng: random.Random) -> Example:
    """Spaced letters joined to a word."""
    word = invented_word(rng, 2) if rng.random() < 0.4 else rng.choice(WORDS)
    letters = " ".join(word)
    return Example("Join", letters, f"Join the letters: {letters}", word)


def reverse_letters(rng: random.Random) -> Example:
    """Spaced letters, last one first."""
    letters = rng.choice(WORDS) if rng.random() < 0.5 else invented_word(rng, 2)
    text = " ".join(letters)
    return Example("Reverse the letters", text, f"Reverse the letters: {text}", " ".join(reversed(letters)))


def reverse_word(rng: random.Random) -> Example:
    """A short word written backwards."""
    word = rng.choice([word for word in WORDS if len(word) <= 4]) if rng.random() < 0.7 else invented_word(rng, 1)
    steps = f"{' '.join(word)} backwards is {' '.join(reversed(word))}."
    return Example("Reverse", word, f"Reverse the word {word}.", word[::-1], steps)


def first_letter_last(rng: random.Random) -> Example:
    """One or two words, each with its first letter moved behind a hyphen."""
    words = [invented_word(rng, 2) if rng.random() < 0.5 else rng.choice(WORDS) for _ in range(rng.choice((1, 1, 2)))]
    text = " ".join(words)
    answer = " ".join(f"{word[1:]}-{word[0]}" for word in words)
    return Example("First letter last", text, f"Put the first letter last: {text}", answer)


def hyphenate(rng: random.Random) -> Example:
    """Words joined by hyphens."""
    words = [any_word(rng) for _ in range(rng.choice((2, 2, 3)))]
    return Example("Hyphens", " ".join(words), f"Join with hyphens: {' '.join(words)}", "-".join(words))


def sort_digits(rng: random.Random) -> Example:
    """Different digits in rising order."""
    digits = rng.sample(range(10), rng.choice((2, 3, 3, 4, 5)))
    text = " ".join(map(str, digits))
    return Example("Sort", text, f"Sort the numbers: {text}", " ".join(map(str, sorted(digits))))


def sort_words(rng: random.Random) -> Example:
    """Two or three English words in alphabetical order."""
    words = rng.sample(WORDS, rng.choice((2, 2, 3)))
    text = " ".join(words)
    return Example("Sort", text, f"Sort the words: {text}", " ".join(sorted(words)))


def count_up(rng: random.Random) -> Example:
    """The whole numbers between two bounds, both included."""
    low = rng.randint(0, 20)
    high = low + rng.randint(1, 6)
    answer = " ".join(map(str, range(low, high + 1)))
    return Example("Count", f"{low} to {high}", f"Count from {low} to {high}.", answer)


def count_words(rng: random.Random) -> Example:
    """How many words there are."""
    count = rng.randint(1, 6)
    text = " ".join(rng.choice(WORDS) for _ in range(count))
    return Example("Count the words", text, f"How many words are in: {text}", str(count))


def repeat_word(rng: random.Random) -> Example:
    """A word said a given number of times."""
    word, count = any_word(rng), rng.randint(1, 5)
    return Example("Say", f"{word} {count} times", f"Say {word} {count} times.", " ".join([word] * count))


def next_number(rng: random.Random) -> Example:
    """The number that continues an even progression."""
    start, step = rng.randint(0, 9), rng.choice((1, 1, 2, 3))
    terms = [start + step * i for i in range(4)]
    text = " ".join(map(str, terms[:3]))
    return Example("Continue", text, f"What number comes after {text}?", str(terms[3]))


def name_number(rng: random.Random) -> Example:
    """A small number in words, or the digits for a number word."""
    number = rng.randint(0, 10)
    word, digits = NUMBER_WORDS[number], str(number)
    if rng.random() < 0.5:
        return Example("In words", digits, f"Write {digits} in words.", word)
    return Example("In digits", word, f"Write {word} in digits.", digits)


def opposite(rng: random.Random) -> Example:
    """The opposite of a word."""
    pair = rng.choice(_pairs(OPPOSITES))
    word, other = pair if rng.random() < 0.5 else pair[::-1]
    return Example("Opposite", word, f"What is the opposite of {word}?", other)


def rhyme(rng: random.Random) -> Example:
    """The next member of the word's rhyme family: a rule, so that there is one right answer."""
    family = rng.choice(_pairs(RHYMES))
    place = rng.randrange(len(family))
    return Example("Rhyme", family[place], f"What rhymes with {family[place]}?", family[(place + 1) % len(family)])


def plural(rng: random.Random) -> Example:
    """A regular plural."""
    word = invented_word(rng, 2) if rng.random() < 0.3 else rng.choice(ANIMALS[:6] + THINGS + FOODS)
    answer = word + ("es" if word.endswith(("s", "x", "sh", "ch")) else "s")
    return Example("Plural", word, f"What is the plural of {word}?", answer)


def upper_case(rng: random.Random) -> Example:
    """A word with a capital first letter."""
    word = rng.choice(WORDS)
    return Example("Capital", word, f"Write {word} with a capital.", word.capitalize())


def fact(rng: random.Random) -> Example:
    """A small fact: an animal's sound, a thing's color, a word's kind, or the next day or month."""
    which = rng.randrange(5)
    if which == 0:
        animal, sound = rng.choice(_pairs(SOUNDS))
        return Example("Sound", animal, f"What sound does a {animal} make?", sound)
    if which == 1:
        thing, color = rng.choice(_pairs(FACT_COLORS))
        return Example("Color", thing, f"What color is {thing}?", color)
    if which == 2:
        kind = rng.choice(list(KINDS))
        word = rng.choice(KINDS[kind])
        return Example("Kind", word, f"What kind of word is {word}?", kind)
    names = DAYS if which == 3 else MONTHS
    place = rng.randrange(len(names))
    return Example("Next", names[place], f"What comes after {names[place]}?", names[(place + 1) % len(names)])


def is_kind(rng: random.Random) -> Example:
    """A yes or no question on a word's kind."""
    asked = rng.choice(list(KINDS))
    kind = asked if rng.random() < 0.5 else rng.choice(list(KINDS))
    word = rng.choice(KINDS[kind])
    answer = "yes" if word in KINDS[asked] else "no"
    return Example("True or false", f"{word} is {asked}", f"Is {word} a kind of {asked}?", answer)


def look_up(rng: random.Random) -> Example:
    """The value given for a key among several."""
    keys = distinct_words(rng, rng.randint(2, 4))
    values = [any_word(rng) if rng.random() < 0.5 else str(rng.randint(0, 9)) for _ in keys]
    asked = rng.randrange(len(keys))
    table = ", ".join(f"{key} = {value}" for key, value in zip(keys, values, strict=True))
    return Example("Look up", f"{table}; {keys[asked]}", f"If {table}, what is {keys[asked]}?", values[asked])


def story(rng: random.Random) -> Example:
    """A question answered by one of a few sentences."""
    names = rng.sample(NAMES, 2)
    animals = rng.sample(ANIMALS, 2)
    colors = rng.sample(COLORS, 2)
    places = rng.sample(PLACES, 2)
    lines = [
        f"{name} has a {color} {animal} in the {place}."
        for name, color, animal, place in zip(names, colors, animals, places, strict=True)
    ]
    text = " ".join(lines)
    who, which = rng.randrange(2), rng.randrange(4)
    name = names[who]
    questions = (
        (f"What animal does {name} have?", animals[who]),
        (f"What color is the {animals[who]}?", colors[who]),
        (f"Where is the {animals[who]}?", places[who]),
        (f"Who has the {animals[who]}?", name),
    )
    question, answer = questions[which]
    return Example("Story", f"{text} {question}", f"{text} {question}", answer)


def greeting(rng: random.Random) -> Example:
    """A polite exchange."""
    name = rng.choice(NAMES)
    ask, answer = rng.choice(
        (
            (f"Hello, I am {name}.", f"Hello {name}, how can I help you?"),
            ("Hello!", "Hello, how can I help you?"),
            ("Who are you?", "I am a tiny model."),
            ("How are you?", "I am well, thank you."),
            ("Thank you.", "You are welcome."),
            (f"My name is {name}. What is my name?", f"Your name is {name}."),
            ("What can you do?", "I can add numbers, copy words and sort lists."),
        )
    )
    return Example("Reply", ask, ask, answer)


# Weights follow difficulty and use: arithmetic and word work are what the demonstrations exercise.
TASKS: tuple[tuple[str, Task, float], ...] = (
    ("add_digits", add_digits, 4.0),
    ("add_numbers", add_numbers, 4.0),
    ("subtract", subtract, 3.0),
    ("multiply", multiply, 3.0),
    ("larger", larger, 2.0),
    ("copy_words", copy_words, 8.0),
    ("reverse_words", reverse_words, 6.0),
    ("last_word", last_word, 2.0),
    ("first_word", first_word, 2.0),
    ("rotate_words", rotate_words, 3.0),
    ("spell", spell, 4.0),
    ("join_letters", join_letters, 3.0),
    ("reverse_letters", reverse_letters, 4.0),
    ("reverse_word", reverse_word, 5.0),
    ("first_letter_last", first_letter_last, 4.0),
    ("hyphenate", hyphenate, 2.0),
    ("sort_digits", sort_digits, 4.0),
    ("sort_words", sort_words, 2.0),
    ("count_up", count_up, 3.0),
    ("count_words", count_words, 2.0),
    ("repeat_word", repeat_word, 2.0),
    ("next_number", next_number, 2.0),
    ("name_number", name_number, 1.5),
    ("opposite", opposite, 1.5),
    ("rhyme", rhyme, 2.0),
    ("plural", plural, 1.5),
    ("upper_case", upper_case, 1.5),
    ("fact", fact, 3.0),
    ("is_kind", is_kind, 2.0),
    ("look_up", look_up, 5.0),
    ("story", story, 4.0),
    ("greeting", greeting, 1.5),
)
ARITHMETIC = (add_digits, add_numbers, subtract, multiply)
TASK_BY_NAME = {name: task for name, task, _ in TASKS}
_TASK_FUNCTIONS = [task for _, task, _ in TASKS]
_TASK_WEIGHTS = [weight for _, _, weight in TASKS]


def chat_turn(role: str, content: str) -> str:
    """One turn exactly as the chat template writes it."""
    return f"{TURN_START}{role}\n{content}{TURN_END}\n"


def chat_document(rng: random.Random) -> Document:
    """One to three questions with their answers, at times after a system turn or with reasoning asked for."""
    segments: list[Segment] = []
    if rng.random() < 0.2:
        segments.append(Segment(chat_turn("system", "You are a helpful assistant."), False))
    for _ in range(rng.choice((1, 1, 2, 3))):
        example = rng.choices(_TASK_FUNCTIONS, _TASK_WEIGHTS)[0](rng)
        question, answer = example.question, example.answer
        if example.reasoning and rng.random() < 0.3:
            question += " Think first."
            answer = f"{THINK_START}\n{example.reasoning}\n{THINK_END}\n\n{answer}"
        segments.append(Segment(chat_turn("user", question) + f"{TURN_START}assistant\n", False))
        segments.append(Segment(f"{answer}{TURN_END}\n", True))
    segments.append(Segment(END_OF_TEXT, False))
    return tuple(segments)


Layout = Callable[[Example], tuple[str, str]]


def _layout(rng: random.Random) -> tuple[Layout, bool]:
    """A way to write examples as plain text, and whether it names the task; one document keeps to one layout."""
    which = rng.randrange(5)
    if which == 0:
        return lambda example: (f"{example.label}: {example.given} ->", f" {example.answer}\n"), True
    if which == 1:
        return lambda example: (f"{example.label}: {example.given}\nAnswer:", f" {example.answer}\n\n"), True
    if which == 2:
        return lambda example: (f"Question: {example.question}\nAnswer:", f" {example.answer}\n\n"), True
    if which == 3:
        return lambda example: (f"{example.given} =", f" {example.answer}\n"), False
    # Labels that say nothing: the rule has to be read off the earlier examples.
    first, second = (any_word(rng).capitalize() for _ in range(2))
    return lambda example: (f"{first}: {example.given}\n{second}:", f" {example.answer}\n\n"), False


def plain_document(rng: random.Random) -> Document:
    """Several examples of one task, one under the other."""
    task = rng.choices(_TASK_FUNCTIONS, _TASK_WEIGHTS)[0]
    write, names_task = _layout(rng)
    segments: list[Segment] = []
    for i in range(rng.randint(1, 6)):
        prompt, answer = write(task(rng))
        # A first answer under a layout that does not name the task is a guess, except in arithmetic.
        segments += (Segment(prompt, False), Segment(answer, names_task or i > 0 or task in ARITHMETIC))
    segments.append(Segment(END_OF_TEXT, False))
    return tuple(segments)


def repeated_text_document(rng: random.Random) -> Document:
    """A run of words said twice, which teaches copying from anywhere before."""
    text = " ".join(invented_word(rng) if rng.random() < 0.6 else rng.choice(WORDS) for _ in range(rng.randint(4, 14)))
    return (Segment(f"{text}\n", False), Segment(f"{text}\n", True), Segment(END_OF_TEXT, False))


def documents(seed: int = 0, count: int = DEFAULT_DOCUMENTS) -> Iterator[Document]:
    """The corpus: `count` documents, the same ones for the same seed."""
    rng = random.Random(seed)
    kinds = (chat_document, plain_document, repeated_text_document)
    for _ in range(count):
        yield rng.choices(kinds, (0.5, 0.42, 0.08))[0](rng)


def text_of(document: Document) -> str:
    """A document as one string, special tokens written out."""
    return "".join(segment.text for segment in document)
