"""The quickstart itself, unedited, on two nodes of a real SLURM under ZeRO-2 (bf16), its table at the end. Minutes."""

import json
import subprocess
import sys

import pytest
from slurm_cluster import ROOT


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_quickstart_on_two_nodes(cluster, site, cache_dir, tmp_path):
    fields = [f"data.cache_dir={cache_dir}", f"run.dir={tmp_path / 'run'}"]
    # The sandbox has no network: what the quickstart fetches is fetched before, as on a login node.
    subprocess.run([sys.executable, ROOT / "launcher" / "prepare_data.py", fields[0]], check=True, cwd=ROOT)
    job = cluster.submit(
        ROOT / "launcher" / "slurm" / "train.sbatch", ["recipe=quickstart", *fields], ["--nodes=2", "--time=60"], site
    )
    assert cluster.wait(job, timeout_s=1700) == "COMPLETED", cluster.output(job)
    assert cluster.restarts(job) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "run" / "result.json").read_text())}
    assert {"teacher", "homodistil", "one_shot", "plain_one_shot"} <= rows.keys()
    assert rows["homodistil"]["parameters"] < rows["teacher"]["parameters"] / 2
    events = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert len(events) >= 5 and "2 nodes (node[1-2])" in cluster.output(job)
