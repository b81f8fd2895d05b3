"""``mirada download``: a model from a hub, with progress on stderr and its directory on stdout."""

from __future__ import annotations

from mirada import hub


def run(model: str, source: str, revision: str | None, cache_dir: str | None, token: str | None, endpoint: str | None) -> None:
    """Fetch ``model`` and print where it lies."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def report(progress: hub.Progress) -> None:
            if progress.name not in tasks:
                tasks[progress.name] = bars.add_task(progress.name, total=progress.total, completed=progress.reused)
            bars.update(tasks[progress.name], completed=progress.done)

        place = hub.resolve(
            model, source, revision, token=token, offline=False, cache_dir=cache_dir, endpoint=endpoint, report=report
        )  # fmt: skip
    print(place)
