"""Two nodes, each in a network namespace of its own, with the manual's own command line; and what happens
when the cable is pulled.

Skipped where the system allows no user namespaces; no root is needed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest
from paths import ROOT, SUPPORT

from llm_trainer.run_dir import list_checkpoints, verify
from llm_trainer.training.logging.metrics import read_metrics

SCRIPT = SUPPORT.joinpath("two_nodes.sh")
NAMESPACES = ["unshare", "-rnump", "--fork", "--mount-proc", "--kill-child"]
BIN = Path(sys.executable).parent
# Framework's manual, with another number of nodes and smaller sizes; each node says its own rank.
TORCHRUN = (
    f"{BIN}/torchrun --nproc_per_node=1 --nnodes=2 --node_rank=$NODE_RANK "
    '--master_addr="192.168.1.1" --master_port=29500'
)
SIZES = """--hidden_size 32 --num_layers 2 --num_heads 4 --batch_size 8 --micro_batch_size 2
    --max_steps 12 --learning_rate 3e-3 --mixed_precision --warmup_steps 2 --eval_interval 6
    --save_interval 6 --logging_steps 1 --compile off --report_to []"""

pytestmark = pytest.mark.slow


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str]) -> Path:
    """A folder as the manual's: `processed_data` under it."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("needs unshare and ip (util-linux, iproute2)")
    cable = ["ip", "link", "add", "left0", "type", "veth", "peer", "name", "right0"]
    tried = subprocess.run([*NAMESPACES, *cable], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"no network namespaces here: {tried.stderr.strip()}")
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "raw").mkdir()
    (folder / "raw/text.txt").write_text("\n\n".join(tiny_texts), encoding="utf-8")
    command = [
        sys.executable,
        ROOT / "data_prep_tool.py",
        "--input_dir",
        "raw",
        "--output_dir",
        "processed_data",
    ]
    command += ["--vocab_size", "300", "--max_length", "32", "--tokenizer_type", "bpe"]
    subprocess.run(command, cwd=folder, env=environment(), check=True, capture_output=True)
    return folder


def train_command(save_dir: str, *more: str) -> str:
    sizes = " ".join([SIZES.replace("\n", " "), *more])
    return f"{ROOT}/train.py --data_dir ./processed_data --save_dir ./{save_dir} {sizes}"


def on_two_nodes(folder: Path, command: str, cut: str = "") -> list[tuple[int, int, str]]:
    """Run it on both; for each node its exit status, when it ended (Unix seconds), and what it said."""
    for old in folder.glob("node?.*"):
        old.unlink()
    whole = [*NAMESPACES, "sh", str(SCRIPT), str(folder), cut, "sh", "-c", command]
    done = subprocess.run(whole, env=environment(), capture_output=True, text=True, timeout=100, check=False)
    ends = []
    for node in (0, 1):
        said = (folder / f"node{node}.log").read_text(encoding="utf-8")
        assert (folder / f"node{node}.status").exists(), done.stderr + said
        status, when = map(int, (folder / f"node{node}.status").read_text(encoding="utf-8").split())
        ends.append((status, when, said))
    return ends


def losses(run: Path) -> Sequence[float]:
    return [line["loss"] for line in read_metrics(run) if "loss" in line]


def test_two_nodes_train_as_two_ranks_of_one_do(prepared: Path) -> None:
    ends = on_two_nodes(prepared, f"{TORCHRUN} {train_command('two')}")
    assert [status for status, _, _ in ends] == [0, 0], "\n".join(said for _, _, said in ends)
    assert "2 ranks" in ends[0][2]
    assert "run folder" not in ends[1][2]  # one rank talks
    one_node = f"{BIN}/torchrun --standalone --nproc_per_node=2 {train_command('one')}"
    subprocess.run(
        ["sh", "-c", one_node], cwd=prepared, env=environment(), check=True, capture_output=True, timeout=120
    )
    assert len(losses(prepared / "two")) == 12
    assert losses(prepared / "two") == losses(prepared / "one")


def test_when_the_cable_is_pulled_both_nodes_end_in_ten_seconds_by_name(prepared: Path) -> None:
    long = train_command("cut").replace("--max_steps 12", "--max_steps 1000000")
    ends = on_two_nodes(prepared, f"{TORCHRUN} {long}", cut="cut/checkpoint-6")
    pulled = int((prepared / "cut.time").read_text(encoding="utf-8"))
    for node, (status, _, said) in enumerate(ends):
        assert status != 0
        assert re.search(rf"rank {1 - node} |launcher of rank {node} cannot be reached", said), said
        ended = re.search(
            r"time +: (\S+)", said
        )  # of the rank; its launcher takes its own time on a busy machine
        assert ended is not None, said
        assert datetime.strptime(ended[1], "%Y-%m-%d_%H:%M:%S").timestamp() - pulled <= 10, said
    assert not [one for one in list_checkpoints(prepared / "cut") if verify(one.path)]
