"""The metrics of several workers as one text in Prometheus's format. Each sample gets the label `worker`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

WORKER_UP = "catbus_worker_up"
"""The metric that is 0 for a worker that does not answer."""


def merge_metrics(texts: Mapping[int, bytes | None]) -> bytes:
    """Merge the metrics of workers by number. None stands for a worker that does not answer.

    The samples of one metric must stand together, so they are sorted by the metrics of the first worker that has them.
    """
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for worker, text in texts.items():
        if text is None:
            samples.setdefault(WORKER_UP, []).append(f'{WORKER_UP}{{worker="{worker}"}} 0.0')
            continue
        own: dict[str, list[str]] = {}
        for name, line, is_header in _lines(text):
            if is_header:
                own.setdefault(name, []).append(line)
                samples.setdefault(name, [])
            else:
                samples[name].append(_add_label(line, worker))
        for name, lines in own.items():
            headers.setdefault(name, lines)
    merged = [line for name in samples for line in (*headers.get(name, ()), *samples[name])]
    return "".join(f"{line}\n" for line in merged).encode()


def _lines(text: bytes) -> Iterator[tuple[str, str, bool]]:
    """Yield each line with the name of its metric, and whether it is a header (`# HELP` or `# TYPE`)."""
    name = ""
    for line in text.decode().split("\n"):
        if line.startswith("# "):
            name = line.split(" ", 3)[2]
            yield name, line, True
        elif line and name:
            yield name, line, False


def _add_label(line: str, worker: int) -> str:
    """Add the label to a sample: `name 1` or `name{label="value"} 1`."""
    end = next(index for index, character in enumerate(line) if character in "{ ")
    if line[end] == "{":
        return f'{line[:end]}{{worker="{worker}",{line[end + 1 :]}'
    return f'{line[:end]}{{worker="{worker}"}}{line[end:]}'
