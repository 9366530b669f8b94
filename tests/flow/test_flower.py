"""The same rounds in Flower's simulation, and between its servers on loopback: the same model."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import layerwise as lw
from layerwise.core.errors import UserError

flwr = pytest.importorskip("flwr")
pytest.importorskip("sklearn")

RUN = {"clients": 3, "rounds": 2, "epochs": 1, "proxy": 50, "seed": 3}
FEW = {"clients": 2, "rounds": 1}  # each starts a process for each task
SOURCE = Path(lw.__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
APP = """
from layerwise.flow.flower import client_app, server_app
client = client_app()
server = server_app()
"""
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "rounds"
version = "1.0.0"
description = "Clients on loopback"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "layerwise"

[tool.flwr.app.components]
serverapp = "rounds:server"
clientapp = "rounds:client"

[tool.flwr.app.config]
"""


def environment(tmp_path):
    home = tmp_path / "flwr"
    home.mkdir()
    # Children find layerwise, and the packages beside it, where this process does.
    paths = os.pathsep.join([str(SOURCE), *(path for path in sys.path if "site-packages" in path)])
    return {
        **os.environ,
        "PYTHONPATH": paths,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONWARNINGS": "ignore",
    }


def settings(out, **more):
    return {**RUN, "study": "digits", "method": "l_dawa", "out": str(out), **more}


def in_toml(config):
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in config.items())


def same_as_ours(out, **more):
    ours = lw.federate("digits", method="l_dawa", **RUN | more)
    theirs = load_file(out / "model.safetensors")
    assert theirs.keys() == ours.tensors.keys()
    assert all(torch.equal(theirs[name], ours.tensors[name]) for name in theirs)
    return json.loads((out / "rounds.json").read_text())


SIMULATION = """
import json, sys
from flwr.simulation import run_simulation
from flwr.app import Context
from layerwise.flow import flower

config = json.loads(sys.argv[1])
told = flower.told
flower.told = lambda _: told(config)
client, server = flower.client_app(), None

from flwr.serverapp import ServerApp
server = ServerApp()
inner = flower.server_app()

@server.main()
def main(grid, context):
    context.run_config = config
    inner(grid, context)

run_simulation(
    server, client, num_supernodes=config["clients"],
    backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                    "init_args": {"num_cpus": 2, "include_dashboard": False,
                                  "object_store_memory": 100_000_000}},
)
"""


def test_the_simulation_engine_makes_the_model_that_we_make(tmp_path):
    out = tmp_path / "out"
    program = tmp_path / "simulate.py"
    program.write_text(SIMULATION)
    config = settings(out, faults='{"1": "nan"}')
    done = subprocess.run(
        [sys.executable, str(program), json.dumps(config)],
        env=environment(tmp_path), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert out.exists(), done.stdout[-2000:] + done.stderr[-4000:]
    rows = same_as_ours(out, faults={1: "nan"})
    assert [list(row["excluded"]) for row in rows] == [["1"], ["1"]]
    assert [row["clients"] for row in rows] == [[0, 2], [0, 2]]


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def wait_for(port):
    """Until somebody listens there."""
    until = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < until, f"nobody listens at {port}"
            time.sleep(0.5)


def test_servers_and_clients_on_loopback_make_it_too(tmp_path):
    out, env = tmp_path / "out", environment(tmp_path)
    app = tmp_path / "app"
    app.mkdir()
    (app / "rounds.py").write_text(APP)
    (app / "pyproject.toml").write_text(PROJECT + in_toml(settings(out, **FEW)))
    port = free_port()
    (tmp_path / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\n'
        f'address = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    started = []

    def start(*line):
        with (tmp_path / f"log-{len(started)}").open("wb") as log:
            started.append(subprocess.Popen(line, env=env, stdout=log, stderr=log))

    try:
        start(
            str(BIN / "flower-superlink"), "--insecure", "--port", str(port),
            "--disable-runtime-dependency-installation",
        )  # fmt: skip
        wait_for(port)
        for client in range(FEW["clients"]):
            start(
                str(BIN / "flower-supernode"), "--insecure",
                "--superlink", f"127.0.0.1:{port}", "--port", str(free_port()),
                "--node-config", f"partition-id={client} num-partitions={FEW['clients']}",
            )  # fmt: skip
        told = subprocess.run(
            [str(BIN / "flwr"), "run", str(app), "loopback"],
            env=env, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert told.returncode == 0, told.stdout + told.stderr
        until = time.monotonic() + 420
        while not out.exists() and time.monotonic() < until:
            time.sleep(1)
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(20)
    logs = "\n".join(file.read_text()[-3000:] for file in sorted(tmp_path.glob("log-*")))
    assert out.exists(), told.stdout + told.stderr + logs
    rows = same_as_ours(out, **FEW)
    assert [row["clients"] for row in rows] == [[0, 1]]


def test_refuses_what_it_does_not_know():
    from layerwise.flow.flower import strategy, told

    with pytest.raises(UserError, match="colour"):
        told({"study": "digits", "colour": "red"})
    among, method, options = told({**RUN, "method": "l_dawa", "option-warmup": 2})
    assert (method, options) == ("l_dawa", {"warmup": 2})
    with pytest.raises(UserError, match="no option"):
        strategy(among, "fedavg", {"warmup": 2})
