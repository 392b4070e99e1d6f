"""An engine with data parallelism: each rank has to answer, and to move, by itself."""

from __future__ import annotations

import asyncio

import pytest
from watched_engine import BUSY, HEALTH, HUNG, TOKENS, Rpc, Watch, watch

from ichat_lifecycle.ports import Signs, Verdict, VerdictKind
from ichat_lifecycle.verdicts import told

RANKS = (0, 1, 2)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("hangs_at_s", [0.3, 4.9, 5.1, 7.0])
def test_a_rank_that_hangs_is_found_and_named_while_the_others_move(
    rank: int, hangs_at_s: float
) -> None:
    """The counters of the others move all the time, and excuse nothing."""
    rpc = Rpc(moves=True, in_flight=4, ranks=RANKS)

    async def script(seen: Watch) -> None:
        await asyncio.sleep(hangs_at_s)
        rpc.hanging = {rank}
        await asyncio.sleep(16)

    seen = watch(rpc, script)
    hung = [(at, v) for (at, kind), v in zip(seen.said, seen.verdicts, strict=True) if kind == HUNG]
    at_s, verdict = hung[0]
    assert hangs_at_s + HEALTH.timeout <= at_s <= hangs_at_s + 15 + 0.001
    assert verdict.signs.ranks == (rank,)
    assert told(verdict) == f"no answer from rank {rank} of the engine for 10 s"


def test_a_rank_with_requests_that_stands_still_is_asked_at_once() -> None:
    """Within a second or two, although the others get on; and not for want of work."""
    rpc = Rpc(moves=True, in_flight=4, ranks=RANKS, working={0, 1})

    async def script(seen: Watch) -> None:
        await asyncio.sleep(0.5)
        rpc.stuck = {2}  # without work
        await asyncio.sleep(3)
        assert set(rpc.asked) == {0}
        rpc.stuck = {1, 2}
        await asyncio.sleep(2.5)
        assert set(rpc.asked) > {0}

    watch(rpc, script)


@pytest.mark.parametrize("rank", RANKS)
def test_an_idle_rank_is_asked_for_a_token_by_itself(rank: int) -> None:
    """It answers its RPC, nobody sends it a request, and only a token shows it."""
    rpc = Rpc(moves=True, in_flight=2, ranks=RANKS, working=set(RANKS) - {rank}, stuck={rank})
    seen = watch(rpc, 27, TOKENS)
    assert rpc.tokens_of == [rank]
    at_s, verdict = next(
        (at, v) for (at, kind), v in zip(seen.said, seen.verdicts, strict=True) if kind == HUNG
    )
    assert at_s == 25
    assert told(verdict) == f"no token from rank {rank} of the engine for 10 s"


def test_idle_ranks_answer_their_tokens() -> None:
    seen = watch(Rpc(ranks=RANKS), 60, TOKENS)
    assert set(seen.rpc.tokens_of) == set(RANKS)
    assert HUNG not in [kind for _, kind in seen.said]


def test_a_rank_that_comes_back_ends_the_hang() -> None:
    rpc = Rpc(moves=True, in_flight=4, ranks=RANKS, hanging={1})

    async def script(seen: Watch) -> None:
        await asyncio.sleep(12)
        rpc.hanging = set()
        await asyncio.sleep(7)

    seen = watch(rpc, script)
    assert [kind for at, kind in seen.said if at >= 10][:2] == [HUNG, BUSY]
    assert seen.verdicts[-1].signs.ranks == ()


def test_all_ranks_that_hang_are_named() -> None:
    seen = watch(Rpc(ranks=RANKS, hanging={0, 2}), 11)
    assert told(seen.verdicts[-1]) == "no answer from ranks 0, 2 of the engine for 10 s"


def test_a_rank_that_cannot_be_asked_is_named() -> None:
    class OneFails(Rpc):
        async def __call__(self, rank: int = 0) -> bool:
            if rank == 1:
                raise RuntimeError("no such engine")
            return await super().__call__(rank)

    seen = watch(OneFails(ranks=RANKS), 1)
    assert told(seen.verdicts[0]) == "rank 1 of the engine cannot be asked"
    assert "no such engine" in seen.verdicts[0].signs.error


def test_an_engine_of_one_rank_has_no_rank() -> None:
    seen = watch(Rpc(hanging={0}), 11)
    assert told(seen.verdicts[-1]) == "no answer from the engine for 10 s"


def test_a_verdict_without_ranks_is_of_the_engine() -> None:
    assert told(Verdict(VerdictKind.HUNG, Signs(error="x"))) == "the engine cannot be asked"
