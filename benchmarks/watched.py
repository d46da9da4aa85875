"""A command run with its output in a log, while the last line of it is shown: its own progress bar, or what it prints."""

from __future__ import annotations

import codecs
import os
import re
import select
import subprocess
from collections.abc import Callable
from pathlib import Path

COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
EVERY = 1.0  # seconds after which the line is shown again, for the clock beside it
PATIENCE = 10  # seconds that a command has to end when it is told to


def run(command: list[str], log: Path, show: Callable[[str], None] | None = None, *, cwd: Path | None = None, columns: int = 0) -> int:
    """Run a command to its end, or end it where this process is interrupted.

    Args:
        command: and its arguments.
        log: file that everything it prints goes to, of a line that was drawn over and over the last state.
        show: called with the newest line whenever something was printed, and every second.
        cwd: where to run it; default here.
        columns: of a terminal that the command shall take its output for, so that it draws its progress bar; 0 for none.

    Returns: its exit status, negative where a signal ended it.

    Example:
        >>> import sys, tempfile
        >>> log, seen = Path(tempfile.mkdtemp()) / "log.txt", []
        >>> run([sys.executable, "-c", "print('1 of 2', end=chr(13)); print('2 of 2')"], log, seen.append)
        0
        >>> log.read_text(), seen[-1]
        ('2 of 2\\n', '2 of 2')
    """
    read, write = _terminal(columns) if columns else os.pipe()
    try:
        # not held back in the command's buffer until it ends
        process = subprocess.Popen(command, cwd=cwd, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdin=subprocess.DEVNULL, stdout=write, stderr=write)
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
    try:
        with log.open("w") as file:
            _follow(read, file, show)
        return process.wait()
    except BaseException:
        # an interruption from the keyboard has reached it as well
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    finally:
        os.close(read)


def _follow(read: int, file, show: Callable[[str], None] | None) -> None:
    text, rest, shown = codecs.getincrementaldecoder("utf-8")(errors="replace"), "", ""
    try:
        while True:
            if select.select([read], [], [], EVERY)[0]:
                chunk = _some(read)
                if not chunk:
                    break
                *lines, rest = (rest + text.decode(chunk)).split("\n")
                states = [_last_state(line) for line in lines]
                file.writelines(state + "\n" for state in states)
                file.flush()
                shown = _last_state(rest) or next((state for state in reversed(states) if state), shown)
            if show is not None:
                show(shown)
    finally:
        if rest:  # a line without an end
            file.write(_last_state(rest) + "\n")


def _some(read: int) -> bytes:
    try:
        return os.read(read, 1 << 16)
    except OSError:  # how a terminal without a command ends
        return b""


def _last_state(line: str) -> str:
    """What stands there after carriage returns."""
    return next((state.rstrip() for state in reversed(COLOURS.sub("", line).split("\r")) if state.strip()), "")


def _terminal(columns: int) -> tuple[int, int]:
    """Both ends of a pseudo-terminal."""
    import fcntl
    import pty
    import struct
    import termios

    read, write = pty.openpty()
    fcntl.ioctl(write, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return read, write
