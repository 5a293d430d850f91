# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the timeline measures all kinds of records."""

import json

from specdist_launch.bench import trace


def test_it_reports_every_cost(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    trace.main(["--records", "10", "--rounds", "3"])
    cost = json.loads(capsys.readouterr().out)
    assert (cost["device"], cost["records"], cost["rounds"], cost["device_ns"]) == ("cpu", 10, 3, None)
    assert min(cost["off_ns"], cost["outside_ns"], cost["host_ns"], cost["part_ms"]) > 0
