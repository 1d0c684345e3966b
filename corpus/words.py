"""Words as Unicode cuts text into them, in any script (UAX #29), for rules that count words.

The Dolma toolkit counts them so: can't, 3.14 and os.path are a word each, so are the marks . and (,
an emoji, and each character of Chinese, which has no spaces. The regex package's own word borders
are no help: they join 'a, and a combining mark with what follows it.
"""

from functools import lru_cache
from itertools import islice

import regex


@lru_cache
def word_pattern():
    """The pattern of one word or one run of spaces, compiled; WB1 to WB16 are UAX #29's rules."""
    extend = r"[\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}]"
    marks = f"{extend}*+"  # accents and joiners belong to the character before them (WB4)
    hebrew = r"\p{WB=Hebrew_Letter}"
    letter = rf"[\p{{WB=ALetter}}{hebrew}]"
    digit = r"\p{WB=Numeric}"
    joining = rf"\p{{WB=ExtendNumLet}}++{marks}"  # such as _

    # letters, and one ' . or : between two of them (WB5 to WB7c); digits likewise (WB8 to WB12)
    after_hebrew = f"(?<={hebrew}{extend}*)"
    letters = (rf"{letter}++{marks}(?:[\p{{WB=MidLetter}}\p{{WB=MidNumLet}}']{marks}(?={letter})"
               rf'|{after_hebrew}"{marks}(?={hebrew}))?')
    digits = rf"{digit}++{marks}(?:[\p{{WB=MidNum}}\p{{WB=MidNumLet}}']{marks}(?={digit}))?"
    run = rf"(?:(?:{letters}|{digits})++|(?:\p{{WB=Katakana}}{marks})++)"  # WB13
    word = (rf"(?:{run}|(?:{joining})++{run}?+)(?:(?:{joining})++{run}?+)*+"  # WB13a, WB13b
            rf"(?:{after_hebrew}'{marks})?")

    flag = rf"(?:\p{{WB=Regional_Indicator}}{marks}){{2}}"  # two letters are a flag (WB15, WB16)
    emoji = rf"(?:(?<=\u200d)\p{{ExtPict}}{marks})*+"  # joined to what is before it (WB3c)
    return regex.compile(rf"(?s)(?:{word}|{flag}|.{marks}){emoji}")


def count_words(text, most):
    """The number of words in `text`, counted up to `most`; spaces are none."""
    found = (match[0] for match in word_pattern().finditer(text))
    return sum(1 for _ in islice((word for word in found if not word.isspace()), most))


def has_more_than_marks(text):
    """Whether a text holds more than punctuation, symbols and spaces: a letter or digit, say."""
    return bool(regex.search(r"[^[:punct:]\s]", text))
