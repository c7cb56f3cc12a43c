from __future__ import annotations

from prima_ray.training.leaving import LAST_CALL_S, Doorbell, Notice, PreemptionDiary


def test_a_notice_of_preemption_wants_a_checkpoint_now_and_the_group_gone_before_the_deadline():
    diary, deadline = PreemptionDiary(), 1000.0
    assert diary.read("node", deadline=deadline, now=900.0) is Notice.SAVE
    assert diary.read("node", deadline=deadline, now=901.0) is Notice.SAVE
    diary.saved("node")
    assert diary.read("node", deadline=deadline, now=902.0) is Notice.NONE
    assert diary.read("node", deadline=deadline, now=deadline - LAST_CALL_S + 0.1) is Notice.LEAVE


def test_another_nodes_notice_is_another_notice():
    diary = PreemptionDiary()
    diary.saved("node")
    assert diary.read("other", deadline=1000.0, now=900.0) is Notice.SAVE


def test_a_notice_without_a_deadline_may_come_true_at_once():
    assert PreemptionDiary().read("node", deadline=None, now=900.0) is Notice.LEAVE


def test_the_doorbell_is_rung_from_outside_and_answered_from_inside():
    bell = Doorbell()
    assert (bell.rung, bell.answered) == (False, False)
    bell.ring()
    assert (bell.rung, bell.answered) == (True, False)
    bell.answer()
    assert (bell.rung, bell.answered) == (True, True)
