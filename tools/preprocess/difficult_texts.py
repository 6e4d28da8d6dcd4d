"""Texts that tokenizers may disagree about."""

import random


def difficult_texts(added_tokens: list[str]) -> list[str]:
    """Texts that tokenizers may disagree about, always the same: spaces, scripts, combining marks, digits, code,
    long runs, random characters, and added tokens in the middle of words."""
    texts = [
        *(" " * n + "x" + "\n" * n + "\t" * n for n in range(1, 20)),
        *("9" * n + "." + "0" * n + "," for n in range(1, 20)),
        "I'm you're HE'S they'LL we\u2019ve 'S 's''d",
        "e\u0301 \u00e9 \ufb01 \u212b \u00c5 \u1e9e \u0130 \u0131 \u00df",
        "\u4f60\u597d\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4",
        "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947",
        "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
        "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea\ufe0f",
        " \u200b\u00a0\u2003\u3000\ufeff\u00ad",
        "a\x00b\x01\x7f\x85\u2028\u2029 \r\n\r \x0b\x0c",
        "def f(x):\n\treturn {'a': [1, 2.5e-3]}  # \\n\n" * 3,
        "a" * 5000,
        "ab" * 3000,
        " \u0301" * 50,
        "=" * 300 + "-" * 300,
    ]
    generator = random.Random(0)
    alphabets = ("ab \n", "aZ0 '\t.,", "\u00e9\u4e2d\u0301 a\U0001f600", "".join(map(chr, range(32, 0x250))))
    for i in range(200):
        letters = alphabets[i % len(alphabets)]
        texts.append("".join(generator.choice(letters) for _ in range(generator.randint(1, 60))))
    for _ in range(100):
        points = (generator.randrange(1, 0x11000) for _ in range(generator.randint(1, 30)))
        texts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000) or "x")
    for token in added_tokens:
        texts += [
            token,
            f"a{token}b",
            f" {token} ",
            f" {token}a",
            f"1{token} ",
            f"{token}{token}\n",
            token[:-1],
            token.upper(),
        ]
    return texts
