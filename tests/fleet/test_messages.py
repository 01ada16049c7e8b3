"""What driver, worker and trainer send each other."""

import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import get_args

import pytest

from dbtrain.fleet import messages
from dbtrain.fleet.causes import End
from dbtrain.fleet.messages import Died, Failed, Message, Order, Task
from dbtrain.fleet.schedule import WorkUnit
from dbtrain.values import Subject
from tests.kit.main_job import environment


def test_messages_arrive_as_they_were_sent_and_do_not_change():
    order = Order(3, WorkUnit("train", "dog", (0,)), (Subject("a", "dog", ()),), (), ((),))
    for message in (Task({"seed": 1}, "out"), order, Failed(3, 0, End("error", "the loss is nan"), 1.5)):
        assert pickle.loads(pickle.dumps(message)) == message
    with pytest.raises(FrozenInstanceError):
        order.number = 4
    classes = [each for each in vars(messages).values() if is_dataclass(each) and each.__module__ == messages.__name__]
    assert {*get_args(Message)} < {*classes} and all(each.__dataclass_params__.frozen for each in classes)


def test_every_message_of_an_end_says_why():
    assert {each for each in get_args(Message) if "end" in {field.name for field in fields(each)}} == {Failed, Died}


def test_a_worker_and_its_messages_load_no_torch():
    """An actor is a light process beside its warm parent, which has imported all of that."""
    code = "import sys, dbtrain.fleet.worker; print({'torch', 'ray', 'diffusers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
