"""What borgmatic runs in borg's place: asks the process that started borgmatic what to do, over its socket.

Run as `python stand_in.py SOCKET WORDS...`, by a script that `standing_in.py` makes. The standard library only.

    -> {"words": [WORD, ...], "repository": BORG_REPO or "", "directory": WHERE}
    <- {"run": [WORD, ...]}         become this program, which finds our environment, its passphrase's pipe among it
    <- {"hand over": true}
    -> {"environment": {NAME: VALUE, ...}, "passphrase": TEXT or null}
    <- {"said": TEXT, "status": NUMBER}         when all is done
"""

from __future__ import annotations

import json
import os
import socket
import sys


def main() -> int:
    """Ask, and do it; return the exit status. 2, as of a borg that failed, if nobody answers."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[1])
        with connection.makefile("rwb") as stream:

            def ask(**request: object) -> dict[str, object]:
                stream.write(json.dumps(request).encode() + b"\n")
                stream.flush()
                answer: dict[str, object] = json.loads(stream.readline() or b"{}")
                return answer

            answer = ask(words=sys.argv[2:], repository=os.environ.get("BORG_REPO", ""), directory=os.getcwd())  # noqa: PTH109
            if "hand over" in answer:
                environment = dict(os.environ)
                answer = ask(environment=environment, passphrase=_passphrase(environment.pop("BORG_PASSPHRASE_FD", "")))
    run = answer.get("run")
    if isinstance(run, list):
        try:
            os.execvp(run[0], run)  # noqa: S606
        except OSError as error:
            answer = {"said": f"{run[0]}: {error.strerror}"}
    if answer.get("said"):
        print(answer["said"], file=sys.stderr)  # noqa: T201
    status = answer.get("status", 2)
    return status if isinstance(status, int) else 2


def _passphrase(descriptor: str) -> str | None:
    """Return what is in the pipe of a number; None if there is none."""
    if not descriptor:
        return None
    with os.fdopen(int(descriptor), encoding="utf-8") as pipe:
        return pipe.read()


if __name__ == "__main__":
    sys.exit(main())
