"""One bucket, any number of machines: what one process has computed the next one reads, and one at a time computes.

Point it at a bucket and run it twice, or in two terminals at once:

    ONCEFLOW_STORAGE='s3://my-bucket/demo' ONCEFLOW_LOCKS='s3://my-bucket/demo' python examples/10_bucket.py

(`?endpoint_url=http://…` behind either for a store that is not AWS; credentials by botocore's usual chain.)
"""

import asyncio

from onceflow.engine import INPUTS, TASK_SOURCE, flow, task

once = (INPUTS + TASK_SOURCE).configure(
    isolation_level="SERIALIZABLE"
)  # the bucket alone is the lock as well


@task(cache_policy=once)
async def measure(station: str) -> dict[str, float]:
    await asyncio.sleep(0.2)  # stands for something expensive
    return {"mean": len(station) / 2, "max": float(len(station))}


@flow
async def survey(stations: list[str]) -> None:
    states = await asyncio.gather(*(measure.run_to_state(station) for station in stations))
    for station, state in zip(stations, states, strict=True):
        print(f"{station:10} {state.name:10} {state.result()}")


if __name__ == "__main__":
    survey.run(["Aachen", "Bremen", "Cottbus"])
