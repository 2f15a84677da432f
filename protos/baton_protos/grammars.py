"""What the two services must agree on about grammars besides their text: the limit they are compiled within.

A scheduler compiles a grammar before it admits the request, so an executor with the same limit finds no surprise.
"""

from typing import Final

# A lexer state takes 1 to 2 kB: at most 40 MB for a row's matcher.
MAX_LEXER_STATES: Final = 20_000
