import threading

import pytest

from ksa_serving.circuit import Circuit, CircuitOpenError


def fail(circuit: Circuit) -> None:
    with pytest.raises(OSError, match="down"), circuit.call():
        raise OSError("down")


def passes(circuit: Circuit) -> bool:
    try:
        with circuit.call():
            return True
    except CircuitOpenError:
        return False


def test_calls_are_refused_after_one_failed_until_one_succeeds(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    circuit = Circuit(seconds=1.0)
    assert passes(circuit)
    fail(circuit)
    assert circuit.is_open
    assert not passes(circuit)
    now = 1.5
    fail(circuit)  # the one that tries
    assert not passes(circuit)
    now = 3.0
    assert passes(circuit)
    assert not circuit.is_open
    assert passes(circuit)
    assert circuit.num_opened == 1


def test_while_one_call_tries_others_are_refused():
    circuit = Circuit(seconds=0.0)
    fail(circuit)
    with circuit.call():
        refused: list[bool] = []
        other = threading.Thread(target=lambda: refused.append(not passes(circuit)))
        other.start()
        other.join()
        assert refused == [True]
    assert passes(circuit)


def test_only_the_call_that_tries_closes_and_lets_the_next_one_try():
    """Whatever calls do that began before the circuit opened, and end while one tries."""
    circuit = Circuit(seconds=0.0)
    old, tries = circuit.call(), circuit.call()
    old.__enter__()
    fail(circuit)
    tries.__enter__()
    old.__exit__(None, None, None)
    assert circuit.is_open
    assert not passes(circuit)
    tries.__exit__(None, None, None)
    assert not circuit.is_open
    assert passes(circuit)


def test_an_old_call_that_fails_does_not_let_two_try_at_once():
    circuit = Circuit(seconds=0.0)
    old, tries = circuit.call(), circuit.call()
    old.__enter__()
    fail(circuit)
    tries.__enter__()
    assert not old.__exit__(OSError, OSError("down"), None)
    assert not passes(circuit)
    tries.__exit__(None, None, None)
    assert not circuit.is_open


def test_a_call_that_began_before_does_not_close_what_another_opened():
    circuit = Circuit(seconds=60.0)
    with circuit.call():
        fail(circuit)
    assert circuit.is_open
    assert not passes(circuit)
