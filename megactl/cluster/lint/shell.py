"""A tokenizer of bash for batch scripts: commands, words, what is expanded, here-documents. It reads; nothing is ever executed.

Time is linear in the text: every character is passed once, and what nests (`$(...)`, quotes) is kept on a stack, not on the call stack.
What it does not do: aliases, `eval`, a `case` inside `$(...)`. Source of the grammar: bash(1), "Shell grammar" and "Quoting".
"""

from __future__ import annotations

import bisect
import re

from megactl.cluster.lint.syntax import Assignment, Command, Comment, Expansion, Heredoc, Parsed, Word

_NAME = re.compile(r"[A-Za-z_]\w*")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(?:\[[^\]\s]*\])?\+?=")
_PLAIN = re.compile(r"[^\s;&|()<>\\'\"$`]+")
_PLAIN_QUOTED = re.compile(r"[^\"\\$`]+")
_PLAIN_NESTED = re.compile(r"[^\\'\"`(){}$#\s]+|\s+")
_REDIRECTION = re.compile(r"&>>|&>|<<<|<<-|<<|<&|<>|>>|>&|>\||<|>")
_CONTROL = re.compile(r";;&|;;|;&|&&|\|\||\|&|[;&|]")
_FUNCTION = re.compile(r"\(\s*\)")
_OPEN = frozenset(("if", "while", "until", "for", "case", "{", "select"))
_CLOSE = frozenset(("fi", "done", "esac", "}"))
_KEYWORDS = frozenset(("if", "then", "elif", "else", "fi", "while", "until", "do", "done", "{", "}", "!", "time", "esac"))
_DECLARE = frozenset(("export", "declare", "typeset", "readonly", "local"))
_CLOSER = {"(": ")", "{": "}"}


def parse(text: str) -> Parsed:
    """The commands of a bash script, in order. Never fails: what is not closed is in `unclosed`, and what could be read is there."""
    return _Scanner(text).run()


def expansions_of(body: str, line: int) -> tuple[Expansion, ...]:
    """What the shell replaces in the body of an unquoted here-document whose first line has number `line`."""
    scanner = _Scanner(body, first_line=line)
    found: list[Expansion] = []
    while scanner.at < len(body):
        scanner.quoted_piece(found, plain=re.compile(r"[^\\$`]+"))
    return tuple(found)


