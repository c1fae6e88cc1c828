"""Tars: the members of an archive that nobody vouches for, listed by their headers.

tarfile trusts a header: with a loop, with as much memory as it names, with the order of what follows. Checked here
before it does.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import Any

from .errors import InputError

PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
EXTENDED = (*PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
HEADER, FIELDS, DIGITS = 1 << 20, 1000, 1000  # most bytes of an extended header, of its fields, of digits in a row


def members(path: str) -> Iterator[tarfile.TarInfo]:
    """Every member of an uncompressed tar, in its order; those before the place where it is broken, too.

    Raises InputError or TarError there, and whatever else hostile bytes make tarfile stumble over.
    """
    tar: Any
    last = -1
    with tarfile.open(path, "r:", tarinfo=_Header) as tar:
        while (member := tar.next()) is not None:
            if member.size < 0 or member.offset <= last:  # by its PAX header, and would be listed for ever
                raise InputError(f"the tar's member {member.name} has no size or leads back; the tar is broken")
            last = member.offset
            tar.members.clear()  # which nobody asks for again, and whose headers may be large
            yield member
        # A header that is none ends a tar for tarfile as zeros do, without a word of what lies behind.
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise InputError(f"the tar's header at byte {tar.offset} is broken, and what lies behind it is not known")


class _Header(tarfile.TarInfo):
    """A tar's header, checked before tarfile trusts it with a loop, with memory or with a slow expression.

    _proc_member is what tarfile lets others override, and what every header goes through, one after an extended one
    too: newer patches of Python pass by both frombuf and fromtarfile.
    """

    def _proc_member(self, tar: Any) -> Any:
        if self.size < 0:  # leads back to itself
            raise InputError(f"the tar has a member of {self.size} bytes; it is broken")
        if self.type in EXTENDED and self.size > HEADER:  # is read at once
            raise InputError(f"the tar has a header of {self.size} bytes; expected at most {HEADER}")
        if self.type in PAX:
            at = tar.fileobj.tell()
            _check_fields(tar.fileobj.read(self.size))
            tar.fileobj.seek(at)
        if len(tar.pax_headers) > FIELDS:  # global ones, of which every member gets a copy
            raise InputError(f"the tar has more than {FIELDS} global fields")
        process: Any = super()
        return process._proc_member(tar)


def _check_fields(pax: bytes) -> None:
    """Of a PAX header: "LENGTH KEY=VALUE" lines. Before 3.11.10 and 3.12.6 tarfile takes lengths that make it read the
    same bytes again and again, and long runs of digits take it the square of their length.
    """
    at = count = 0
    while at < len(pax) and pax[at]:
        length = pax[at : at + 8].partition(b" ")[0]
        end, count = at + int(length) if length.isdigit() else at, count + 1
        if count > FIELDS or not at + 5 <= end <= len(pax) or pax[end - 1] != 10 or b"=" not in pax[at:end]:
            raise InputError("the tar has a PAX header that is broken")
        at = end
    if any(len(run) > DIGITS for run in re.findall(rb"\d+", pax)):
        raise InputError(f"the tar has a PAX header with more than {DIGITS} digits in a row")
