"""Work beside other work: on one stream in the order in which it stands there, on two with the same result."""

import pytest
import torch

from moe_lab.cuda_streams import Beside

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_work_beside_sees_what_was_there_and_is_seen_after_the_join(device, wanted):
    x = torch.ones(1000, 1000, device=device)
    for step in range(20):
        y = x * step
        beside = Beside(x.device, wanted)
        first = y @ x
        with beside:
            second = y + 1
            if device == "cuda":
                assert (torch.cuda.current_stream() != torch.cuda.default_stream()) == wanted
        beside.join(second, None)
        third = second * 2
        del second
        assert (third == 2 * step + 2).all() and (first == 1000 * step).all()


def test_an_error_beside_is_an_error_and_the_next_work_runs():
    beside = Beside(torch.device("cpu"), True)
    with pytest.raises(ValueError, match="beside"), beside:
        raise ValueError("beside")
    with beside:
        pass
    beside.join()
