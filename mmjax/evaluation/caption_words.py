"""Words of a caption as COCO's scripts count them: a stand-in for Stanford's Penn Treebank tokenizer, without Java.

PTB-like: for ordinary captions the words are those of pycocoevalcap 1.2 with stanford-corenlp 3.4.1
(`-preserveLines -lowerCase`, then some marks dropped); telephone numbers, smileys with noses and other rare texts may
differ. The rules were derived by running that program.

    >>> caption_words("A man's T-shirt, (red) -- it doesn't fit.")
    ['a', 'man', "'s", 't-shirt', '-lrb-', 'red', '-rrb-', 'it', 'does', "n't", 'fit']
"""

import re

DROPPED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
"""Brackets are not among them: the scripts look for -LRB- and the like after everything was lower-cased."""
WRITTEN = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "£": "#", "€": "$", "¢": "cents", "…": "...", "–": "--", "—": "--", "―": "--",
    '"': "''", "“": "``", "”": "''", "«": "``", "»": "''", "‘": "`",
    "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&nbsp;": "",
}  # fmt: skip
BEFORE = str.maketrans({"’": "'", "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 "})
SMILEY = re.compile(r"[:;=]-?[()]")
ABBREVIATIONS = """
    adm al ala apr ariz assn assoc asst atty aug ave bldg blvd brig bros calif capt cf cmdr co col colo comdr conn corp
    cos cpl ct dec dept det dr drs esq est etc ext feb fla fri ft ga gen gov govs hon inc ind intl jan jr jul jun kan
    kans ky lieut lt ltd maj mar md messrs mfg mich minn mo mon mont mr mrs ms mt natl neb nev nov oct okla penn pfc ph
    plc pres prof profs pty pvt rd rep reps rev sen sens sep sept seq sgt spc sq sr st ste supt tel tenn thu thurs tue
    tues univ va vs vt wed wis wisc wyo
"""
"""Words that keep their period."""
BEFORE_NUMBERS = "art|ca|figs?|nos?|op|pp|prop"
"""Words that keep their period before a number."""
L, W = r"[^\W\d_]", r"[^\W_]"
"""A letter; a letter or a digit."""
CLITIC = rf"(?:s|m|d|re|ve|ll)(?!{W})"
"""The endings after an apostrophe that are separate words; n't is another."""
UNIT = rf"(?:\d+(?:[.,:]\d+)+|{W}+(?:[_!?]{W}+)*)"
"""A part of a compound: 3.5, 10:30, or a word."""

TOKEN = re.compile(
    "|".join(
        (
            r"""https?://[^\s<>"]*[^\s<>".,;:!?')\]]""",
            rf"[\w.+-]+@[\w-]+(?:\.[\w-]+)+|{W}+@{W}+|[@#]{L}+(?:_{W}+)*",  # addresses, @somebody, #something
            rf"</?{L}[^<>]*>|&(?:amp|lt|gt|quot|apos|nbsp);",
            rf"{SMILEY.pattern}|:[dp]\b|\.\.\.|[!?]+|\*+|_+|>>|<<|''|``",
            rf"(?-i:[A-Z]+(?:&[A-Z]+)+)\b|[cf]#(?!{W})|c\+\+|(?:us|nz|[ac])\$",
            # Apostrophes: 't is, is n't, man 's, rock 'n' roll, the '90s, y' all, o'clock.
            rf"'t(?=(?:is|was)(?:\b|n't))|n't\b|'{CLITIC}|{L}+?(?=n't\b)",
            rf"'(?:em|til|cause)\b|'n'|'n(?!{W})|'\d(?:0s|\d)\b(?!')",
            rf"[jy]'(?={L})(?!{CLITIC})|(?:[cdlno]|qu|ma|ne|e)'(?!{CLITIC}){L}+|s'mores\b|ol'(?!{W})|{W}+-o'clock\b",
            r"can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b)|(?:lem|gim)(?=me\b)",
            # Periods: u.s., u.s.-made, plan b., ph.d., st., no. 5, what a typist left between sentences: end.the
            rf"(?:{L}\.)+(?!{L})(?:(?<=\w\.\w\.)(?:-{W}+)+)?|{L}+(?:\.{L}+)+\b(?:(?<=\bph\.d)\.)?",
            rf"(?:{'|'.join(ABBREVIATIONS.split())})\.|(?:{BEFORE_NUMBERS})\.(?=\s*\d)|{L}+\.(?=,)",
            rf"(?:[-+](?=\.?\d)|[,:](?=\d))?(?:\.\d+|{UNIT}(?:[-/]{UNIT})*)",
            r"\S",
        )
    ),
    re.IGNORECASE,
)


def caption_words(text: str) -> list[str]:
    """The words, in lower case: without standalone . , ; : - ? ! and quotation marks; brackets as -lrb- ...

    Clitics are words: "man's" is man 's, "doesn't" is does n't. Compounds are one word: "t-shirt", "black/white".
    Characters beyond Unicode's first plane (emoji) are dropped.
    """
    words = (_written(word) for word in TOKEN.findall(text.translate(BEFORE)))
    return [word for word in words if word and word not in DROPPED and word[0] <= "\uffff"]


def _written(word: str) -> str:
    if SMILEY.fullmatch(word):
        return word[:-1] + WRITTEN[word[-1]]
    return WRITTEN.get(word, word).lower()
