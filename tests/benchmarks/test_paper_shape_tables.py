"""The page of the paper's tables."""

from benchmarks.paper_shape_tables import BASE, report


def test_every_interval_is_told_in_numbers():
    finding = {"what": "gap", "value": 0.5, "low": 0.25, "high": 0.75, "goal": 0.7, "verdict": "not met"}
    scores = {"identity": (0.2, 0.6), "real_identity": (0.9, 0.9), "real_clip_i": (0.5, 0.5), "clip_i": (0.1, 0.3),
              "pres": (0.3, 0.3), "scene accuracy": (1, 1)}  # fmt: skip
    rows = [
        {"variant": variant, "subject": subject, "seed": 0, "scores": {name: both[i] for name, both in scores.items()}}
        for variant in (BASE, "with prior", "without prior")
        for i, subject in enumerate("ab")
    ]
    page = report({"about": {"seed": 0}, "findings": [finding]}, rows)
    assert "| gap | 0.500 [0.250, 0.750] | >= 0.7 | not met |" in page
    assert "| with prior | 0.400 [0.200, 0.600] | 0.200 [0.100, 0.300] | 1.000 [1.000, 1.000] |" in page
    assert "| real images (no self pairs) | 0.900 [0.900, 0.900] | 0.500 [0.500, 0.500] |" in page
