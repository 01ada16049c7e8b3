"""What a run would do and cost."""

from dbtrain.fleet.estimate import describe, plan_run
from tests.kit.fleet_run import RESULT, run_of_dogs
from tests.kit.main_job import small_config, write_job


def test_what_an_earlier_run_measured_is_what_this_one_will_cost(tmp_path):
    write_job(tmp_path, subjects="a:dog b:cat c:dog")
    config, out, earlier = small_config("prior.images=4"), tmp_path / "out", tmp_path / "earlier"
    unknown = plan_run(tmp_path / "photos.csv", config, out, None)
    assert (unknown["subjects"], unknown["classes"], unknown["photos"]) == ({"waiting": 3}, 2, 6)
    assert unknown["prior_images"] == 8 and unknown["estimate"]["basis"] == 0
    assert "nothing was measured" in describe(unknown)

    earlier.mkdir()
    with run_of_dogs(earlier, 2) as ledger, ledger.commit():
        ledger.start(1, [0, 1], "w1")
        ledger.finish(0, 1, RESULT), ledger.finish(1, 1, {**RESULT, "gpu_seconds": 5.0})
        for worker in ("w1", "w2"):
            ledger.note_spent("prior", "dog", worker, 2.5, "done", "")
    for name in ("s0", "s1"):
        (earlier / "subjects" / name).mkdir(parents=True)
        (earlier / "subjects" / name / "weights").write_bytes(bytes(100))
    plan = plan_run(tmp_path / "photos.csv", config, out, earlier)["estimate"]
    assert plan == {
        "basis": 2, "gpu_seconds": 12.0, "prior_gpu_seconds": 10.0, "result_bytes": 300, "from": str(earlier),
    }  # fmt: skip
