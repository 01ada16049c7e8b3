"""When log lines, checkpoints, samples and the end are due."""

from dbtrain.settings.recipes import loads
from dbtrain.training.cadence import Due, due

NOTHING = Due(log=False, checkpoint=False, sample=False, end=False)


def cadence(steps, log, checkpoint, sample):
    words = [f"track.every_steps={log}", f"checkpoint.every_steps={checkpoint}", f"sample.every_steps={sample}"]
    return loads(f"train: {{steps: {steps}}}", "small", words)


def test_each_interval_counts_for_itself_and_the_last_step_needs_only_its_line():
    config = cadence(12, 2, 3, 4)
    for done in range(1, 12):
        assert due(done, config) == Due(done % 2 == 0, done % 3 == 0, done % 4 == 0, False)
        assert due(done, config).anything == (done not in (1, 5, 7, 11))
    assert due(12, config) == Due(log=True, checkpoint=False, sample=False, end=True)


def test_never_is_nought_and_the_end_is_always_logged():
    config = cadence(5, 4, 0, 0)
    assert [due(done, config) for done in (1, 2, 3)] == [NOTHING] * 3 and not NOTHING.anything
    assert due(4, config) == Due(True, False, False, False)
    assert due(5, config) == due(6, config) == Due(True, False, False, True)
    kept = config.replaced("checkpoint.last", True)
    assert due(5, kept) == Due(True, True, False, True) and due(4, kept) == due(4, config)


def test_what_train_stop_watches_is_due_at_its_interval_and_logged():
    words = ["track.every_steps=100", "train.stop.metric=loss", "train.stop.every=2"]
    config = loads("train: {steps: 5}", "small", words)
    seen = [due(done, config) for done in range(1, 6)]
    assert [now.observe for now in seen] == [False, True, False, True, False]
    assert [now.log for now in seen] == [False, True, False, True, True]
    assert not due(2, loads("train: {steps: 5}", "small", words[2:])).observe