class _Scanner:
    def __init__(self, text: str, first_line: int = 1) -> None:
        self.text, self.at = text, 0
        self._breaks = [match.start() for match in re.finditer("\n", text)]
        self._first_line = first_line
        self._commands: list[Command] = []
        self._comments: list[Comment] = []
        self._unclosed: list[tuple[int, str]] = []
        self._pending: list[Heredoc] = []
        self._cases: list[bool] = []  # for each open `case`: whether a pattern is expected
        self._depth = 0
        self._before = ""
        self._current = Command(first_line, "", 0)
        self._continued = False

    def line(self, offset: int | None = None) -> int:
        """Number of the line that holds `offset` (default: where we are)."""
        return self._first_line + bisect.bisect_left(self._breaks, self.at if offset is None else offset)

    def run(self) -> Parsed:
        while self.at < len(self.text):
            self._step()
        self._end("")
        for heredoc in self._pending:
            self._unclosed.append((self.line(len(self.text)), f"<<{heredoc.delimiter}"))
        return Parsed(tuple(self._commands), tuple(self._comments), tuple(self._unclosed))

    def _step(self) -> None:
        text, letter = self.text, self.text[self.at]
        if letter == "\n":
            self._newline()
        elif letter.isspace():
            self.at += 1
        elif text.startswith("\\\n", self.at):
            self.at += 2
            self._continued = True
            return
        elif letter == "#":
            self._comment()
        elif letter in "<>&" and (match := _REDIRECTION.match(text, self.at)):
            self._redirect(match[0])
        elif letter in ";&|":
            self._operator()
        elif letter in "()":
            self._parenthesis(letter)
        else:
            self._take_word()
        if not letter.isspace():
            self._continued = False

    # -- commands ------------------------------------------------------------------------------------------------------------------------

    def _end(self, operator: str) -> None:
        command = self._current
        command.after = operator
        if command.words or command.assignments or command.redirections:
            self._commands.append(command)
            self._before = operator
        elif operator not in ("", "\n"):
            self._before = operator
        self._current = Command(self.line(), self._before, self._depth)

    def _newline(self) -> None:
        if self._in_pattern():
            self._current = Command(self.line(), "", self._depth)
        self._end("\n")
        self._before = ""
        self.at += 1
        pending, self._pending = self._pending, []
        while pending:
            if not self._read_heredoc(pending[0]):
                self._unclosed.append((pending[0].line - 1, f"<<{pending[0].delimiter}"))
                break
            pending.pop(0)
        self._current = Command(self.line(), "", self._depth)

    def _operator(self) -> None:
        match = _CONTROL.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        if self._in_pattern():
            self._current = Command(self.line(), "", self._depth)
        elif self._testing():
            return
        else:
            self._end(match[0])
            if match[0] in (";;", ";&", ";;&") and self._cases:
                self._cases[-1] = True

    def _parenthesis(self, letter: str) -> None:
        current = self._current
        if self._testing():
            self.at += 1
        elif self._in_pattern():
            self.at += 1
            if letter == ")":
                self._cases[-1] = False
                self._current = Command(self.line(), ")", self._depth)
        elif letter == "(" and not current.words and self.text.startswith("((", self.at):
            self.at += 1
            self.skip(")")
        elif letter == "(" and len(current.words) == 1 and (match := _FUNCTION.match(self.text, self.at)):
            self.at = match.end()
            self._current = Command(self.line(), "", self._depth)
        else:
            self._end(letter)
            self.at += 1
            self._depth = max(0, self._depth + (1 if letter == "(" else -1))
            self._current = Command(self.line(), letter, self._depth)

    def _testing(self) -> bool:
        words = self._current.words
        return bool(words) and words[0].raw == "[[" and words[-1].raw != "]]"

    def _in_pattern(self) -> bool:
        return bool(self._cases) and self._cases[-1]

    def _take_word(self) -> None:
        current, start = self._current, self.at
        if not current.words and not current.assignments:
            current.line = self.line()
        word = self.word()
        if word.raw.isdigit() and self.text[self.at : self.at + 1] in ("<", ">"):
            return  # the file descriptor of a redirection
        if (not current.words or current.words[0].raw in _DECLARE) and (match := _ASSIGNMENT.match(word.raw)):
            self._assign(match, word, start)
        elif not current.words and not current.assignments and word.raw in _KEYWORDS:
            self._keyword(word.raw)
        else:
            self._append(word)

    def _append(self, word: Word) -> None:
        words = self._current.words
        if not words and word.raw in ("for", "select", "case"):
            self._depth += 1
        words.append(word)
        if len(words) == 3 and words[0].raw == "case" and word.raw == "in":
            self._cases.append(True)
            self._current = Command(self.line(), "case", self._depth)

    def _keyword(self, keyword: str) -> None:
        self._depth = max(0, self._depth + (keyword in _OPEN) - (keyword in _CLOSE))
        if keyword == "esac" and self._cases:
            self._cases.pop()
        self._current = Command(self.line(), keyword, self._depth)

    def _assign(self, match: re.Match[str], word: Word, start: int) -> None:
        append = match[0].endswith("+=")
        if len(word.raw) == match.end() and self.text.startswith("(", self.at):
            elements = self._array()
            value = Word(self.text[start : self.at], " ".join(item.text for item in elements), word.line)
            self._current.assignments.append(Assignment(match[1], value, tuple(elements), append))
            return
        value = Word(word.raw[match.end() :], word.text[match.end() :], word.line, word.expansions)
        self._current.assignments.append(Assignment(match[1], value, append=append))

    def _array(self) -> list[Word]:
        opened, words = self.line(), []
        self.at += 1
        while self.at < len(self.text):
            letter = self.text[self.at]
            if letter == ")":
                self.at += 1
                return words
            if letter == "#":
                self._comment()
            elif letter.isspace() or letter in ";&|<>(":
                self.at += 1
            elif self.text.startswith("\\\n", self.at):
                self.at += 2
            else:
                words.append(self.word())
        self._unclosed.append((opened, "("))
        return words

    def _comment(self) -> None:
        end = self.text.find("\n", self.at)
        end = len(self.text) if end < 0 else end
        self._comments.append(Comment(self.line(), self.text[self.at : end], self._continued))
        self.at = end

    # -- redirections and here-documents -------------------------------------------------------------------------------------------------

    def _redirect(self, operator: str) -> None:
        if self._testing():
            self.at += len(operator)
            return
        if operator in ("<", ">") and self.text.startswith("(", self.at + 1):
            self._append(self.word())  # process substitution
            return
        self.at += len(operator)
        while self.text[self.at : self.at + 1] in (" ", "\t"):
            self.at += 1
        if not self._current.words and not self._current.assignments:
            self._current.line = self.line()
        target = self.word()
        if operator in ("<<", "<<-"):
            quoted = target.quoted or "\\" in target.raw
            heredoc = Heredoc(target.text, quoted, operator == "<<-", line=self.line())
            self._pending.append(heredoc)
            self._current.heredocs.append(heredoc)
        else:
            self._current.redirections.append((operator, target))

    def _read_heredoc(self, heredoc: Heredoc) -> bool:
        start, heredoc.line = self.at, self.line()
        while self.at < len(self.text):
            begin, end = self.at, self.text.find("\n", self.at)
            end = len(self.text) if end < 0 else end
            self.at = min(end + 1, len(self.text))
            row = self.text[begin:end]
            if (row.lstrip("\t") if heredoc.strip_tabs else row).rstrip("\r") == heredoc.delimiter:
                heredoc.body = self.text[start:begin]
                heredoc.expansions = () if heredoc.quoted else expansions_of(heredoc.body, heredoc.line)
                return True
        heredoc.body = self.text[start:]
        return False

    # -- words ---------------------------------------------------------------------------------------------------------------------------

    def word(self) -> Word:
        """The word that begins here (empty where a separator does)."""
        start, line, parts, found = self.at, self.line(), [], []
        while self.at < len(self.text):
            if match := _PLAIN.match(self.text, self.at):
                parts.append(match[0])
                self.at = match.end()
            elif self.text[self.at] in "<>" and self.at == start and self.text.startswith("(", self.at + 1):
                self.at += 2
                self.skip(")")
                parts.append(self.text[start : self.at])
            elif self.text[self.at] in "\\'\"$`":
                parts.append(self._special(found))
            else:
                break
        return Word(self.text[start : self.at], "".join(parts), line, tuple(found))

    def _special(self, found: list[Expansion]) -> str:
        text, letter = self.text, self.text[self.at]
        if letter == "\\":
            taken = text[self.at + 1 : self.at + 2]
            self.at += 2
            return "" if taken == "\n" else taken
        if letter == "'":
            return self._single(self.at + 1)
        if text.startswith("$'", self.at):
            return self._ansi_c()
        if letter == '"' or text.startswith('$"', self.at):
            return self._double(found)
        return self._expand(found, quoted=False)

    def _single(self, start: int) -> str:
        end = self.text.find("'", start)
        if end < 0:
            self._unclosed.append((self.line(), "'"))
            end = len(self.text)
        self.at = end + 1
        return self.text[start:end]

    def _ansi_c(self) -> str:
        match = re.compile(r"(?:[^'\\]|\\.)*", re.S).match(self.text, self.at + 2)
        assert match is not None
        if match.end() >= len(self.text):
            self._unclosed.append((self.line(), "$'"))
        self.at = match.end() + 1
        return match[0]

    def _double(self, found: list[Expansion]) -> str:
        opened, parts = self.line(), []
        self.at += 2 if self.text[self.at] == "$" else 1
        while self.at < len(self.text):
            if self.text[self.at] == '"':
                self.at += 1
                return "".join(parts)
            parts.append(self.quoted_piece(found))
        self._unclosed.append((opened, '"'))
        return "".join(parts)

    def quoted_piece(self, found: list[Expansion], plain: re.Pattern[str] = _PLAIN_QUOTED) -> str:
        """The next piece of text in which `$`, backticks and backslashes are alive: one run of plain text, or one of these."""
        if match := plain.match(self.text, self.at):
            self.at = match.end()
            return match[0]
        if self.text[self.at] != "\\":
            return self._expand(found, quoted=True)
        taken = self.text[self.at + 1 : self.at + 2]
        self.at += 2
        return "" if taken == "\n" else taken if taken and taken in '$`"\\' else f"\\{taken}"

    def _expand(self, found: list[Expansion], *, quoted: bool) -> str:
        start, line, name = self.at, self.line(), None
        following = self.text[start + 1 : start + 2]
        if self.text[start] == "`":
            self.at += 1
            self.skip("`")
        elif following in ("(", "{") and following:
            self.at += 2
            if following == "{" and (match := _NAME.match(self.text, self.at + (self.text[self.at : self.at + 1] in ("#", "!")))):
                name = match[0]
            self.skip(_CLOSER[following])
        elif match := _NAME.match(self.text, start + 1):
            self.at, name = match.end(), match[0]
        elif following and following in "@*#?$!-0123456789":
            self.at, name = start + 2, following
        else:
            self.at = start + 1
            return "$"
        written = self.text[start : self.at]
        found.append(Expansion(written, name, line, quoted))
        return written

    def skip(self, closer: str) -> None:
        """Go behind the `closer` of what was just opened; quotes and further openings inside are kept on a stack."""
        text, opened, stack = self.text, self.line(), [closer]
        while self.at < len(text):
            top, letter = stack[-1], text[self.at]
            if top not in "'\"" and (match := _PLAIN_NESTED.match(text, self.at)):
                self.at = match.end()
                continue
            self.at += 1
            if top == "'":
                if letter == "'":
                    stack.pop()
            elif letter == "\\":
                self.at += 1
            elif letter == top:
                stack.pop()
                if not stack:
                    return
            else:
                self._nest(stack, letter)
        self._unclosed.append((opened, {")": "$(", "}": "${"}.get(closer, closer)))

    def _nest(self, stack: list[str], letter: str) -> None:
        top, following = stack[-1], self.text[self.at : self.at + 1]
        if letter == "$" and following in _CLOSER:
            self.at += 1
            stack.append(_CLOSER[following])
        elif letter == "`" or (top != '"' and letter in "'\""):
            # Inside "${...}" an apostrophe is plain text.
            if letter != "'" or top != "}" or '"' not in stack:
                stack.append(letter)
        elif letter == "(" and top == ")":
            stack.append(")")
        elif letter == "#" and top == ")" and self.text[self.at - 2].isspace():
            end = self.text.find("\n", self.at)
            self.at = len(self.text) if end < 0 else end
