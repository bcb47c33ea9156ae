"""Large numbers as people write them: 10B, 100M, 5k."""

import re

POWERS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
AMOUNT = re.compile(r"([0-9][0-9_,]*)(\.[0-9]+)?\s*([kmbgt]?)", re.IGNORECASE)


def parse_amount(text: str) -> int:
    """A whole number with an optional suffix, in thousands and not in 1024s: k, M, B (or G), T.

    Raises:
        ValueError: for anything else, and for a fraction that is no whole number, such as 1.5 or 0.0001k.
    """
    found = AMOUNT.fullmatch(text.strip())
    if found:
        whole, fraction, suffix = found.groups()
        digits = (fraction or ".")[1:]
        scaled = int(re.sub("[_,]", "", whole) + digits) * POWERS[suffix.lower()]
        if scaled % 10 ** len(digits) == 0:
            return scaled // 10 ** len(digits)
    raise ValueError(
        f"{text!r} is no amount; write a whole number, or one with a suffix, such as 5k, 100M, 1.5B or 10B"
    )
