# ruff: noqa: RUF001 (quotation marks and dashes are what is tested)
"""The pure-Python tokenizer against the jar that pycocoevalcap calls, token for token."""

import random
import shutil
import subprocess
from pathlib import Path

import pycocoevalcap
import pytest

from gmail_lightning.datasets import EmojiDataset
from gmail_lightning.metrics.captioning.ptb_tokenizer import PUNCTUATION, normalize_whitespace, ptb_tokenize

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java")

CASES = {  # from the jar
    "A man's dog isn't here, can't wait; they'll go.": "a man 's dog is n't here ca n't wait they 'll go",
    "cannot Cannot gonna gotta lemme gimme wanna cannots": "can not can not gon na got ta lem me gim me wan na cannots",
    "the dogs' toys, O'Neil's o'clock rock'n'roll": "the dogs toys o'neil 's o'clock rock 'n' roll",
    "'tis ma'am y'all 'cause d'Or": "'t is ma'am y' all 'cause d'or",
    'a "red" car (left) [x] {y}': "a red car -lrb- left -rrb- -lsb- x -rsb- -lcb- y -rcb-",
    "wait... what?! no -- yes - ok": "wait what ?! no yes ok",
    "$5.00 50% 1,000 3.5 1/2 10:30 5pm 1990s '90s 2nd": "$ 5.00 50 % 1,000 3.5 1/2 10:30 5pm 1990s '90s 2nd",
    "2 1/2 cups, call (415) 555-1212": "2\xa01/2 cups call -lrb-415-rrb-\xa0555-1212",
    "Mr. Smith of the U.S. at 5 a.m. on St. Ave., No. 5, etc.": (
        "mr. smith of the u.s. at 5 a.m. on st. ave. no. 5 etc."
    ),
    "This is no. The end no.": "this is no the end no",
    "Plan B. The end of part B.": "plan b the end of part b.",
    "well-known t-shirt and/or AT&T R&amp;D &lt;b&gt;": "well-known t-shirt and/or at&t r&d < b >",
    "http://x.org/y?z=1. me@x.org, @user #tag #2 file.txt": "http://x.org/y?z=1 me@x.org, @user #tag # 2 file.txt",
    "it’s “curly” ‘quotes’ – dash — café naïve": "it 's curly quotes dash café naïve",
    "a 🐶dog ❤️ 日本語 привет 5° ½ £5 €5 ™": "a dog ❤ 日本語 привет 5 ° 1/2 # 5 $ 5 ™",
    ":) :D ^_^ <3 <br/> C++ C#": ":-rrb- :d ^_^ < 3 <br/> c++ c#",
    "soft\xadhyphen zero\u200bwidth a_b __init__": "softhyphen zero width a_b __ init __",
    "...": "",
    "": "",
}
PIECES = (  # that meet one another, with and without a space
    "a dog cat runs The I he it's don't can't cannot gonna 'tis U.S. U.S a.m. Mr. Dr. St. Inc. etc. e.g. v. "
    "o'clock O'Neil rock'n'roll ma'am y'all dogs' 1 10 100 1,000 3.5 .5 1/2 3/4 10:30 5pm 1990s '90s 5th % $5 "
    "€5 £ ¢ #1 #tag @user a@b.c http://x.y/z www.x.com x.com foo.txt 555-1234 (415) 12/25/2010 well-known "
    "T-shirt A&B AT&T R&D and/or w/ C++ C# :) :( ;-) :D ^_^ <b> </b> &amp; &lt; café naïve über 日本 привет 😀 ❤️ "
    "™ ° ½ ² “ ” ‘ ’ « » … – — - -- --- .. . , ; : ! ? !! ?! \" ' '' ` `` ( ) [ ] { } < > / \\ | * ** + = ~ ^ _ "
    "__ @ no. No. Ph.D. sept. v. The "
)
SIGNS = "aabcdeinstAIS0125''\"..,,-- -/:;!?()@#$%&*+=_^~`|<>[]{}\\é’“…–€½ "


