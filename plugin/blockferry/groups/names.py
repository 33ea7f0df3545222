"""Names of files as people read them."""

from __future__ import annotations


def shown(path: bytes) -> str:
    r"""Return a path to print: what is no UTF-8 or moves the cursor becomes `\xNN` or `\n`, a backslash two.

    Nothing is lost, and nothing that a name holds can speak to a terminal.
    """
    text = path.decode("utf-8", "surrogateescape")
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(each if each.isprintable() and each != "\\" else _escaped(each) for each in text)


def _escaped(character: str) -> str:
    plain = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character)
    return plain or "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))
