"""What is computed once and what again: run it twice, then change `count` and run it a third time."""

from onceflow.engine import INPUTS, TASK_SOURCE, State, flow, task

TEXT = "to be or not to be"


@task(persist_result=True)  # the policy is DEFAULT, which holds the run id: it reuses inside one run only
async def count_here(text: str, word: str) -> int:
    return text.split().count(word)


@task(cache_policy=INPUTS + TASK_SOURCE)  # the same inputs and the same code: reused by every later run
async def count(text: str, word: str) -> int:
    return text.split().count(word)


def show(what: str, state: State[int]) -> None:
    print(f"{what:22} {state.result()}  {state.name}")


@flow
async def counts() -> None:
    show("DEFAULT", await count_here.run_to_state(TEXT, "be"))
    show("DEFAULT, again", await count_here.run_to_state(TEXT, "be"))
    show("INPUTS + TASK_SOURCE", await count.run_to_state(TEXT, "be"))
    show("  again", await count.run_to_state(TEXT, "be"))
    show("  another input", await count.run_to_state(TEXT, "or"))


if __name__ == "__main__":
    counts.run()
