"""What comes from a server, before it reaches a terminal or a file: on one line, without the key, without controls."""

from __future__ import annotations

GRAM = 8
"""So many characters of a key in a row give it away."""
MASK = "*"


def clean(text: str, key: str | None, most: int = 200) -> str:
    """The text on one short line; whatever it repeats of the key is masked, even across spaces and line ends."""
    shown = _masked(text, key) if key else text
    line = " ".join(shown.split())
    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    return line if len(line) <= most else f"{line[:most]}..."


def _masked(text: str, key: str) -> str:
    places = [place for place, letter in enumerate(text) if letter.isprintable() and not letter.isspace()]
    dense = "".join(text[place] for place in places)
    length = min(GRAM, len(key))
    grams = {key[start : start + length] for start in range(len(key) - length + 1)}
    hidden = set()
    for start in range(len(dense) - length + 1):
        if dense[start : start + length] in grams:
            hidden.update(places[start : start + length])
    return "".join(MASK if place in hidden else letter for place, letter in enumerate(text))
