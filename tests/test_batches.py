"""Which tokens a step sees: nothing dropped, nothing twice, a function of (seed, step) alone."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batches import IGNORE, Batches
from pipeline.corpus import Corpus
from tests import tiny


def corpus_of(lengths: list[int]) -> Corpus:
    tokens = np.arange(sum(lengths), dtype=np.uint16)  # every token is unique, so it can be followed
    return Corpus(
        tokens=tokens,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        num_bytes=np.asarray(lengths, np.int64),
        hashes=np.arange(len(lengths), dtype=np.uint64),
        vocabulary_size=2**16,
        start_id=60000,
        end_id=60001,
    )


def batches_of(lengths: list[int], **changes: object) -> Batches:
    options: dict[str, object] = dict(max_length=5, windows_per_step=4, seed=1, isolate=True)
    return Batches(corpus_of(lengths), np.arange(len(lengths)), **(options | changes))  # type: ignore[arg-type]


def targets_of(batches: Batches, steps: range) -> Counter[int]:
    seen: Counter[int] = Counter()
    for step in steps:
        batch = batches.batch_at(step)
        seen.update(batch.targets_BT[batch.targets_BT != IGNORE].tolist())
    return seen


documents = st.lists(st.integers(1, 17), min_size=1, max_size=30)


@given(documents, st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
def test_every_token_and_every_end_is_a_target_once_an_epoch(lengths, max_length, windows_per_step, world_size):
    shapes = dict(max_length=max_length, windows_per_step=windows_per_step)
    of_rank = [batches_of(lengths, rank=rank, world_size=world_size, **shapes) for rank in range(world_size)]
    seen: Counter[int] = Counter()
    for batches in of_rank:
        seen += targets_of(batches, range(batches.steps_per_epoch))
    expected = Counter(range(sum(lengths))) + Counter({60001: len(lengths)})
    assert seen == expected


@given(documents, st.integers(1, 9), st.integers(1, 3))
def test_the_number_of_tokens_of_a_step_is_known_without_looking(lengths, max_length, windows_per_step):
    batches = batches_of(lengths, max_length=max_length, windows_per_step=windows_per_step)
    before = 0
    for step in range(2 * batches.steps_per_epoch):
        assert batches.num_tokens_before(step) == before
        assert targets_of(batches, range(step, step + 1)).total() == batches.num_tokens_at(step)
        before += batches.num_tokens_at(step)


@given(documents, st.integers(1, 9), st.integers(1, 5))
def test_no_step_is_much_smaller_than_another(lengths, max_length, windows_per_step):
    batches = batches_of(lengths, max_length=max_length, windows_per_step=windows_per_step)
    sizes = {len(batches.windows_at(step)) for step in range(batches.steps_per_epoch)}
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= batches.windows_per_step


@given(documents)
def test_inputs_are_what_comes_just_before_the_targets(lengths):
    batches = batches_of(lengths)
    offsets = batches.corpus.offsets
    firsts = set(offsets[:-1].tolist())
    batch = batches.batch_at(0)
    for before, target in zip(batch.inputs_BT.flatten().tolist(), batch.targets_BT.flatten().tolist(), strict=True):
        if target == IGNORE:
            continue
        if target == 60001:  # the end comes after the last token of a document
            assert before + 1 in offsets[1:]
        elif target in firsts:
            assert before == 60000
        else:
            assert before == target - 1


@given(documents)
def test_positions_begin_anew_at_every_document_and_every_window(lengths):
    batch = batches_of(lengths).batch_at(0)
    expected = torch.zeros_like(batch.positions_BT)
    for t in range(1, expected.shape[1]):
        starts = (batch.inputs_BT[:, t] == 60000) & (batch.targets_BT[:, t] != IGNORE)
        expected[:, t] = torch.where(starts, 0, expected[:, t - 1] + 1)
    real = batch.targets_BT != IGNORE
    assert torch.equal(batch.positions_BT[real], expected[real])


def test_joined_documents_have_plain_positions():
    batch = batches_of([3, 4, 5], isolate=False).batch_at(0)
    assert torch.equal(batch.positions_BT, torch.arange(5).expand_as(batch.positions_BT))


def test_micro_batches_are_the_windows_of_the_step_in_order():
    batch = batches_of(list(range(1, 30))).batch_at(0)
    parts = batch.cut(2)
    assert [len(part.windows) for part in parts] == [2, 1]
    assert [number for part in parts for number in part.windows] == batch.windows
    for name in ("inputs_BT", "targets_BT", "positions_BT"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


@given(documents, st.integers(0, 20))
def test_the_documents_of_a_step_are_those_its_targets_come_from(lengths, step):
    batches = batches_of(lengths)
    batch = batches.batch_at(step)
    targets = batch.targets_BT[(batch.targets_BT != IGNORE) & (batch.targets_BT != 60001)].numpy()
    owners = np.searchsorted(batches.corpus.offsets, targets, side="right") - 1
    found = batches.documents_at(step)
    assert set(owners.tolist()) <= set(found)  # one whose end alone is a target may be there besides
    assert len(found) <= len(set(owners.tolist())) + 1


def test_a_step_needs_no_history():
    lengths = list(range(1, 30))
    walked = batches_of(lengths)
    last = 3 * walked.steps_per_epoch - 1
    for step in range(last):
        walked.batch_at(step)
    fresh, after = batches_of(lengths).batch_at(last), walked.batch_at(last)
    assert torch.equal(fresh.inputs_BT, after.inputs_BT)
    assert torch.equal(fresh.positions_BT, after.positions_BT)


def test_epochs_and_seeds_shuffle_differently():
    lengths = list(range(1, 30))
    one, other = batches_of(lengths), batches_of(lengths, seed=2)
    first = one.batch_at(0).inputs_BT
    assert not torch.equal(first, one.batch_at(one.steps_per_epoch).inputs_BT)
    assert not torch.equal(first, other.batch_at(0).inputs_BT)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_out_the_windows_of_one(world_size):
    lengths = list(range(1, 30))
    alone = batches_of(lengths)
    shared = [batches_of(lengths, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(alone.steps_per_epoch):
        together = sum((targets_of(part, range(step, step + 1)) for part in shared), Counter())
        assert together == targets_of(alone, range(step, step + 1))
        assert len({len(part.batch_at(step).windows) for part in shared}) == 1


def test_worker_processes_prepare_the_same_batches(tmp_path):
    from pipeline.batches import load_ahead

    tokens = tiny.write_tokens(tmp_path / "tokens", [5, 9, 12, 7] * 6)
    batches = Batches(tokens, np.arange(24), max_length=8, windows_per_step=2, seed=1, isolate=True)
    inline = list(load_ahead(batches, range(3, 9), num_workers=0))
    ahead = list(load_ahead(batches, range(3, 9), num_workers=1))
    for one, other in zip(inline, ahead, strict=True):
        assert torch.equal(one.inputs_BT, other.inputs_BT)
