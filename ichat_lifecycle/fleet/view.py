"""The fleet's documents: what its routes answer, and what its table shows."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ichat_lifecycle.fleet.asking import WorkerClients
from ichat_lifecycle.fleet.fleet import Fleet, summary
from ichat_lifecycle.fleet.member import Member
from ichat_lifecycle.fleet.states import Stage


async def fleet_document(fleet: Fleet, file: str, clients: WorkerClients) -> dict[str, Any]:
    """All workers, each with what it says of itself now."""
    members = fleet.members
    workers = await asyncio.gather(*(worker_document(member, clients) for member in members))
    return {
        "file": file,
        "stopping": fleet.stopping,
        "stages": dict(summary(members)),
        "workers": list(workers),
    }


async def worker_document(member: Member, clients: WorkerClients) -> dict[str, Any]:
    """One worker with its own `/lifecycle` document; null where it does not answer."""
    return {**member_document(member), "lifecycle": await _lifecycle(member, clients)}


def member_document(member: Member) -> dict[str, Any]:
    """A worker as the supervisor knows it, without asking it."""
    plan, told = member.plan, member.told
    now_s = asyncio.get_running_loop().time()
    return {
        "name": member.name,
        "model": plan.model,
        "stage": member.stage.value,
        "since": member.since.isoformat(),
        "for_s": max(0.0, now_s - member.since_s),
        "state": told.state.value if told else None,
        "phase": told.phase if told else None,
        "fraction": told.fraction if told else None,
        "reason": member.reason,
        "pid": member.process.pid if member.process else None,
        "address": plan.address,
        "control_url": member.control_url,
        "gpu_ids": list(plan.gpu_ids) if plan.gpu_ids is not None else None,
        "starts": member.starts,
        "restarts_left": member.restarts_left,
        "ended_with": member.ended_with,
        "starts_again_in_s": _starts_again_in_s(member),
    }


def _starts_again_in_s(member: Member) -> float | None:
    if member.stage is not Stage.BACKING_OFF or member.due_s is None:
        return None
    return max(0.0, member.due_s - asyncio.get_running_loop().time())


async def _lifecycle(member: Member, clients: WorkerClients) -> Mapping[str, Any] | None:
    url = member.control_url
    return await clients.lifecycle(member.name, url) if url else None
