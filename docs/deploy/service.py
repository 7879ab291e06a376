"""A front-end of a register as an HTTP service: `uvicorn service:app`. The guide of an enrolment backend explains it."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.responses import JSONResponse

import biodedup as bd

STATUS = {"unique": 201, "duplicate": 409, "review": 202, "refused": 422}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    cluster = bd.ClusterConfig(
        segments=os.environ["BIODEDUP_SEGMENTS"],
        cache=Path(os.environ.get("BIODEDUP_CACHE", "/var/cache/biodedup/segments")),
        ray_address=os.environ.get("BIODEDUP_RAY"),
        shard_groups=int(os.environ.get("BIODEDUP_GROUPS", "1")),
    )
    with bd.Engine.open(os.environ["BIODEDUP_URL"], bd.Config(cluster=cluster)) as engine:
        app.state.engine = engine
        yield


app = FastAPI(lifespan=lifespan)


@app.exception_handler(bd.CallerError)
def mistake(request: Request, error: bd.CallerError) -> JSONResponse:
    return JSONResponse({"error": type(error).__name__, "text": str(error)}, 400)


@app.exception_handler(bd.RetryableError)
def later(request: Request, error: bd.RetryableError) -> JSONResponse:
    return JSONResponse({"error": type(error).__name__, "text": str(error)}, 503, {"Retry-After": "5"})


@app.exception_handler(bd.BudgetExhausted)
def too_many(request: Request, error: bd.BudgetExhausted) -> JSONResponse:
    wait_s = str(math.ceil(error.retry_after_s))
    return JSONResponse({"error": type(error).__name__, "text": str(error)}, 429, {"Retry-After": wait_s})


@app.get("/health")
def health(request: Request) -> dict[str, int]:
    return {"subjects": len(request.app.state.engine)}


@app.post("/enrolments/{encounter_id}")
def enrol(
    request: Request,
    encounter_id: str,
    subject_id: str = Form(),
    face: UploadFile = File(),  # noqa: B008
) -> JSONResponse:
    encounter = bd.Encounter(subject_id, [bd.Face(face.file.read())], encounter_id=encounter_id)
    decision = request.app.state.engine.enroll(encounter)
    best = decision.best
    body = {
        "outcome": decision.outcome,
        "reasons": decision.reasons,
        "refusals": [(refusal.column, refusal.reason) for refusal in decision.refusals],
        "candidate": best and best.kind and {"subject_id": best.subject_id, "kind": best.kind},  # no scores
    }
    return JSONResponse(body, STATUS[decision.outcome])
