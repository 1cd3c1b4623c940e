"""Random arrivals, budgets, cache sizes, preemptions, aborts, damaged pictures: everything ends, rightly; nothing leaks."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mmv1.types import FinishReason
from tests.scheduler.harness import Harness
from tests.simulation import expected_output, make_prompt, make_request

PICTURES = [(bytes([i]) * 32, tokens) for i, tokens in enumerate((1, 3, 8, 16, 17, 30, 40))]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    block_size=st.sampled_from([1, 2, 4, 7, 16]),
    spare_blocks=st.integers(0, 40),
    encoder_pages=st.integers(3, 12),
    max_num_seqs=st.integers(1, 8),
    max_num_batched_tokens=st.integers(1, 64),
    max_num_encoder_tokens=st.integers(20, 120),
    policy=st.sampled_from(["fcfs", "priority"]),
    prefix_caching=st.booleans(),
    depth=st.integers(1, 2),
    encode_depth=st.integers(1, 2),
    max_followed_tokens=st.sampled_from([0, 20, 1000]),
    max_ahead_patches=st.sampled_from([0, 100, 100_000]),
    slots=st.sampled_from([1, 2, 1_000_000]),
    num_requests=st.integers(1, 14),
    abort_rate=st.sampled_from([0.0, 0.0, 0.05]),
    poisoned=st.booleans(),
)
# Found: a request that preempts itself may free what another waits for, with nothing in flight whose end would wake anyone.
@example(
    seed=115,
    block_size=1,
    spare_blocks=0,
    encoder_pages=3,
    max_num_seqs=2,
    max_num_batched_tokens=1,
    max_num_encoder_tokens=40,
    policy="fcfs",
    prefix_caching=False,
    depth=1,
    encode_depth=1,
    max_followed_tokens=0,
    max_ahead_patches=0,
    slots=1_000_000,
    num_requests=7,
    abort_rate=0.0,
    poisoned=False,
)
# Found: a picture in the encoder cache that the request's cached prefix covers was kept for it, in the way of its next one.
@example(
    seed=36,
    block_size=1,
    spare_blocks=13,
    encoder_pages=3,
    max_num_seqs=1,
    max_num_batched_tokens=1,
    max_num_encoder_tokens=20,
    policy="priority",
    prefix_caching=True,
    depth=1,
    encode_depth=1,
    max_followed_tokens=0,
    max_ahead_patches=0,
    slots=1,
    num_requests=3,
    abort_rate=0.0,
    poisoned=False,
)
def test_everything_ends_rightly_and_nothing_leaks(
    seed: int,
    block_size: int,
    spare_blocks: int,
    num_requests: int,
    abort_rate: float,
    poisoned: bool,
    **settings_: object,
) -> None:
    rng = random.Random(seed)
    poison = frozenset({PICTURES[rng.randrange(len(PICTURES))][0]}) if poisoned else frozenset()
    requests = []
    shared = make_prompt(rng, rng.choices(PICTURES, k=2))
    for i in range(num_requests):
        prompt, features = make_prompt(rng, rng.choices(PICTURES, k=rng.randrange(4)))
        if rng.random() < 0.4:  # a common beginning, sometimes the whole prompt
            prompt, features = shared if rng.random() < 0.3 else ([*shared[0], rng.randrange(50)], shared[1])
        requests.append(make_request(f"r{i}", prompt, features, max_tokens=rng.randrange(1, 20), priority=rng.randrange(3)))
    longest = max(len(r.prompt_token_ids) + r.max_tokens for r in requests)
    harness = Harness(
        num_blocks=1 + -(-longest // block_size) + spare_blocks,
        block_size=block_size,
        seed=seed,
        poison=poison,
        **settings_,  # type: ignore[arg-type]
    )
    waiting = list(requests)
    while waiting:
        if rng.random() < 0.3:
            harness.add(waiting.pop())
        if rng.random() < abort_rate and harness.scheduler.requests:
            harness.abort(rng.choice(list(harness.scheduler.requests)))
        harness.turn()
    harness.drain()

    for request in requests:
        reason = harness.finished[request.request_id]
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert harness.outputs[request.request_id] == expected_output(request)
        elif reason is FinishReason.ERROR:
            assert any(feature.mm_hash in poison for feature in request.mm_features)
        else:
            assert reason is FinishReason.ABORT and abort_rate > 0