def random_captions(seed: int, number: int) -> list[str]:
    rng, pieces = random.Random(seed), PIECES.split()
    sentences = (" ".join(rng.choices(pieces, k=rng.randint(1, 9))) for _ in range(number // 3))
    compounds = (
        "".join(rng.choice(pieces) + rng.choice(["", "", " "]) for _ in range(rng.randint(1, 6)))
        for _ in range(number // 3)
    )
    strings = ("".join(rng.choices(SIGNS, k=rng.randint(1, 14))) for _ in range(number // 3))
    return [*sentences, *compounds, *strings]


def jar_tokenize(captions: list[str]) -> list[str]:
    """The jar as pycocoevalcap calls it; a neutral line after each caption, so that none looks ahead into the next."""
    lines = [line for caption in captions for line in (normalize_whitespace(caption), "x")]
    jar = Path(next(iter(pycocoevalcap.__path__))) / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    command = ["java", "-XX:+UseSerialGC", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines"]
    run = subprocess.run(
        [*command, "-lowerCase"], input="\n".join([*lines, ""]).encode(), capture_output=True, check=True, timeout=120
    )
    output = run.stdout.decode().split("\n")
    assert output[1::2] == ["x"] * len(captions)
    return [" ".join(t for t in line.rstrip().split(" ") if t not in PUNCTUATION) for line in output[: len(lines) : 2]]


def assert_same(captions: list[str], differences: int = 0) -> None:
    differ = [
        (caption, ours, theirs)
        for caption, ours, theirs in zip(captions, ptb_tokenize(captions), jar_tokenize(captions), strict=True)
        if ours != theirs
    ]
    assert len(differ) <= differences, differ[:5]


@pytest.mark.parametrize("caption", CASES)
def test_recorded_cases(caption: str) -> None:
    assert ptb_tokenize([caption]) == [CASES[caption]]


@needs_java
def test_cases_are_what_the_jar_says() -> None:
    assert jar_tokenize(list(CASES)) == list(CASES.values())


@pytest.mark.slow
@needs_java
def test_captions_of_the_emoji() -> None:
    captions: set[str] = set()
    for hand, locale in (("noto", "en"), ("noto", "de"), ("generated", "en")):
        dataset = EmojiDataset(hand, locale=locale)
        captions.update(caption for i in range(len(dataset)) for caption in dataset.captions(i))
    sentences = {f"{caption[:1].upper()}{caption[1:]}." for caption in captions}
    assert len(captions) > 10_000
    assert_same(sorted(captions | sentences))


@pytest.mark.slow
@needs_java
def test_random_strings() -> None:
    assert_same(random_captions(0, 15_000))


@pytest.mark.slow
@needs_java
def test_every_character_of_common_scripts() -> None:
    signs = [
        chr(code)
        for code in (*range(0x20, 0x377), *range(0x384, 0x528), *range(0x2010, 0x2070), *range(0x2190, 0x2C00))
    ]
    signs += [chr(code) for code in (*range(0x3001, 0x3100), *range(0x4E00, 0x9FA6, 37), *range(0x1F300, 0x1F650, 7))]
    assert_same([text for c in signs for text in (f"a {c} b", f"a{c}b", f"5{c}6")])


def test_white_space_of_every_kind_is_one_space() -> None:
    spaces = " \t\n\r\x0b\x0c\x1c\x85\xa0\u2003\u2028\u2029\u3000"
    assert normalize_whitespace("".join(f"{space}a{space}" for space in spaces)) == " ".join("a" * len(spaces))
    assert normalize_whitespace(spaces) == ""
    assert ptb_tokenize(["a\rdog", "two\u2028cats\n", "birds"]) == ["a dog", "two cats", "birds"]


def test_long_captions_take_linear_time_and_lone_surrogates_are_dropped() -> None:
    assert ptb_tokenize(["dog " * 10_000])[0].count("dog") == 10_000
    assert ptb_tokenize(["a \ud83d dog"]) == ["a dog"]
