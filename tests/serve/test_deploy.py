"""What ``deploy/`` says about running a server: checked piece by piece, with nginx and systemd where they are installed."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from mirada.cli.commands import app
from mirada.serve.settings import MB, ServeSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKER = (DEPLOY / "Dockerfile").read_text()
UNIT = (DEPLOY / "mirada.service").read_text()
NGINX = (DEPLOY / "nginx.conf").read_text()


def instructions() -> list[tuple[str, str]]:
    """(word, rest) of each instruction of the Dockerfile."""
    lines = [line for line in DOCKER.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(None, 1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]  # type: ignore[misc]


def of(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def served(words: list[str]) -> dict:
    """The options of a command line ``mirada serve ...``; typer.Exit or an error of usage where it is none."""
    assert Path(words[0]).name == "mirada" and words[1] == "serve"
    command = typer.main.get_command(app)
    return command.commands["serve"].make_context("serve", words[2:]).params  # type: ignore[attr-defined]


def test_the_image_is_small_safe_and_says_that_it_was_never_built():
    assert "never been built" in DOCKER.splitlines()[0]
    assert [base.split()[0] for base in of("FROM")] == ["python:3.11-slim"] * 2
    last = instructions()[[i for i, (word, _) in enumerate(instructions()) if word == "FROM"][-1] :]
    assert [rest for word, rest in last if word == "USER"] == ["mirada"]  # and nothing makes it root again
    torch = next(line for line in of("RUN") if "torch" in line)
    assert "https://download.pytorch.org/whl/cpu" in torch and "--no-deps" in torch
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match("^torch==", line)]
    assert len(pinned) == 1  # what the command's grep finds
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any('".[serve]"' in line for line in of("RUN")) and "serve" in extras
    assert not re.search(r"snapshot|huggingface|mirada download", "\n".join(of("RUN")))


def test_what_the_image_copies_is_there_and_let_through():
    let = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = [source for rest in of("COPY") if "--from" not in rest for source in rest.split()[:-1]]
    assert sources and all((ROOT / source).exists() for source in sources)
    assert sorted(sources) == sorted(let)
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [
        package["project"]["readme"],
        *package["project"]["license-files"],
        *package["tool"]["setuptools"]["ext-modules"][0]["sources"],
    ]
    assert all(any(fnmatch.fnmatch(file, source) or file.startswith(f"{source}/") for source in sources) for file in needed)


def test_the_health_check_tells_a_server_from_none(server):
    words = json.loads(of("HEALTHCHECK")[0].split("CMD", 1)[1])
    assert words[0] == "python" and "127.0.0.1:8000/health" in words[2]
    for port, code in ((server.url.rpartition(":")[2], 0), ("9", 1)):
        script = words[2].replace(":8000/", f":{port}/")
        done = subprocess.run([sys.executable, words[1], script], capture_output=True, timeout=300)
        assert done.returncode == code


def test_the_commands_are_those_of_mirada_serve():
    (command,) = of("CMD")
    assert served(json.loads(command)) == served(["mirada", "serve"]) | {"host": "0.0.0.0", "port": 8000}
    (line,) = re.findall("^ExecStart=(.*)$", UNIT, re.M)
    params = served(line.split())
    assert params["model"] == ["mini"] and params["host"] == "127.0.0.1" and params["config"] == "/etc/mirada/serve.yaml"
    with pytest.raises(Exception, match="no-such"):  # a misspelt option would be seen
        served(["mirada", "serve", "--no-such"])


def test_times_and_sizes_fit_the_servers_own():
    settings = ServeSettings()
    assert int(re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.M)[0]) > settings.drain_seconds
    assert "KillMode=mixed" in UNIT  # else SIGTERM reaches the workers of requests that are drained
    assert int(re.findall(r"client_max_body_size (\d+)m;", NGINX)[0]) * MB >= settings.max_body_bytes
    for needed in ("proxy_buffering off;", "proxy_http_version 1.1;", "Upgrade    $http_upgrade;"):
        assert needed in NGINX


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_reads_the_unit(tmp_path):
    unit = tmp_path / "mirada.service"
    unit.write_text(UNIT.replace("/opt/mirada/bin/mirada", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    assert "mirada.service" not in done.stderr and str(unit) not in done.stderr, done.stderr


@pytest.mark.skipif(shutil.which("nginx") is None or shutil.which("openssl") is None, reason="nginx is not installed")
def test_nginx_reads_its_part(tmp_path):
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=x",
         "-keyout", "key.pem", "-out", "chain.pem"],
        cwd=tmp_path, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    part = NGINX.replace("/etc/ssl/mirada/fullchain.pem", f"{tmp_path}/chain.pem")
    (tmp_path / "part.conf").write_text(part.replace("/etc/ssl/mirada/privkey.pem", f"{tmp_path}/key.pem"))
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds)
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid;\nevents {{}}\nhttp {{ access_log off; {temporary} include {tmp_path}/part.conf; }}\n"
    )
    words = ["nginx", "-t", "-e", "stderr", "-p", tmp_path, "-c", tmp_path / "nginx.conf"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "[warn]" not in done.stderr, done.stderr
