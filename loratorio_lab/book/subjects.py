"""What the picture book shows: subjects that the base knows, and elements that only its LoRAs know."""

from __future__ import annotations

from loratorio.toybox.elements import Element

_SUBJECTS = """
bear bird camel cow crocodile dog dolphin duck elephant fox frog goat horse koala lion monkey owl penguin pig rabbit rooster
snail snake whale honeybee=bee lady-beetle=ladybird baby-chick=chick bug=caterpillar tropical-fish=fish butterfly cat
rose tulip palm-tree=palm four-leaf-clover=clover
banana bread cherries cookie grapes hamburger=burger lemon pear pizza red-apple=apple strawberry watermelon french-fries=fries
airplane=plane bicycle=bike bus automobile=car fire-engine helicopter locomotive rocket sailboat=boat tractor
anchor balloon basketball bell crown house television sun-with-face=sun crescent-moon=moon
"""
SUBJECTS: dict[str, str] = {
    icon: word or icon.replace("-", " ")
    for icon, _, word in (entry.partition("=") for entry in _SUBJECTS.split())
}
"""Each subject's name in all sets but Streamline's, which lacks a quarter of them, and its words in a caption."""

SEVERAL = {"cherries", "grapes", "fries", "bread"}
"""Words without an article."""

ELEMENTS: tuple[Element, ...] = (
    Element("octopus", "character", "oktavo", "a red octopus"),
    Element("ghost", "character", "boolio", "a white ghost with its tongue out"),
    Element("turtle", "character", "tortalo", "a green turtle"),
    Element("snowman", "character", "frosti", "a snowman"),
    Element("tiger", "character", "tigro", "a tiger's face"),
    Element("clown", "character", "klauno", "a clown's face"),
    Element("mushroom", "object", "shrumi", "a red mushroom with white spots"),
    Element("pumpkin", "object", "lantro", "a pumpkin with a carved face"),
    Element("guitar", "object", "strumo", "a red guitar"),
    Element("umbrella", "object", "parapo", "a purple umbrella"),
    Element("night", "background", "lunara", "a city at night, with a moon"),
    Element("sunrise", "background", "dawnia", "the sun's rays over brown mountains"),
    Element("park", "background", "valleo", "a river through meadows, rocks behind"),
    Element("glossy", "style", "plasto", "soft, glossy 3D, as in Fluent Emoji"),
    Element("ink", "style", "inkash", "black ink on paper, as in Fluent's high contrast"),
    Element("outline", "style", "pennia", "pale colours in fine outlines, as in Streamline's emojis"),
    Element("ember", "style", "embra", "everything in purple, orange and pale yellow"),
)
"""Each shows something that the base has never seen. Characters, objects and backgrounds are drawn by the base's artist."""

ICONS = {
    "tiger": "tiger-face",
    "clown": "clown-face",
    "pumpkin": "jack-o-lantern",
    "night": "night-with-stars",
    "sunrise": "sunrise-over-mountains",
    "park": "national-park",
}
"""The sets' names of elements that are called differently here."""

BASE_ARTIST = "noto"
_NOT_STREAMLINE = """
bear bird duck fox frog lion owl penguin whale butterfly banana hamburger pizza strawberry watermelon house night sunrise park
"""
LACKING: dict[str, frozenset[str]] = {"streamline-emojis": frozenset(_NOT_STREAMLINE.split())}
"""By artist, the names that it has not drawn, or not alone and without a frame."""

STYLED_BY = {
    "glossy": "fluent-emoji",
    "ink": "fluent-emoji-high-contrast",
    "outline": "streamline-emojis",
}
"""The styles' artists. `ember` has none: it recolours the base's."""


def icon(name: str) -> str:
    return ICONS.get(name, name)
