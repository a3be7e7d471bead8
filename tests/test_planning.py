"""Plans without the model's file and without the GPU: cards, predicted workspace, headers read from a server."""

import dataclasses
import http.server
import json
import os
import re
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from small import CFG

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import measure_workspace

from ds4jax.__main__ import main
from ds4jax.engine import cards, memory, planning, workspace
from ds4jax.engine.compiled_steps import CompiledSteps
from ds4jax.engine.routing_trace import Writer
from ds4jax.errors import Ds4Error
from ds4jax.io import published, remote, synthetic
from ds4jax.io.checkpoint import open_checkpoint
from ds4jax.settings import Settings, names
from ds4jax.tools import cli
from ds4jax.tools import memory as memory_tool

RTX = Settings.load("rtx_pro_6000")


@pytest.fixture(autouse=True)
def nothing_is_here(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(cards, "compiler_is_here", lambda: False)


@pytest.fixture
def run(capsys):
    def call(*argv):
        status = main(["memory", *argv])
        return status, *capsys.readouterr()

    return call


def rows(out):
    return {name: rest for name, *rest in (line.split() for line in out.splitlines()[2:])}


# ---- cards -----------------------------------------------------------------------------------------------------------
def test_every_config_names_a_known_card():
    for name in names():
        device = Settings.load(name).device
        assert device == "here" or cards.find(device).name == device


@pytest.mark.parametrize("name", ["h200", "NVIDIA H200", "rtx_pro_6000", "RTX PRO 6000", "gb10", "B200", "rtx5090"])
def test_cards_are_found_however_they_are_spelled(name):
    assert cards.find(name).name.lower().replace(" ", "") in name.lower().replace("_", "").replace(" ", "")


@pytest.mark.parametrize("name", ["RTX 4090", "NVIDIA GH200 480GB", "GB200", "H2000"])
def test_an_unknown_card_is_refused_with_those_known(run, name):
    status, out, err = run("--config=h200", f"--device={name}")
    assert status == 1
    known = "H200, H100, B200, RTX PRO 6000, RTX 5090, GB10, or here"
    assert err == f"error: device: found {name!r}, expected one of {known}\n"


@pytest.mark.parametrize("name", ["gpu24", "gpu32", "gpu48", "h100"])
def test_smaller_cards_keep_experts_on_the_host(run, name):
    status, out, _ = run(f"--config={name}")
    table = rows(out)
    assert status == 0 and table["fits"] == ["yes"] and 0 <= float(table["left"][0]) < 0.2
    assert float(table["weights"][0]) + float(table["host"][0]) == pytest.approx(80.759, abs=2e-3)
    some, every = (int(word) for word in table["experts"] if word.isdigit())
    assert every == 43 * 256 and float(table["experts"][0]) == pytest.approx(72.562 * some / every, rel=0.01)
    assert table["context"][0] == "1048576" and float(table["hits"][0][:-1]) == pytest.approx(
        100 * some / every, abs=0.1
    )


def test_a_trace_tells_how_often_experts_are_there(run, tmp_path):
    """Of few experts that are used much more often than the others, as many as there is room for are there in time."""
    rng, path = np.random.default_rng(0), tmp_path / "routing.trace"
    write, weight = Writer(path, synthetic.FULL), 1 / np.arange(1, 257)
    for _ in range(60):
        noise = rng.gumbel(size=(43, 1, 256)) + np.log(weight)
        write(np.argsort(-noise, axis=-1)[..., :6].astype(np.int32))
    write(np.broadcast_to(np.arange(256, dtype=np.int32)[:252].reshape(42, 6), (43, 42, 6)))
    status, out, _ = run("--config=gpu24", f"--routing_trace={path}", "--link_gb_s=25")
    alike, traced = ([line for line in out.splitlines() if line.startswith(name)] for name in ("hits", "speed"))
    (alike, told), speeds = alike, [float(line.split()[1]) for line in traced]
    assert "of 60 tokens decoded in the trace" in told and float(told.split()[1][:-1]) > 2 * float(
        alike.split()[1][:-1]
    )
    moved = float(told.rsplit(":", 1)[1].split()[0])
    read = (8.197 - 1.06) * 2**30 + 43 * 6 * 72.562 * 2**30 / 43 / 256  # less the embedding, which is float16
    assert speeds[1] == pytest.approx(1 / (read / 1792e9 + moved / 25), rel=0.02) and speeds[1] > speeds[0]
    assert status == 0 and "chunks             1  of prompts in the trace: " in out
    path.write_bytes(b"{}" + path.read_bytes())
    assert memory_tool.FLAGS["link_gb_s"].default == planning.LINK / 1e9
    status, _, err = run("--config=gpu24", f"--routing_trace={path}")
    assert status == 1 and "expected a trace of the model's experts: {'version': 1, 'layers': 43" in err


def test_a_card_that_is_here_is_asked_itself(monkeypatch):
    device = type("Device", (), {"device_kind": "NVIDIA H200"})()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert cards.find("H200").here() and not cards.find("H100").here()
    steps = CompiledSteps(synthetic.Synthetic(synthetic.FULL, synthetic.RECIPES["q2"]), Settings.load("h200"))
    assert cards.here() is cards.find("H200")
    assert workspace.predict(steps)["prefill"] > 2**30


# ---- the plan --------------------------------------------------------------------------------------------------------
def test_a_config_is_planned_on_any_machine(run):
    status, out, err = run("--config=rtx_pro_6000")
    assert (status, err) == (0, "")
    first, second, *_ = out.splitlines()
    assert first == f"shapes: known of {RTX.model}, which is not on this machine"
    assert second == "GiB on each device (NVIDIA RTX PRO 6000 Blackwell Workstation Edition)"
    table = rows(out)
    assert table["weights"][0] == "80.759"
    assert table["limit"][0] == f"{94.97 * 0.95:.3f}"
    assert " ".join(table["workspace"]).endswith("from configs/workspace.json")
    assert (table["fits"], table["drafter"][0]) == (["yes"], "yes")


def plan(**changes):
    settings = dataclasses.replace(RTX, **changes)
    return planning.steps(planning.shapes(settings)[0], settings)


def test_what_the_table_offers_fits_and_no_more_does():
    steps = plan(device="RTX PRO 6000")
    offered = rows("\n\n" + planning.describe(steps).split("\n", 1)[1])
    for key, step in (("batch", 1), ("ctx", 128)):
        n = int(offered["context" if key == "ctx" else key][0])
        changes = {"batch": 1} if key == "ctx" else {}
        assert memory.plan(plan(**changes, **{key: n})).fits
        if n < 2**20:
            assert not memory.plan(plan(**changes, **{key: n + step})).fits


def test_a_context_beyond_what_the_model_was_made_for(run):
    status, out, _ = run("--config=rtx_pro_6000", "--batch=1", "--ctx=2097152")
    assert status == 0 and (rows(out)["fits"][0], rows(out)["context"][0]) == ("yes", "2097152")


def test_a_card_that_is_too_small_is_told_so(run):
    status, out, _ = run("--config=rtx_pro_6000", "--device=RTX 5090")
    table = rows(out)
    assert status == 1
    assert [table[row][0] for row in ("fits", "context", "batch", "drafter")] == ["no", "none", "none", "no"]


def test_experts_are_wide_where_they_fit(run):
    """A third of the memory more for experts in IQ2_XXS, of which the steps compute the same."""
    wide, stored = plan(device="H200"), plan(device="H200", expert_layout="file")
    assert (wide.wide, stored.wide, plan(device="RTX PRO 6000").wide) == (True, False, False)
    more = memory.plan(wide).weights - memory.plan(stored).weights
    assert more == 43 * 2 * 256 * 2048 * 4096 * (102 - 66) // 256
    assert not plan(device="H200", kernels="xla", numerics="plain").wide
    assert not plan(device="H200", batch=80).wide
    assert not plan(device="H200", batch=1).wide
    _, out, _ = run("--config=h200")
    assert " ".join(rows(out)["weights"]).endswith("experts wide, see expert_layout")
    assert " ".join(rows(out)["batch"]).endswith("experts wide")


def test_only_0731_has_a_drafter():
    first = RTX.model.replace("-0731", "")
    assert "\ndrafter " in planning.describe(plan())
    assert "\ndrafter " not in planning.describe(plan(model=first))
    assert "\ndrafter " in planning.describe(plan(model=first, profile="0731"))


def test_a_drafter_that_is_asked_for_is_counted(run):
    """Its weights are the published file's, to the byte; its rings are as many as the table without it says."""
    without, with_it = memory.plan(plan()), memory.plan(plan(draft="auto"))
    assert with_it.weights - without.weights == published.DRAFTER_BYTES
    assert with_it.cache - without.cache == planning.rings(plan())
    status, out, _ = run("--config=rtx_pro_6000", "--draft=auto")
    assert status == 0 and "drafter" not in rows(out) and " ".join(rows(out)["workspace"]).endswith("of drafts")
    assert memory.plan(plan(model=RTX.model.replace("-0731", ""), draft="auto")).weights == without.weights
    status, _, err = run("--config=rtx_pro_6000", "--draft=F.gguf")
    assert status == 1 and err == "error: draft: found 'F.gguf' for a model without a file, expected auto or off\n"


def test_several_devices_need_not_be_here(run):
    status, out, _ = run("--config=h200x2")
    assert status == 0 and 53 < float(rows(out)["weights"][0]) < 54  # half of the wide experts, and what is whole
    assert " ".join(rows(out)["workspace"]) == "? not known without compiling"
    assert " ".join(rows(out)["fits"]) == "yes without the workspace"
    assert re.search(r"\nlink +a token  0\.96 MB in 87 messages; 86 sums of 8 KiB take 1\.19 ms, by benchmarks/", out)
    assert re.search(r"\n +a chunk  1,443\.10 MB in 87 messages; 86 sums of 16,384 KiB take 7\.86 ms, by ", out)
    _, out, _ = run("--config=h200x4")
    assert "messages; the time of 86 sums of 8 KiB has not been measured\n" in out
    assert "link" not in rows(run("--config=h200")[1])


@pytest.mark.parametrize("change", [{"numerics": "plain", "kernels": "xla"}, {"dtype": "float32"}, {"kernels": "xla"}])
def test_the_formula_is_not_used_where_it_does_not_hold(change):
    assert workspace.predict(plan(**change)) == {} != workspace.predict(plan())
    small = synthetic.Synthetic(CFG, synthetic.RECIPES["q2"])
    assert workspace.predict(CompiledSteps(small, RTX, card=cards.find("H200"))) == {}


def test_rings_are_those_of_a_layer_per_stage():
    steps = plan(batch=2)
    assert planning.rings(steps) == 3 * 2 * (128 + 8) * (448 + 7 + 2 * 64)


@pytest.mark.parametrize("part, size", [("IQ2XXS-w2Q2K", 86_720_111_488), ("MXFP4Experts", 155_976_458_848)])
def test_known_shapes_are_those_of_the_published_files(part, size):
    found = published.published(Settings(f"hf:{published.REPOSITORY}/DeepSeek-V4-Flash-{part}-x-0731.gguf"))
    assert found
    weights = memory.plan(CompiledSteps(found, RTX, card=cards.find("H200"))).weights
    assert 0 < size - weights < 6e6  # the header, with the tokenizer


def test_a_file_that_nobody_knows_is_not_guessed(run):
    status, _, err = run("--config=h200", "--model=hf:owner/repo/DeepSeek-V4-Flash-IQ2XXS-w2Q2K-x.gguf")
    assert status == 1 and err.endswith("or read its header with --remote\n")
    status, _, err = run("--config=h200", "--model=tiny", "--remote")
    assert (status, err) == (1, "error: remote: found model 'tiny', expected hf:OWNER/REPO/FILE or an address\n")


# ---- headers from a server -------------------------------------------------------------------------------------------
class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the server's `files` by name; notes what of them was sent."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        server: Server = self.server  # type: ignore[assignment]
        content = server.files.get(self.path.rpartition("/")[2])
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if content is None or not asked:
            self.send_error(404)
            return
        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(content))
        part = content[start:stop]
        if server.ranges:
            self.send_response(206)
            if server.range is None:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        else:
            self.send_response(200)
            part = content
        if server.range:
            self.send_header("Content-Range", server.range)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[: len(part) - server.cut])
        server.sent.append((start, stop))


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.sent: list[tuple[int, int]] = []
        self.ranges, self.cut = True, 0
        self.range: str | None = None  # said instead of what is true

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, request, client_address):
        """A client that had enough hangs up."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("remote") / "m.gguf"
    synthetic.write_synthetic(path, CFG, 1, types=synthetic.RECIPES["q2"])
    return path


def test_a_header_is_all_that_is_fetched(server, model, run, monkeypatch):
    monkeypatch.setattr(remote, "FIRST", 4096)
    server.files = {"m.gguf": model.read_bytes()}
    there, here = open_checkpoint(remote.open_url(server.url("m.gguf"))), open_checkpoint(model)
    assert (there.cfg, there.types) == (here.cfg, here.types)
    last = server.sent[-1][1]
    assert [start for start, _ in server.sent] == [0, *(stop for _, stop in server.sent[:-1])]
    first_data = min(t.offset for t in here.file.tensors.values())
    assert first_data <= last + 64 and last < max(2 * first_data, 8192)
    status, out, _ = run("--config=h200", f"--model={server.url('m.gguf')}", "--nocompile")
    assert status == 0 and out.startswith(f"shapes: the header of {server.url('m.gguf')}\n")
    here.file.close()


def test_a_header_of_a_repository(server, model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url("")[:-1])
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        server.url("") + "{repo_id}/resolve/{revision}/{filename}",
    )
    server.files = {"m.gguf": model.read_bytes()}
    source, origin = planning.shapes(Settings("hf:owner/repo/m.gguf"), from_server=True)
    assert source.cfg == open_checkpoint(model).cfg and origin == "shapes: the header of hf:owner/repo/m.gguf"


def refuse(server, name="m.gguf"):
    with pytest.raises(Ds4Error) as refusal:
        open_checkpoint(remote.open_url(server.url(name)))
    assert "\n" not in str(refusal.value)
    return str(refusal.value).removeprefix(server.url(name) + ": ")


def test_what_cannot_be_read_is_named(server, model, monkeypatch):
    data = model.read_bytes()
    assert refuse(server) == "found status 404 (Not Found), expected a GGUF file"
    server.files["m.gguf"] = b"PK\3\4" + data[4:]
    assert refuse(server).startswith("magic: found b'PK\\x03\\x04', expected b'GGUF'")
    server.files["m.gguf"] = data[:5000]
    assert re.search(r"(at offset|ends at byte) \d+, found \d+( bytes)?$", refuse(server))
    server.files["m.gguf"] = data
    monkeypatch.setattr(remote, "FIRST", 1024)
    monkeypatch.setattr(remote, "MOST", 2048)
    assert refuse(server).startswith("found no end of the header in 2048 bytes: ")
    server.cut = 10
    assert "cannot be fetched: " in refuse(server) or "the transfer ended" in refuse(server)
    server.cut, server.ranges = 0, False
    assert refuse(server) == "found status 200, expected 206: the server must answer range requests"


@pytest.mark.parametrize("said", ["", "bytes 0-99/*", "bytes 1-100/5000"])
def test_a_range_that_is_not_the_one_asked_for(server, model, said):
    server.files["m.gguf"], server.range = model.read_bytes(), said
    assert refuse(server) == f"found the range {said or None!r}, expected 'bytes 0-LAST/SIZE'"


def test_an_unreachable_server_is_one_line(run):
    status, _, err = run("--config=h200", "--model=http://127.0.0.1:9/m.gguf")
    assert status == 1 and err.startswith("error: http://127.0.0.1:9/m.gguf: cannot be fetched: Connect")


# ---- download --------------------------------------------------------------------------------------------------------
def test_a_download_shows_the_plan_first(monkeypatch, capsys):
    seen = []
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE")
    monkeypatch.setattr("ds4jax.tools.download.download", lambda *file: seen.append(capsys.readouterr()) or Path("x"))
    assert main(["download", "--config=rtx_pro_6000", "--device=RTX 5090"]) == 0
    ((out, err),) = seen
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"  # nor is a GPU's memory taken meanwhile
    assert out == "" and err.startswith("shapes: known of hf:") and "\nfits              no\n" in err
    monkeypatch.setattr(remote, "open_hf", lambda *_: (_ for _ in ()).throw(Ds4Error("no ranges")))
    assert main(["download", "--config=h200", "--model=hf:owner/repo/x.gguf"]) == 0
    assert seen[1].err == "no memory plan: no ranges\n"


def test_the_table_is_fitted_to_its_rows_and_has_every_card(tmp_path, monkeypatch):
    table = json.loads(workspace.PATH.read_text())
    assert table["cards"] == measure_workspace.fit(table["rows"])
    assert table["cards"].keys() == {card.name for card in cards.CARDS}
    expected = workspace.PATH.read_text()
    monkeypatch.setattr(workspace, "PATH", tmp_path / "workspace.json")
    workspace.PATH.write_text(json.dumps(table | {"cards": {}}))
    assert cli.run(measure_workspace.main, measure_workspace.FLAGS, None, ["--fit"]) == 0
    assert workspace.PATH.read_text() == expected


def test_the_formula_gives_what_was_compiled():
    """To 2.5 %: bytes are not quite linear, and heaps have holes.

    Decoding: 0.15 MB for the layers after the fourth; and 10 %, as it is H200's on every card, which is below 1 MB.
    """
    table = json.loads(workspace.PATH.read_text())
    for card, layers, chunk, ctx, batch, nbytes in table["rows"]:
        settings = dataclasses.replace(RTX, device=card, ctx=ctx, batch=batch, prefill_chunk=chunk or 1)
        found = workspace.predict(planning.steps(planning.shapes(RTX)[0], settings))
        expected = nbytes + (15e4 if layers < 43 and not chunk else 0)
        assert found["prefill" if chunk else "decode"] == pytest.approx(expected, rel=0.025 if chunk else 0.1)


def test_what_an_h200_measured_is_predicted():
    """`ds4jax memory --config h200 --synthetic full` on an H200: benchmarks/h200-2026-11-28-memory.

    Since then a step of prefill needs 0.8 GB less.
    """
    found = memory.plan(plan(**dataclasses.asdict(Settings.load("h200", expert_layout="file"))))
    measured = {"weights": 86714775900, "cache": 5578873360, "total": 95152010816, "limit": 142606336000}
    for name, nbytes in measured.items():
        assert getattr(found, name) == pytest.approx(nbytes, rel=0.02)
