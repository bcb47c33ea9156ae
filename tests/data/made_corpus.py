"""Sixty documents of several lines, none like another, some of which try to end themselves."""

import random

WORDS = ["tokens", "are", "cut", "from", "text", "über", "中文", "🙂", "<|endoftext|>", "\n"]
RNG = random.Random(0)
TEXTS = {f"{n:03}.txt": f"Document {n}. " + " ".join(RNG.choices(WORDS, k=40)) for n in range(60)}
