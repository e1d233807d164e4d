"""What `psyche watch` answers: a page, and its fragments as the runs are now."""

import hashlib
import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

from fastapi import FastAPI, Request, Response

from psyche_jax.errors import UserError
from psyche_jax.evaluate.curves import Across
from psyche_jax.evaluate.language import Language, Speaker
from psyche_jax.evaluate.pieces import environment, kind_sections, names
from psyche_jax.evaluate.run_records import RunRecord, read_run, samples_by_prompt
from psyche_jax.serve.guard import HEADERS
from psyche_jax.serve.private import private_app, serve_private
from psyche_jax.storage.files import bucket_errors, in_bucket

_FILES = ("config.yaml", "state.json", "metrics.jsonl", "samples.jsonl")
_BUCKET_SECONDS = 30  # between two looks into a bucket, which is written no more often
# Drawings carry their styles with them.
_STYLES = {
    "content-security-policy": HEADERS["content-security-policy"].replace(
        "style-src 'self'", "style-src 'self' 'unsafe-inline'"
    )
}
Stamp: TypeAlias = tuple[Any, ...]
"""By file of a run: what changes when it is written."""


def serve_watch(folders: Sequence[Path], host: str, port: int, language: Language) -> None:
    """Serve until interrupted.

    Args:
      folders: of runs, local or in buckets, begun or not.
      host, port: where; port 0 is any that is free.
      language: of the page.

    Raises:
      UserError: a folder holds something else than a run, or the address is taken.
    """
    folders = list({folder.resolve(): folder for folder in folders}.values())
    for folder in folders:
        with bucket_errors(folder):
            if (folder / "config.yaml").is_file():
                continue
            if folder.exists() and (not folder.is_dir() or any(child.suffix for child in folder.iterdir())):
                raise UserError(f"{folder}: is not a run; give the run's run.dir")
            inner = sorted(path.parent for path in folder.glob("*/config.yaml"))
            if inner:
                raise UserError(f"{folder}: is not a run, but contains runs: psyche watch {' '.join(map(str, inner))}")
            print(f"watch: {folder}: no run has started there yet; it will be shown once it does", file=sys.stderr)
    serve_private("watch", host, port, lambda token, hosts: watch_app(folders, token, hosts, language))


def watch_app(folders: Sequence[Path], token: str, hosts: Sequence[str], language: Language = "en") -> FastAPI:
    """The application. The page itself is public; what is in the runs wants the token."""
    app, allowed = private_app("psyche watch", token, hosts)
    say = Speaker(language, markup=True)
    plain = Speaker(language)
    templates = environment(say)
    fragments: Any = templates.get_template("watch/fragments.html.jinja").module
    shown = dict(zip(names(folders), folders, strict=True))
    drawing = threading.Lock()  # several pages ask for the same drawings: they are made once

    @lru_cache(maxsize=1)
    def read(stamps: tuple[Stamp, ...]) -> dict[str, RunRecord | str]:
        return {name: _read(folder, name, plain) for name, folder in shown.items()}

    @lru_cache(maxsize=2)
    def kinds(across: Across, stamps: tuple[Stamp, ...]) -> list[dict[str, Any]]:
        return kind_sections([run for run in read(stamps).values() if isinstance(run, RunRecord)], say, across)

    @app.get("/")
    def page() -> Response:
        text = templates.get_template("watch/page.html.jinja").render(names=list(shown))
        return Response(text, media_type="text/html", headers=_STYLES)

    @app.get("/page.css")
    def style() -> Response:
        return Response((files("psyche_jax.evaluate") / "report.css").read_bytes(), media_type="text/css")

    @app.get("/watch.js")
    def script() -> Response:
        return Response((files("psyche_jax.watch") / "watch.js").read_bytes(), media_type="text/javascript")

    @app.get("/view", dependencies=[allowed])
    def view(request: Request, by: Across = "step", since: str = "") -> Response:
        """The fragments by their places in the page; 204 if they are those of `since` still."""
        with drawing:
            stamps = tuple(_stamp(folder) for folder in folders)
            query = {name: value for name, value in request.query_params.items() if name != "since"}
            version = hashlib.sha256(repr((query, stamps)).encode()).hexdigest()[:16]
            if since == version:
                return Response(status_code=204)
            runs, sections = read(stamps), kinds(by, stamps)
            written = {name: _written(stamp) for name, stamp in zip(shown, stamps, strict=True)}
            parts = {
                "runs": fragments.runs(runs, shown, written),
                "curves": fragments.curves(sections),
                "samples": fragments.samples(_samples(runs, query, plain)),
                "settings": fragments.settings(sections),
            }
        # In ASCII, since a model may say half a surrogate pair, which UTF-8 cannot hold.
        return Response(json.dumps({"version": version, "fragments": parts}), media_type="application/json")

    return app


def _stamp(folder: Path) -> Stamp:
    if in_bucket(folder):
        return (int(time.monotonic() / _BUCKET_SECONDS),)
    found = []
    for name in _FILES:
        try:
            status = (folder / name).stat()
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            found.append((0, 0, 0))
    return tuple(found)


def _written(stamp: Stamp) -> str:
    """When the run last wrote metrics, by this machine's clock; empty if that is not known."""
    nanoseconds = stamp[2][2] if len(stamp) == len(_FILES) else 0
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(nanoseconds / 1e9)) if nanoseconds else ""


def _read(folder: Path, name: str, say: Speaker) -> RunRecord | str:
    """The run as it is now, or why it cannot be shown; that may have changed at the next look."""
    try:
        with bucket_errors(folder):
            if not (folder / "state.json").is_file():
                return say("No run has started here yet; it will be shown once it does.")
        return read_run(folder, name, scores=False)
    except (UserError, OSError) as error:
        return str(error)


def _samples(runs: Mapping[str, RunRecord | str], query: Mapping[str, str], say: Speaker) -> list[dict[str, Any]]:
    """Of each run with samples those of one step, `at0=12` for the first run; the newest unless one is asked for."""
    found = []
    for number, (name, run) in enumerate(runs.items()):
        steps = sorted({line["step"] for line in run.samples}) if isinstance(run, RunRecord) else []
        if not steps or not isinstance(run, RunRecord):
            continue
        asked = query.get(f"at{number}", "")
        place = next((place for place, step in enumerate(steps) if str(step) == asked), len(steps) - 1)
        found.append(
            {
                "name": name,
                "key": f"at{number}",
                "place": place + 1,
                "steps": steps,
                "earlier": steps[place - 1] if place else None,
                "later": steps[place + 1] if place + 1 < len(steps) else None,
                "groups": list(samples_by_prompt(run.samples, steps[place], say, every=True).values()),
            }
        )
    return found
