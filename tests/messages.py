"""How error messages are checked: rule, value received, fix."""

import pytest


def check_message(call, expected):
    """`expected`: exception, option, rule, what came, fix ("" where none is obvious)."""
    error, option, rule, got, fix = expected
    with pytest.raises(error) as info:
        call()
    assert type(info.value) is error
    message = str(info.value)
    before, _, after = message.partition("got ")
    assert message.startswith(f"`{option}` "), message
    assert rule in before + after, message
    assert got in after, message
    assert fix in message, message
    assert message.endswith("."), message
