"""The progress of the suite: a bar over the benchmarks, and below it the newest line of the one that runs."""

from __future__ import annotations


class Bars:
    """Two lines at the bottom of a terminal. Where there is none, or no tqdm, only the ends of the benchmarks are told.

    Args:
        total: number of benchmarks.

    Example:
        >>> bars = Bars(1)
        >>> bars.begin("merge")
        >>> bars.show("case B: 3 of 10")
        >>> bars.drawn or bars.end("merge: ok")
        merge: ok
        >>> bars.close()
    """

    def __init__(self, total: int):
        try:
            from tqdm import tqdm
        except ImportError:
            self.drawn = False
            return
        self.suite = tqdm(
            total=total, desc="benchmarks", unit="", disable=None, bar_format="{desc} {n_fmt}/{total_fmt} |{bar:20}| {elapsed}{postfix}"
        )
        self.below = tqdm(total=0, position=1, bar_format="{desc}", leave=False, disable=None)
        self.drawn = not self.suite.disable

    @property
    def _width(self) -> int:
        return (self.suite.ncols or 80) - 4

    @property
    def columns(self) -> int:
        """Of a terminal whose lines fit below the bar; 0 where none is drawn."""
        return self._width if self.drawn else 0

    def begin(self, name: str) -> None:
        if self.drawn:
            self.suite.set_postfix_str(f"now {name}")
            self.below.set_description_str("")

    def show(self, line: str) -> None:
        if self.drawn:
            # no longer than the terminal: a second line would stay
            self.below.set_description_str("  " + line[: self._width])
            self.suite.refresh()  # its clock

    def end(self, told: str) -> None:
        if self.drawn:
            self.suite.update()
            self.suite.write(told)
        else:
            print(told, flush=True)

    def close(self) -> None:
        if self.drawn:
            self.below.close()
            self.suite.set_postfix_str("")
            self.suite.close()
