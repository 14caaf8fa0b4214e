"""What nbclient gets wrong now and then, provoked on purpose: a wake-up that somebody else swallowed."""

import asyncio
import time

import pytest
import zmq
import zmq.asyncio
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.session import Session

from moe_lab.notebook_runner import _LooksAgain


async def reply_whose_wake_up_was_swallowed(channel_class, patience):
    session, context = Session(key=b"secret"), zmq.asyncio.Context()
    with context, zmq.Context() as outside, outside.socket(zmq.DEALER) as kernel:
        port = kernel.bind_to_random_port("tcp://127.0.0.1")
        socket = context.socket(zmq.DEALER)
        socket.connect(f"tcp://127.0.0.1:{port}")
        channel = channel_class(socket, session)
        raw = zmq.Socket.shadow(socket.underlying)  # what Session.send uses
        reply = asyncio.ensure_future(channel.get_msg())
        await asyncio.sleep(0.1)  # it waits now
        session.send(kernel, "execute_reply", {"status": "ok"})
        deadline = time.monotonic() + 5
        while not raw.get(zmq.EVENTS) & zmq.POLLIN:  # as a send does; and the event loop does not run meanwhile
            assert time.monotonic() < deadline, "the message never arrived"
        try:
            return (await asyncio.wait_for(reply, patience))["msg_type"]
        finally:
            channel.close()


def test_a_reply_is_found_although_its_wake_up_was_swallowed():
    assert asyncio.run(reply_whose_wake_up_was_swallowed(_LooksAgain, 10)) == "execute_reply"


def test_the_channel_of_jupyter_client_misses_it():
    """If this fails, `_LooksAgain` is no longer needed."""
    with pytest.raises(TimeoutError):
        asyncio.run(reply_whose_wake_up_was_swallowed(AsyncZMQSocketChannel, 3))
