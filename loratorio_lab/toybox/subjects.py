"""What the toybox's base knows (its LoRAs' elements are `loratorio.toybox.ELEMENTS`), and who drew it."""

from __future__ import annotations

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


def icon(name: str) -> str:
    return ICONS.get(name, name)
