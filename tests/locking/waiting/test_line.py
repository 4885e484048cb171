"""The line of one key: whoever stands first leads, and nobody is forgotten."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from onceflow.locking._waiting.line import Line


def test_first_come_first_served() -> None:
    """The leader is who came first; leaving, wherever one stands, names a new leader only if that is news."""
    line: Line[str] = Line()
    assert line.join("a", "a1")
    assert not line.join("b", "b1")
    assert not line.join("c", "c1")
    assert line.leave("b", "b1") is None
    assert line.leave("a", "a1") == "c1"
    assert line.leave("a", "a1") is None
    assert line.leads("c1")
    assert line.leave("c", "c1") is None
    assert (line.leader, len(line)) == (None, 0)


def test_one_holder_stands_together() -> None:
    """Tickets of one holder stand where its first came, are served together, and lead one after the other."""
    line: Line[str] = Line()
    for holder, ticket in (("a", "a1"), ("b", "b1"), ("a", "a2")):
        line.join(holder, ticket)
    assert line.leave("a", "a1") == "a2"
    line.join("a", "a3")
    assert line.serve("a") == ["a2", "a3"]
    assert line.leader == "b1"
    assert line.serve("nobody") == []


def test_a_holder_that_stands_here_again() -> None:
    """A ticket that was served leaves late: the ticket with which its holder stands in line again is not disturbed."""
    line: Line[str] = Line()
    line.join("a", "a1")
    line.serve("a")
    line.join("b", "b1")
    line.join("a", "a2")
    assert line.leave("a", "a1") is None
    assert line.drain() == ["b1", "a2"]
    assert (line.leader, len(line)) == (None, 0)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("jjjls"), st.integers(0, 5), st.integers(0, 3)), max_size=60))
def test_like_a_plain_list(steps: list[tuple[str, int, int]]) -> None:
    """Whatever joins, leaves and is served, the line is what a list of parties would be."""
    line: Line[tuple[int, int]] = Line()
    model: list[tuple[int, list[tuple[int, int]]]] = []
    for step, (action, holder, number) in enumerate(steps):
        parties = dict(model)
        if action == "j":
            ticket = (holder, step)
            first = line.join(holder, ticket)
            if holder in parties:
                parties[holder].append(ticket)
            else:
                model.append((holder, [ticket]))
            assert first == (model[0][1][0] == ticket)
        elif action == "l":
            ticket = parties.get(holder, [(holder, -1)])[number % len(parties.get(holder, [1]))]
            before = model[0][1][0] if model else None
            news = line.leave(holder, ticket)
            if holder in parties:
                parties[holder].remove(ticket)
            model = [(name, party) for name, party in model if party]
            after = model[0][1][0] if model else None
            assert news == (after if before == ticket else None)
        else:
            assert line.serve(holder) == parties.get(holder, [])
            model = [(name, party) for name, party in model if name != holder]
        assert line.leader == (model[0][1][0] if model else None)
        assert len(line) == len(model)
    assert line.drain() == [ticket for _, party in model for ticket in party]
