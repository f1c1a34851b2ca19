# ruff: noqa: RUF001 (quotation marks and dashes of every kind are what this file is about)
"""Penn Treebank tokens of captions in pure Python, as the caption metrics of COCO expect them.

The reference is ``PTBTokenizer -preserveLines -lowerCase`` of Stanford CoreNLP 3.4.1, called as pycocoevalcap does. The
rules below were found by comparing with its output; like it, the longest match wins, what a rule looks ahead at
included, and of two equally long ones the first. What still differs:

* letters that Unicode added since about 2012 (some 500, of rare scripts) are letters here, and dropped there;
* a caption that ends in ``no.``, ``fig.`` or another of ``_NUMBERED`` keeps that period there if the *next caption*
  starts with a digit, and the very last caption of a file without a final line break lacks what to look ahead at;
* HTML entities other than ``&amp;``, ``&lt;``, ``&gt;``, ``&quot;``, ``&apos;``, ``&nbsp;``, ``&#1;`` and accented
  vowels, the control characters U+0080 to U+009F, and quotation marks inside addresses are only treated alike as far
  as captions were seen to hold them;
* abbreviations of five and more letters that no word list at hand contained may be missing.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache

#: Tokens that pycocoevalcap drops after tokenisation.
PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)


def normalize_whitespace(caption: str) -> str:
    """The words of a caption on one line with one space between them; white space is what ``str.split`` takes for it.

    A carriage return or U+2028 inside a caption would otherwise be a line break to Java, and shift every later caption
    to the wrong image.
    """
    return " ".join(caption.split())


def ptb_tokenize(captions: Sequence[str]) -> list[str]:
    """Tokens of each caption in lower case, separated by single spaces, without punctuation.

    A token may hold a no-break space: ``1 1/2`` and telephone numbers are one token.

    Example:
        >>> ptb_tokenize(["A dog's toy isn't here.", "Mr. Smith (left) cannot run 1,000 miles!"])
        ["a dog 's toy is n't here", 'mr. smith -lrb- left -rrb- can not run 1,000 miles']
    """
    return [" ".join(token for token in _tokens(caption) if token not in PUNCTUATION) for caption in captions]


def _tokens(caption: str) -> Iterator[str]:
    text = normalize_whitespace(caption) + "\n"
    end, position = len(text) - 1, 0
    while position < end:
        if text[position] == " ":
            position += 1
            continue
        plain = _PLAIN.match(text, position)
        if plain and not (text[plain.end()] == "." and plain[0].lower() in _ABBREVIATIONS):
            word, position = plain[0].lower(), plain.end()
            yield from (word,) if text[position] == "'" else _CONTRACTED.get(word, (word,))
            continue
        longest, stop = 0, position
        for rule in _rules(_kind(text[position])):
            match = rule.match(text, position)
            if match and match.end() - position > longest:
                longest, stop = match.end() - position, match.end(1)
                contracted = rule is _rules("letter")[0]
        if not longest:  # what the reference drops: emoji above U+FFFF, control characters
            position += 1
            continue
        token, position = text[position:stop], stop
        yield from _CONTRACTED[token.lower()] if contracted else _written(token)


def _written(token: str) -> Iterator[str]:
    """The token as the reference prints it."""
    entity = token.lower()
    if entity == "&nbsp;":
        return
    if token in _PRINTED:
        token = _PRINTED[token]
    elif entity in ("&amp;", "&lt;", "&gt;"):
        token = _PRINTED[entity]
    elif token.startswith("..."):
        token = "..."
    elif len(token) == 2 and all(mark in _QUOTES for mark in token):
        token = "".join(_PRINTED.get(mark, mark) for mark in token)
    elif _clitic().fullmatch(token):
        token = token.translate(_STRAIGHT)
    elif re.fullmatch(f"{_JOINED}[.]?", token):
        token = token.replace("&amp;", "&")
    token = token.replace("\xad", "").replace("(", "-LRB-").replace(")", "-RRB-")
    yield token.lower().replace(" ", "\xa0")


# What needs no other rule, which is most of a caption: words before a space, a comma, a final period or a final 's.
_PLAIN = re.compile(r"[A-Za-z]+(?:-[A-Za-z]+)*(?=[ \n]|, |\.\n|'s[ \n])|'s(?=[ \n])|,(?= )|\.(?=\n)")
_CONTRACTED = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "wanna": ("wan", "na"),
    "gotta": ("got", "ta"),
    "lemme": ("lem", "me"),
    "gimme": ("gim", "me"),
}
_QUOTES = "`‘’‚‛“”„‟‹›«»\x91\x92\x93\x94"
_STRAIGHT = str.maketrans("’\x92‘‛\x91", "''```")
_PRINTED = {
    **{"(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-"},
    **{"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "¢": "cents", "£": "#"},
    **{"€": "$", "¤": "$", "₠": "$", "\x80": "$", "\xad": "-", "…": "...", ". . .": "..."},
    **{"–": "--", "—": "--", "―": "--", "\x96": "--", "\x97": "--", "---": "--", "----": "--"},
    **{"’": "'", "\x92": "'", "›": "'", "‘": "`", "‛": "`", "\x91": "`", "‹": "`", "&apos;": "'"},
    **{'"': "''", "”": "''", "»": "''", "\x94": "''", "“": "``", "«": "``", "\x93": "``", "&quot;": "''"},
    **{"&amp;": "&", "&lt;": "<", "&gt;": ">"},
}

# Abbreviations: in any position; only where a capital or a sentence end may follow; only before a number.
_TITLES = (
    "adj adm adv alex assoc asst atty attys ave brig capt cf cie cmdr col comdr cpl dept det dr drs elec ens ft "
    "gen gov govs hon insp invt jos lieut lt maj messrs mlle mme mr mrs ms msgr mt natl pfc ph pres prof profs "
    "pvt rep reps rev sen sens sfc sgt spc st ste supt supts treas vs wm "
)
_FINAL = (
    "al ala apr ariz assn aug bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak dec esq est etc ext "
    "feb fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla "
    "penn plc rd rt sep sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc wyo ph\\.d ed\\.d "
)
_FINAL_CASED = (
    "Ark ARK Az AZ Del DEL Ill ILL La LA Mass MASS Miss MISS Ore ORE Pa PA pte Pte ptes Ptes pty Pty "
    "ptys Ptys ppte Ppte pptes Pptes ppty Ppty pptys Pptys Tex TEX Wash WASH"
)
_TITLES_CASED = "mfg Mfg mtg Mtg"
_ABBREVIATIONS = frozenset(
    [*f"{_TITLES} {_FINAL} {_FINAL_CASED} {_TITLES_CASED}".lower().split(), *string.ascii_lowercase]
)
_NUMBERED = "art ca fig figs no nos op pp prop"
_STARTERS = (  # words that begin a sentence after a single letter and a period
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now "
    "Once One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet "
    "You "
)
_FILES = (
    "bat bmp c class cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps "
    "py sql tar txt wav x xml zip 3gp "
)
_MARKS = (  # that words may hold, and numbers may not: modifiers, combining marks, vowel signs
    "2c2-2c5 2d2-2df 2e5-2eb 2ed 2ef-36f 375 378-379 384-385 3f6 483-487 55a-55f 591-5bd 5bf 5c1-5c2 5c4-5c5 5c7 "
    "615-61a 64b-65e 670 6d6-6e4 6e7-6ed 6fd-6fe 70f 711 730-74c 7a6-7b0 7eb-7f3 900-903 93c 93e-94e 951-955 "
    "962-963 981-983 9bc 9be-9c4 9c7-9c8 9cb-9cd 9d7 9e2-9e3 a01-a03 a3c a3e-a4f a81-a83 abc abe-acf b82 bbe-bc2 "
    "bc6-bc8 bca-bcd c01-c03 c3e-c56 d3e-d44 d46-d48 e31 e34-e3a e47-e4e eb1 eb4-ebc ec8-ecd "
)
_SYMBOLS = (  # outside ASCII, that are tokens; what is neither this nor a letter is dropped
    "a1 a5-a9 ac ae-b4 b6-b9 bf d7 f7 37e 387 589 5be 5c0 5c3 5c6 5f3-5f4 600-603 606-60c 614 61b 61e-61f 66a 66d "
    "6d4 700-70d 7f6-7f8 964-965 e3f e4f 1fbd 2016-2017 201a 201e-2023 2030-2038 203b 203e-2042 2044 2070 "
    "2074-207e 2080-208e 20a4 2100-2101 2103-2106 2108-2109 2114 2116-2118 211e-2123 2125 2127 2129 212e "
    "213a-213b 2140-2144 214a-214d 214f 2155-215e 2190-2bff 3001-3002 3012 30fb ff01-ff0f ff1a-ff20 ff3b-ff40 "
    "ff5b-ff65 ffe0-ffe1 ffe5-ffe6 "
)


_JOINED = "[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+"  # AT&T


def _kind(character: str) -> str:
    if character.isascii():
        return "letter" if character.isalpha() else "digit" if character.isdigit() else "other"
    return "any"


@cache
def _class(select: str) -> str:
    """The inside of a character class: the characters below U+10000 whose Unicode category starts with ``select``."""
    spans: list[list[int]] = []
    for code in range(0x10000):
        if unicodedata.category(chr(code)).startswith(select):
            if spans and spans[-1][1] == code - 1:
                spans[-1][1] = code
            else:
                spans.append([code, code])
    return "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in spans)


def _spans(text: str) -> str:
    """The inside of a character class from hexadecimal ranges."""
    return "".join("-".join(f"\\u{int(code, 16):04x}" for code in span.split("-")) for span in text.split())


def _any(words: str) -> str:
    return "|".join(words.split())


@cache
def _clitic() -> re.Pattern[str]:
    return re.compile(f"{_CLITIC}|[nN]{_MARK}[tT]")


_APOSTROPHE = "(?:['’\x92]|&apos;)"
_MARK = "(?:['’\x92`‘‛\x91]|&apos;)"  # a quotation mark that may stand for an apostrophe
_CLITIC_LETTERS = "(?:[msdMSD]|re|RE|ve|VE|ll|LL)"
_CLITIC = f"{_APOSTROPHE}{_CLITIC_LETTERS}"


@cache
def _rules(kind: str) -> tuple[re.Pattern[str], ...]:
    """The rules for tokens that begin with such a character, strongest first."""
    return tuple(
        re.compile(f"({token}){ahead}") for kinds, token, ahead in _grammar() if kind == "any" or kind in kinds
    )


def _grammar() -> Iterator[tuple[str, str, str]]:
    """For each rule: how it may begin, the token, and what must follow."""
    any_, both, letter, other = "letter digit other", "letter digit", "letter", "other"
    strict, numeral = _class("L") + "\\xad", f"[{_class('Nd')}]"
    entity = "&[aeiouAEIOU](?:acute|grave|uml);"
    mark = f"(?:[{strict}{_spans(_MARKS)}]|{entity})"
    inner = f"(?:[{strict}{_spans(_MARKS)}{numeral[1:-1]}]|{entity})"
    plain = f"[{strict}{numeral[1:-1]}]"

    yield letter, f"(?i:{'|'.join(_CONTRACTED)})", ""  # first: told by its place
    # Words, with periods inside; compounds with hyphens, slashes and ampersands; letters before an apostrophe.
    word = f"{mark}{inner}*(?:[.!?]{mark}{inner}*)*"
    part = f"(?:[dDoOlL]{_MARK}{plain}{plain}+|{plain}+)"
    compound = f"{part}(?:[-_\u058a\u2010\u2011]{part})*"
    dotted = r"[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9\xad]+))+"
    yield letter, "more", f"{_APOSTROPHE}n"
    yield letter, "[A-Za-z]*[A-MO-Za-mo-z]\\xad?", f"[nN]{_MARK}[tT]"
    yield letter, f"[nN]{_MARK}[tT]", ""
    yield any_, word, _CLITIC
    yield any_, word, ""
    yield both, compound, ""
    yield both, dotted, ""
    yield letter, _JOINED, ""
    yield both, r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}", ""
    yield letter, f"[A-HJ-XZn]{_MARK}[{strict}][{strict}]+", ""
    yield letter, f"[{strict}]+[aeiouyAEIOUY]{_MARK}[aeiouA-Z]{mark}*", ""
    yield letter, f"(?i:d{_MARK}ye)|[cC]{_MARK}est|(?i:[ldj]|dunkin|somethin|ol){_APOSTROPHE}", ""
    yield letter, f"[yY]{_MARK}", mark
    yield letter, r"[Cc]\+\+|[CcFf]\#", ""
    # Abbreviations keep their period; a single letter does not at the end of a sentence.
    title = rf"(?i:ph\.d|ed\.d)|[A-Za-z](?:\.[A-Za-z])*|(?i:{_any(_TITLES + ' ' + _FINAL)})"
    yield letter, rf"(?:{title}|{_any(_TITLES_CASED + ' ' + _FINAL_CASED)})\.", ""
    yield letter, rf"(?:(?i:{_any(_FINAL)})|{_any(_FINAL_CASED)})\.", r"[\s\S]{0,2}"
    yield letter, rf"(?i:{_any(_NUMBERED)})\.", f" ?{numeral}"
    starters = "|".join(f"{first}(?i:{rest})" for first, rest in ((w[0], w[1:]) for w in _STARTERS.split()))
    yield letter, "[A-Za-z]", rf"\. (?:{starters}|M[rsRS]\.|</?[A-Za-z!][^>\n]*>)[ \n]"
    yield any_, rf"{inner}+(?:\.{inner}+)*\.(?i:{_any(_FILES)})", r"[ .?!,\n]"
    yield any_, rf"(?:{word}|{compound}|{dotted}|{_JOINED})\.", "[,;:\u3001]"
    # Addresses and tags.
    address = r"[^ \n\t<>\"|.!?(){},-]"
    yield letter, rf"(?i:https?)://[^ \n\t<>\"|(){{}}]+{address}", ""
    host = r"[wW]{3}\.(?:[^ \n\t<>\"|.!?(){},]+\.)+[a-zA-Z]{2,4}"
    domain = r"(?:[^ \n\t`'\"<>|.!?(){},-_$]+\.)+(?:com|net|org|edu)"
    yield any_, rf"(?:{host}|{domain})(?:/[^ \n\t<>\"|()]+{address})?", ""
    yield any_, r"(?:<|&lt;)?[a-zA-Z0-9][^ \n\t\"<>|(){}]*@(?:[^ \n\t\"<>|(){}.]+\.)*[^ \n\t\"<>|(){}.]+>?", ""
    yield other, f"@[a-zA-Z_][a-zA-Z_0-9]*|\\#{mark}+", ""
    name = r"[A-Za-z][A-Za-z0-9:._\-]*"
    attribute = rf"{name}(?: *= *(?:'[^'\n]*'|\"[^\"\n]*\"))?"
    yield other, rf"<(?:[!?][A-Za-z-][^>\n]*|/{name} */?|{name}(?: +{attribute})* */? *)>", ""
    yield other, "&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|\\#[0-9]+);|(?i:&(?:amp|lt|gt|quot|apos|nbsp);)", ""
    # Numbers, fractions, dates, telephone numbers, years, money.
    yield any_, f"[-+]?(?:{numeral}+(?:[.:,\\xad\u066b\u066c]{numeral}+)*|(?:[.:,\\xad\u066b\u066c]{numeral}+)+)", ""
    yield any_, f"{numeral}{{1,2}}[-/]{numeral}{{1,2}}[-/]{numeral}{{2,4}}", ""
    yield any_, rf"(?:{numeral}{{1,4}}[- ])?{numeral}{{1,4}}(?:\\?/|\u2044){numeral}{{1,4}}", ""
    code = r"\([0-9]{2,3}\) ?|(?:\+\+?)?(?:[0-9]{2,4}[- ])?[0-9]{2,4}[- ]"
    yield "digit other", rf"(?:{code})[0-9]{{3,4}}[- ]?[0-9]{{3,5}}", ""
    yield "digit other", r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}", ""
    yield other, f"{_MARK}[2-9]0[sS]", ""
    yield other, f"{_APOSTROPHE}{numeral}{{2}}", "[ \n]"
    yield "letter other", r"[A-Z]*\$", ""
    yield "", "[\u207a\u207b\u208a\u208b]?(?:[\u2070\xb9\xb2\xb3\u2074-\u2079]+|[\u2080-\u2089]+)", ""
    # Apostrophes and quotation marks, smileys, runs of punctuation, and single signs.
    yield other, "(?i:'t)", "(?i:is|was)"
    yield other, f"'{_CLITIC_LETTERS}(?![A-Za-z])|(?:[’\x92]|&apos;){_CLITIC_LETTERS}", ""
    yield other, f"(?i:{_APOSTROPHE}n{_APOSTROPHE}|'n(?=[ \n])|[’\x92]n|{_APOSTROPHE}(?:em|till?|cause))", ""
    yield other, r"[<>]?[:;=]['*o-]?[()@DOP\[\]dp{|\\]", "[^A-Za-z0-9]"
    yield other, r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)", ""
    yield other, r"\.{3,}|\. \. \.|[?!]+|\*+|_+|@+|\#{2,}|<<|>>|-{5,}|-{2,4}|\\\*|-(?i:[lr][rsc]b)-", ""
    yield other, f"''|[{_QUOTES}]{{1,2}}", ""
    yield other, f"[!-/:-@\\[-`{{-~\xa1-\xac\xae-\xbf\xd7\xf7–—―…⅓⅔€₠\x80\x96\x97{_spans(_SYMBOLS)}]", ""
