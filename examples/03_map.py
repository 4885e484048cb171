"""Many runs at once: map, submit, futures as arguments, and failures that somebody looks at."""

import asyncio

from onceflow.engine import allow_failure, as_completed, flow, task, unmapped


@task
async def scale(number: int, factor: int) -> int:
    return number * factor


@task
async def nap(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return f"slept {seconds} s"


@task
async def fail() -> int:
    raise ValueError("no luck today")


@task
async def describe(value: object) -> str:
    return f"{type(value).__name__} {value}"


@flow
async def many() -> None:
    print("in input order:", await scale.map([1, 2, 3], factor=unmapped(10)))
    print("a thousand at once:", sum(await scale.map(range(1000), factor=unmapped(2))))

    futures = scale.map([1, 2, 3], factor=unmapped(10))
    print("as an argument:", await describe.submit(futures))  # waits for them; no thread does

    async for future in as_completed([nap.submit(0.2), nap.submit(0.1)]):
        print("as they finish:", await future)

    failed = fail.submit()
    print("a failure allowed:", await describe.submit(allow_failure(failed)))
    print("not allowed:", (await describe.run_to_state(failed)).name)


if __name__ == "__main__":
    many.run()
