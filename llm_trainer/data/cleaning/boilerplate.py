"""Removes the boilerplate lines of web pages and scans: cookie notices, menus, page numbers and the like.

Only complete lines are removed, and only those that match one of the patterns below from beginning to end: a
sentence that mentions cookies is kept, and so is a list that is merely short. The patterns are English, as
are most of the pages whose boilerplate would otherwise count as text.

Each pattern begins with a fixed character, so that the search skips most lines after looking at one
character. It runs on bytes, because only ASCII needs to be lower-cased, which is fast there.
"""

from __future__ import annotations

import re

_MAX_LINE_BYTES = 200  # a longer line is not boilerplate
_NETWORK = "(?:facebook|twitter|x|linkedin|pinterest|reddit|whatsapp|instagram|youtube|email|social media)"
_OTHERS = r"(?: *(?:[|/-]|·|•) *[a-z ]{1,30})*"
_NEWSLETTER = r"(?: now| today| here)? (?:to|for) (?:our|the|my) (?:\w+ ){0,2}newsletter\b.{0,80}"
_COOKIES = r" (?:web ?)?site uses cookies\b.*"
_RIGHTS = rf".{{0,120}}all rights reserved\.?{_OTHERS}"
_ON = rf"(?: this)?(?: (?:page|post|article))?(?: on)? {_NETWORK}(?:[ ,|/&]+(?:and )?{_NETWORK})*\.?"
_LOGIN = r"(?: *(?:\||/|or|·) *(?:log ?in|sign ?in|sign ?up|register|subscribe))+"
_MORE = r" (?:more|all)(?: »| ›| >|\.\.\.|…)?"

# The beginnings of a line (separated by |) and a pattern for the rest of it, in lower case.
_PATTERNS = {
    "this|our|the": _COOKIES,
    "we": r" use (?:our own |third[- ]party )?cookies\b.*",
    "by": r" (?:continuing|using|browsing)\b.{0,120}(?:cookies|privacy policy|terms of (?:use|service)).*",
    "accept|reject|manage": r" (?:all )?cookies",
    "cookie|privacy": rf" (?:policy|settings|preferences|notice){_OTHERS}",
    "terms": rf" (?:of (?:use|service)|and conditions){_OTHERS}",
    "copyright|©|\\(c\\)": _RIGHTS,
    "all": r" rights reserved\.?",
    "skip": r" to (?:main )?(?:content|navigation)",
    "jump": r" to (?:navigation|search|content)(?:, search)?",
    "back|return": r" to (?:the )?top",
    "toggle": r" (?:navigation|menu|search)",
    "share": rf"(?:{_ON}| this(?: (?:page|post|article|story))?:?)",
    "tweet|pin|follow us|like us|find us": _ON,
    "subscribe|sign up|sign-up": _NEWSLETTER,
    "log in|login|sign in|sign up|register": _LOGIN,
    "click": r" here (?:to|for) .{1,100}",
    "read|see|show|load|view": _MORE,
    "continue": r" reading\b.{0,100}",
    "please enable|please turn on|enable|turn on": r" (?:javascript|cookies)\b.{0,120}",
    "you need to": r" enable javascript\b.{0,120}",
    "javascript": r" (?:is|must be|seems to be) (?:currently )?(?:enabled|disabled|required)\b.{0,120}",
    "advertisement|advertisements|sponsored|sponsored content": "",
    "related articles|related posts|related stories": "",
    "leave": r" a (?:comment|reply)(?: cancel reply)?",
    "no": r" (?:comments?|repl(?:y|ies)|shares?|likes?)",
    "[0-9]": r"\d* (?:comments?|repl(?:y|ies)|shares?|likes?)",
    "page": r" \d+(?: of \d+)?",
    "-|–|—": r" ?\d{1,4} ?(?:-|–|—)",
    "loading": r"(?:\.\.\.|…)",
}
_LINE = re.compile(
    r"\n[ \t]*+(?:{})[ \t]*(?=\n)".format(
        "|".join(first + rest for beginnings, rest in _PATTERNS.items() for first in beginnings.split("|"))
    ).encode()
)


def remove_boilerplate(text: str) -> str:
    """Return a text, which must be complete lines, without its boilerplate lines."""
    lowered = b"\n" + text.encode("utf-8").lower() + b"\n"
    found = [
        match.start() for match in _LINE.finditer(lowered) if match.end() - match.start() <= _MAX_LINE_BYTES
    ]
    if not found:
        return text
    dropped, number, seen = set(), 0, 0
    for position in found:
        number += lowered.count(b"\n", seen, position)
        seen = position
        dropped.add(number)
    return "\n".join(line for index, line in enumerate(text.split("\n")) if index not in dropped)
