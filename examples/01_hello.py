"""A flow and a task: async functions that you call as before."""

from onceflow.engine import flow, task


@task
async def greet(name: str) -> str:
    return f"Hello, {name}!"


@flow
async def hello(names: list[str]) -> list[str]:
    return [await greet(name) for name in names]


if __name__ == "__main__":
    for line in hello.run(["Ada", "Grace"]):
        print(line)
